"""Hospitals that have joined a served federation, and runs over them: real gateway, files, signatures; no SuperNode."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from fedclient.policy import Policy
from fedclient.site import Data, Site, SiteFile, open_site, site_toml
from fedserver.app import proof
from fedserver.checkpoint import RunFolder, State, create_run
from fedserver.cohort import Presence
from fedserver.courier import Beside
from fedserver.enrol import open_log
from fedserver.records import Records
from fedserver.rounds import carry_out
from fedserver.setting import Setting
from shared_models.files import write_atomic
from shared_models.study import Study
from shared_models.weights import Arrays
from simulations.engine import LocalGrid
from tests.edge import Edge, joined_site
from tests.toys import WEIGHTS, Clock, ToyLearner, toy_app


@dataclass
class Hospitals:
    """Sites of one edge, and the coordinator's clock for their runs."""

    edge: Edge
    folder: Path
    sites: dict[str, Path] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def join(self, name: str, policy: Policy | None = None, data: Path | None = None) -> Path:
        joined = joined_site(self.edge, self.folder, name)
        here = joined.keys.parent
        file = SiteFile(
            name, joined.address, joined.federation, Data(str(data or self.folder)), policy=policy or Policy()
        )
        write_atomic(here / "site.toml", site_toml(file).encode())
        self.sites[name] = here
        return here

    def site(self, name: str) -> Site:
        return open_site({"site-dir": str(self.sites[name])})

    @property
    def records(self) -> Records:
        federation = self.edge.federation
        return Records(open_log(federation), federation.state, lambda: federation.authority)

    def setting(self, run: RunFolder, app: ClientApp | None = None, **change: Any) -> Setting:
        numbered = dict(enumerate(sorted(self.sites), start=1))
        configs: Mapping[int, Mapping[str, str | int]] = {
            i: {"site": name, "site-dir": str(self.sites[name])} for i, name in numbered.items()
        }
        federation = self.edge.federation
        presence = Presence({name: i for i, name in numbered.items()})
        made = Setting(
            LocalGrid(app or toy_app(ToyLearner()), configs), run, lambda: presence,
            Beside(federation.blobs / "out", federation.blobs / "in", run.id), self.clock, self.clock.sleep, poll_s=1.0,
            sign=lambda purpose, content: proof(federation, purpose, content),
            records=self.records, roster=self.records.roster,
        )  # fmt: skip
        return replace(made, **change)

    def run(
        self, study: Study, name: str = "toy", app: ClientApp | None = None, weights: Arrays = WEIGHTS, **change: Any
    ) -> tuple[State, RunFolder]:
        folder = self.edge.federation.runs / name
        run = RunFolder(folder) if folder.exists() else create_run(self.edge.federation.runs, name, study, weights)
        return carry_out(self.setting(run, app, **change)), run


def after(clock: Clock, seconds: float, what: Callable[[], object]) -> Callable[[float], None]:
    """A sleep that does `what` once, when so many seconds of the clock have passed."""
    begun, done = clock.now, list[object]()

    def sleep(pause: float) -> None:
        clock.sleep(pause)
        if not done and clock.now - begun >= seconds:
            done.append(what())

    return sleep
