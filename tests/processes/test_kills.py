"""SIGKILL in the middle of a round: the same command, or the supervisor, goes on, and no bit of the result differs."""

import time

import pytest

from fedserver.checkpoint import read_state
from shared_models.files import read_lines
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import deployed, in_round, kill, until

STUDY = """
name = "kills"
[model]
features = [8, 8, 16, 32, 64, 8]
[preprocess]
size = [64, 64]
[train]
local_steps = 25
batch_size = 8
precision = "float32"
deterministic = true
[rounds]
count = 4
quorum = 2
deadline_s = 240
"""
LAST = "states/*/*/round-0004.safetensors"
# Two ways of training in which each site goes on from what it remembers
REMEMBERING = (
    STUDY.replace("[train]\n", '[train]\noptimizer = "sgd"\nmomentum = 0.0\nscaffold = true\n')
    + """
[strategy]
weighting = "uniform"
[personal]
ditto_lambda = 0.1
"""
)


@pytest.mark.process
def test_a_run_survives_the_death_of_each_process_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=2, train=6, val=1, test=2, slices=3, size=64))
    study = tmp_path / "kills.toml"
    study.write_text(REMEMBERING)
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south")) as here:
        here.fedserver("run", str(study), "--name", "whole", "--no-wait")
        until(lambda: here.run("whole")["state"] == "finished", 180, "the undisturbed run finished", logs)

        run = here.run_folder("cut")
        here.fedserver("run", str(study), "--name", "cut", "--new", "--no-wait")
        until(lambda: in_round(run, 1), 60, "round 1 has begun", logs)
        kill(here.server_app_pid())
        until(lambda: in_round(run, 2), 120, "round 2 has begun, after the ServerApp's death", logs)
        kill(here.pid("link"))
        until(lambda: in_round(run, 3), 120, "round 3 has begun, after the SuperLink's death", logs)
        kill(here.pid("node", "north"))
        kill(here.pid("executor", "south"))
        until(lambda: here.run("cut")["state"] == "finished", 240, "the run finished after all deaths", logs)

        whole = here.run_folder("whole")
        for number in range(1, 5):
            assert run.weights(number).read_bytes() == whole.weights(number).read_bytes(), f"round {number} differs"
        for line in read_lines(run.metrics):
            assert set(line["sites"]) == {"north", "south"}, f"round {line['round']} lost a site"
        for site in ("north", "south"):
            kept = {p.parent.parent.name.partition("-")[0]: p.read_bytes() for p in here.site(site).glob(LAST)}
            assert kept["cut"] == kept["whole"], f"{site} remembers something else"
        rounds = [line["round"] for line in read_lines(run.metrics) if not line.get("final")]
        assert rounds == [1, 2, 3, 4], "a round was counted twice or not at all"
        assert read_state(run).round == 4

        database = here.federation / "superlink"
        heavy = [p for p in database.rglob("*") if p.is_file() and p.stat().st_size > 8 << 20]
        weights = run.weights(4).read_bytes()[-4096:-2048]
        assert not heavy
        assert not any(weights in p.read_bytes() for p in database.rglob("*") if p.is_file()), "tensors in the database"


@pytest.mark.process
def test_a_site_that_never_joins_and_one_that_dies_are_named_and_the_round_closes_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=3, train=4, val=1, test=2, slices=2, size=64))
    study = tmp_path / "bounded.toml"
    text = STUDY.replace("kills", "bounded").replace("deadline_s = 240", "deadline_s = 25\ngather_s = 2")
    study.write_text(text.replace("count = 4", "count = 2").replace("local_steps = 25", "local_steps = 8"))
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south", "east")) as here:
        here.fedserver("invite", "west")
        until(lambda: len(here.status()["sites"]) == 4, 20, "west is invited", logs)
        here.fedserver("run", str(study), "--name", "bounded", "--no-wait")
        run = here.run_folder("bounded")
        until(lambda: in_round(run, 1), 60, "round 1 has begun", logs)
        began = time.monotonic()
        stop_site(here, "east")
        until(lambda: read_state(run).round >= 1, 60, "round 1 is closed", logs)
        assert time.monotonic() - began <= 25 + 5 + 1
        left_out = next(x for x in read_lines(run.metrics) if x["round"] == 1)["left_out"]
        assert left_out["west"] == {"state": "away", "reason": "was invited and has not joined"}
        assert left_out["east"]["state"] in ("lost", "late")
        until(lambda: here.run("bounded")["state"] == "finished", 90, "the run finished with two sites", logs)


def stop_site(here, site):
    """Kills a site's supervisor and all its processes at once, as a power cut does."""
    import psutil

    supervisor = psutil.Process(here.pid("node", site)).parent()
    assert supervisor is not None
    for process in [supervisor, *supervisor.children(recursive=True)]:
        process.kill()
