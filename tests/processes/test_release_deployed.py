"""From rounds of real hospitals to a release that one of them verifies; then one leaves, and the rest train on."""

import json

import pytest

from simulations.demo import command
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import deployed, until

STUDY = """
name = "lung"
[model]
features = [4, 4, 8, 8, 8, 4]
groups = 2
[preprocess]
size = [64, 64]
[train]
local_steps = 2
batch_size = 4
[rounds]
count = 2
quorum = 1
deadline_s = 120
"""


@pytest.mark.process
def test_a_run_is_released_verified_and_trained_again_when_a_site_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=2, train=3, val=1, test=2, slices=2, size=64))
    study = tmp_path / "lung.toml"
    study.write_text(STUDY)
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south")) as here:
        for name in here.sites:  # which want a round of two by themselves
            settings = here.site(name) / "site.toml"
            settings.write_text(settings.read_text().replace("least_cohort = 2", "least_cohort = 1"))
        here.fedserver("run", str(study), "--name", "first", "--no-wait")
        until(lambda: here.run("first")["state"] == "finished", 240, "the run finished", logs)

        out = tmp_path / "out"
        made = json.loads(here.fedserver("release", "first", "--out", str(out), "--single-file", "--json"))
        site = ["--site", str(here.site("north"))]
        told = json.loads(command(tmp_path, ["fedclient", "verify", made["path"], *site, "--run", "--json"]))
        assert told["digest"] == made["digest"]
        assert set(told["sites"]) <= {"north", "south"}
        assert max(form["logits"] for form in told["parity"].values()) < 1e-4

        gone = json.loads(here.fedserver("withdraw", "north", "--reason", "its board said so", "--json"))
        assert [release["label"] for release in gone["releases"]] == ["lung-1"]
        again = json.loads(here.fedserver("retrain", "first", "--without", "north", "--json"))
        assert again["from_round"] == 0
        until(lambda: here.run(again["run"])["state"] == "finished", 240, "it was trained without north", logs)
        made = json.loads(here.fedserver("release", again["run"], "--out", str(out), "--json"))
        told = json.loads(command(tmp_path, ["fedclient", "verify", made["path"], *site, "--json"]))
        assert told["sites"] == {"south": 2}
