"""A hospital whose privacy is nearly spent: its node refuses a real order before it looks at an image."""

import pytest

from fedclient.ledger import open_ledger
from shared_models.files import read_lines
from simulations.demo import command
from simulations.phantoms import PhantomPlan, phantom
from tests.processes.deployment import deployed, until

STUDY = """
name = "budget"
[model]
features = [4, 4, 8, 8, 8, 4]
groups = 2
[preprocess]
size = [32, 32]
[train]
local_steps = 2
batch_size = 2
optimizer = "sgd"
precision = "float32"
[rounds]
count = 1
quorum = 1
deadline_s = 180
[strategy]
weighting = "uniform"
[evaluate]
every = 0
[protect.privacy]
noise_multiplier = 2.0
sample_rate = 0.5
"""


@pytest.mark.process
def test_a_node_refuses_a_study_that_would_exceed_its_budget_and_touches_no_image(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=2, train=3, val=1, test=1, slices=2, size=32))
    study = tmp_path / "budget.toml"
    study.write_text(STUDY)
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south")) as here:
        for name, most in (("north", "20"), ("south", "0.5")):
            settings = here.site(name) / "site.toml"
            settings.write_text(settings.read_text().replace("least_cohort = 2", "least_cohort = 1"))
            command(tmp_path, ["fedclient", "budget", "--epsilon", most, "--site", str(here.site(name))])
        here.fedserver("run", str(study), "--name", "first", "--no-wait")
        until(lambda: here.run("first")["state"] == "finished", 300, "the run finished without south", logs)
        (line,) = [x for x in read_lines(here.run_folder("first").metrics) if x["round"] == 1 and not x.get("final")]
        assert set(line["sites"]) == {"north"}
        assert line["left_out"]["south"] == {"state": "refused", "reason": "DP_BUDGET_EXHAUSTED"}
        assert open_ledger(here.site("south")).accounts()[0].spends == ()
        assert not list((here.site("south") / "cache").rglob("*.safetensors"))
        assert sum(spend.steps for spend in open_ledger(here.site("north")).accounts()[0].spends) == 2
