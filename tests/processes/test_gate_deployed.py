"""A hospital whose data are not fit: its node refuses by itself, the others go on, and a waiver lets it in."""

from typing import Any

import nibabel
import numpy as np
import pytest

from shared_models.files import read_lines, write_atomic
from simulations.demo import command
from simulations.phantoms import PhantomPlan, nifti, phantom
from tests.processes.deployment import deployed, until

STUDY = """
name = "gate"
[model]
features = [4, 4, 8, 8, 8, 4]
groups = 2
[preprocess]
size = [64, 64]
[train]
local_steps = 2
batch_size = 4
[rounds]
count = 1
quorum = 1
deadline_s = 120
"""


@pytest.mark.process
def test_a_node_refuses_to_train_on_bad_data_until_a_waiver_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = phantom(tmp_path / "data", PhantomPlan(sites=2, train=3, val=1, test=1, slices=2, size=64))
    spoilt = sorted((data / "north" / "images").iterdir())[0]
    image: Any = nibabel.load(spoilt)
    write_atomic(spoilt, nifti(np.full(image.shape, -1000, np.int16), image.affine))
    study = tmp_path / "gate.toml"
    study.write_text(STUDY)
    logs = tmp_path / "d"
    with deployed(logs, data, ("north", "south")) as here:
        for name in here.sites:  # which want a round of two by themselves
            settings = here.site(name) / "site.toml"
            settings.write_text(settings.read_text().replace("least_cohort = 2", "least_cohort = 1"))
        here.fedserver("run", str(study), "--name", "first", "--no-wait")
        until(lambda: here.run("first")["state"] == "finished", 240, "the run finished without north", logs)
        (line,) = [x for x in read_lines(here.run_folder("first").metrics) if x["round"] == 1 and not x.get("final")]
        assert set(line["sites"]) == {"south"}
        assert line["left_out"]["north"] == {"state": "refused", "reason": "DATA_NOT_READY"}

        site = here.site("north")
        refused = [x for x in read_lines(site / "gate" / "log.jsonl") if x["event"] == "refused"]
        assert refused[0]["codes"] == {"INTENSITY_INVALID": 1}
        reason = ["--reason", "an empty scan, kept on purpose"]
        command(tmp_path, ["fedclient", "waive", "INTENSITY_INVALID", *reason, "--site", str(site)])
        here.fedserver("run", str(study), "--name", "second", "--new", "--no-wait")
        until(lambda: here.run("second")["state"] == "finished", 240, "the second run finished", logs)
        (line,) = [x for x in read_lines(here.run_folder("second").metrics) if x["round"] == 1 and not x.get("final")]
        assert set(line["sites"]) == {"north", "south"}
        assert read_lines(site / "gate" / "log.jsonl")[-1]["event"] == "used"
