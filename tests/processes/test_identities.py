"""Sites come, renew and go in the middle of a run, and the issuing key changes: no restart, no update lost."""

import time

import psutil
import pytest
from cryptography import x509

from fedclient.ask import TurnedAway, ask
from fedclient.renewal import renew
from fedclient.site import read_site_file
from fedserver.checkpoint import read_progress
from fedserver.enrol import open_federation
from fedserver.lifecycle import revoke
from shared_models.authority import read_authority, read_files
from shared_models.files import read_lines
from shared_models.identity import load_credential
from shared_models.transfer import site_context
from simulations.demo import background, command
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import deployed, in_round, until

STUDY = """
name = "identities"
[model]
features = [8, 8, 16, 32, 64, 8]
[preprocess]
size = [64, 64]
[train]
local_steps = 40
batch_size = 8
precision = "float32"
[rounds]
count = 2
quorum = 2
deadline_s = 240
"""


@pytest.mark.process
def test_a_site_joins_another_renews_and_a_third_is_revoked_in_the_middle_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=3, train=6, val=1, test=1, slices=3, size=64))
    study = tmp_path / "identities.toml"
    study.write_text(STUDY)
    logs, stick, words = tmp_path / "d", tmp_path / "stick", tmp_path / "words"
    words.write_text("correct horse battery\n")
    root = ["--passphrase-file", str(words)]
    with deployed(logs, data, ("north", "south"), init=["--offline-ca", str(stick), *root]) as here:
        run = here.run_folder("identities")
        here.fedserver("run", str(study), "--name", "identities", "--no-wait")
        until(lambda: in_round(run, 1), 90, "round 1 has begun", logs)
        pids = [here.pid(child, "north") for child in ("node", "executor")]
        here.fedserver("ca", "renew", "--root", str(stick), *root)
        renew(here.site("north"), "north", read_site_file(here.site("north")).coordinator)
        assert in_round(run, 1), "the renewal came in the middle of the round"
        invite = here.fedserver("invite", "east").strip()
        joining = ["fedclient", "join", invite, "--data", str(data), "--manifest-site", "east"]
        command(logs, [*joining, "--site", str(here.site("east")), "--approve", "inside-policy"])
        with background(logs / "east.log", ["fedclient", "start", "--site", str(here.site("east"))]):
            until(lambda: in_round(run, 2), 150, "round 2 has begun", logs)
            until(lambda: seat(run, "south") == "asked", 60, "south works on round 2", logs)
            revoke(open_federation(here.federation), "south", "its contract has ended")
            began = time.monotonic()
            until(lambda: "was revoked on" in turned_away(here, "south"), 30, "the gateway refuses it", logs)
            until(lambda: seat(run, "south") == "revoked", 30, "the round does without it", logs)
            assert time.monotonic() - began < 30
            until(lambda: told(here, "south"), 120, "its node was told, once its work ended", logs)
            until(lambda: here.run("identities")["state"] == "finished", 180, "the run finished", logs)
        first, second = (line for line in read_lines(run.metrics) if not line.get("final"))
        assert {"north", "south"} <= set(first["sites"]), "an update was lost in the renewal"
        assert set(second["sites"]) == {"north", "east"}
        assert second["left_out"]["south"]["state"] == "revoked"
        assert "was revoked on" in second["left_out"]["south"]["reason"]
        assert pids == [here.pid(child, "north") for child in ("node", "executor")], "a process was restarted"
        status = {site["name"]: site for site in here.status()["sites"]}
        assert status["south"]["state"] == "revoked"
        assert "its contract has ended" in status["south"]["reason"]
        assert here.status()["roster_epoch"] == 5, "three enrolments, a renewal and a revocation"
        number = lambda folder: read_authority(read_files(folder)).number  # noqa: E731
        assert number(here.federation / "ca") == 2
        until(lambda: number(here.site("north") / "keys") == 2, 70, "its node has heard of the new issuing key", logs)
        assert issuer(here, "north") != issuer(here, "south"), "one renewed by the new key, the other is of the old"
        assert issuer(here, "north") == issuer(here, "east")
        assert no_secret_shows(here, logs, invite)


def issuer(here, site):
    """Whose key has signed a site's certificate."""
    path = here.site(site) / "keys/tls.pem"
    return x509.load_pem_x509_certificate(load_credential(path).certificate).issuer


def seat(run, site):
    return read_progress(run).get("sites", {}).get(site, {}).get("state")


def turned_away(here, site):
    """What the gateway says to a certificate."""
    folder = here.site(site)
    try:
        ask(read_site_file(folder).coordinator, site_context(folder / "keys"), "GET", "/health")
    except TurnedAway as refused:
        return refused.words
    return ""


def told(here, site):
    return "was revoked on" in (here.site(site) / "logs/node.log").read_text()


def no_secret_shows(here, logs, invite):
    """No key, secret or token of this federation stands in a log, a command line or an environment."""
    secrets = {invite.encode()}
    keys = [*here.federation.rglob("*.key"), *here.federation.rglob("tls/*.pem"), here.federation / "ca/signer.pem"]
    keys += [here.federation / "ca/issuing.pem"]
    keys += [p for p in (logs / "sites").rglob("keys*/*") if p.name not in ("ca.pem", "authorities.pem")]
    for path in keys:
        private = path.read_bytes().partition(b"-----BEGIN CERTIFICATE")[0]
        secrets |= {line for line in private.splitlines() if len(line) > 40 and not line.startswith(b"-----")}
    for path in [*here.federation.glob("secrets/*"), *(logs / "sites").glob("*/secrets/superexec")]:
        secrets.add(path.read_bytes().hex().encode())
    assert len(secrets) > 20
    shown = [path.read_bytes() for path in logs.rglob("*.log*")]
    for process in psutil.Process().children(recursive=True):
        shown.append(" ".join(process.cmdline()).encode())
        shown.append(" ".join(process.environ().values()).encode())
    assert len(shown) > 20
    return not any(secret in text for secret in secrets for text in shown)
