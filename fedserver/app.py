"""The coordinator as Flower sees it: one ServerApp, a shell around `fedserver.rounds`."""

import logging
from collections.abc import Collection
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedserver.checkpoint import RunFolder, excluded
from fedserver.cohort import Presence
from fedserver.courier import Beside
from fedserver.enrol import Federation, open_federation, open_log, signer
from fedserver.lifecycle import revoked_sites
from fedserver.records import Records
from fedserver.report import write_report
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from fedserver.state import list_sites
from shared_models.identity import sign
from shared_models.wire import Proof

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carries out the run that the dispatcher names, from its last finished round."""
    federation = open_federation(Path(str(context.run_config["federation"])))
    run = RunFolder(federation.runs / str(context.run_config["run"]))
    without = excluded(run)
    records = Records(open_log(federation), federation.state, lambda: federation.authority)
    carry_out(
        Setting(
            grid,
            run,
            presence=lambda: presence(grid, federation, without),
            courier=Beside(federation.blobs / "out", federation.blobs / "in", run.id),
            poll_s=0.1,
            poll_each_s=0.05,
            sign=lambda purpose, content: proof(federation, purpose, content),
            records=records,
            revoked=lambda: revoked_sites(federation.state),
            roster=records.roster,
        )
    )
    try:
        write_report(run)
    except Exception:  # the run is done and its weights are saved: a page that cannot be drawn does not undo that
        logging.getLogger("fedserver").exception("run %s is finished, but its report could not be written", run.id)


def proof(federation: Federation, purpose: str, content: bytes) -> Proof:
    """The coordinator's signature of a statement."""
    by = signer(federation)
    return Proof(by.certificate.decode(), sign(by.key, purpose, content).hex())


def presence(grid: Grid, federation: Federation, without: Collection[str] = ()) -> Presence:
    """Which enrolled sites are online: by the node that the gateway saw behind each site's certificate.

    Sites of `without` are not asked in this run, as if they were not there.
    """
    online = {node.node_id for node in grid.get_nodes() if node.status == "online"}
    nodes: dict[str, int] = {}
    away: dict[str, str] = {}
    known = list_sites(federation.state)
    for site in known:
        if site.state == "revoked" or site.name in without:
            continue
        if site.flower_node_id in online and site.flower_node_id is not None:
            nodes[site.name] = site.flower_node_id
        elif site.state == "invited":
            away[site.name] = "was invited and has not joined"
        elif site.seen_at is None:
            away[site.name] = "has joined and never connected; is `fedclient start` running there?"
        else:
            away[site.name] = "is offline"
    return Presence(nodes, away, frozenset(site.name for site in known if site.state == "invited"))
