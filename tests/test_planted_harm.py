"""Two small hospitals in a federation, one of which draws otherwise: its page flags the harm, the other's does not."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from fedclient.data.images import read_image, read_labels
from shared_models.files import read_json, write_atomic
from shared_models.study import Evaluate, Model, Preprocess, Rounds, Study, Task, Train
from simulations.compare import Asked, compare
from simulations.compare_page import harmed, write_all
from simulations.phantoms import PhantomPlan, nifti, phantom
from simulations.run import Machine, node_configs

pytestmark = pytest.mark.usefixtures("settings_of_torch")

STUDY = Study(
    name="planted",
    seed=2,  # the second hospital gains by 0.03 and more, so that it does as well where a processor rounds otherwise
    task=Task(loss="dice_bce"),
    model=Model(features=(8, 8, 8, 8, 8, 8), groups=4),
    preprocess=Preprocess(size=(32, 32)),
    train=Train(local_steps=4, batch_size=8, learning_rate=1e-2, deterministic=True),
    rounds=Rounds(count=15),
    evaluate=Evaluate(every=0),
)
PLAN = PhantomPlan(sites=("north", "south", "west"), train=6, val=0, test=8, slices=2, size=32, shift="image")
ODD, PIXELS = "west", 3  # who draws lungs so much wider
SMALL = {"south", "west"}  # each trains on one patient


def planted(folder: Path) -> Path:
    """The phantom with exact labels, but for one hospital, whose lungs are 3 of 32 pixels wider all round."""
    data = phantom(folder, PLAN, processes=1)
    rows = list(csv.DictReader((data / "manifest.csv").read_text().splitlines()))
    for row in rows:
        if row["site"] == ODD:
            mask, image = data / row["mask"], read_image(data / row["image"])
            planes = [binary_dilation(plane == 1, iterations=PIXELS) for plane in read_labels(mask).transpose(2, 0, 1)]
            write_atomic(mask, nifti(np.stack(planes, axis=2).astype(np.uint8), image.affine_ras))
    training = {site: [row for row in rows if row["site"] == site and row["split"] == "train"] for site in SMALL}
    spare = [row for of in training.values() for row in of[1:]]
    with (data / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(row for row in rows if row not in spare)
    return data


def test_the_hospital_that_federation_harms_is_flagged_and_the_one_that_it_helps_is_not(tmp_path):
    how = Machine(device="cpu")
    nodes = node_configs(tmp_path / "out" / "planted", [planted(tmp_path / "data")], how, None)
    results = compare([Asked(STUDY, nodes)], {"fedavg": {}}, 1, tmp_path / "out", how, lambda _: None, lambda *_: None)
    write_all(results, tmp_path / "out")
    study = results["studies"]["planted"]
    verdicts = {
        site: {line["kind"]: line for line in lines if line["kind"] == "federated"}["federated"]
        for site, lines in study["worth"].items()
    }
    assert verdicts[ODD]["verdict"] == "harmed"
    assert verdicts[ODD]["high"] < -0.2, "by far"
    assert verdicts["south"]["verdict"] in ("gains", "no clear difference")
    flags = {line["site"] for line in harmed(study)}
    assert ODD in flags
    assert "south" not in flags

    assert read_json(tmp_path / "out" / "results.json")["studies"]["planted"]["worth"][ODD]
    report = (tmp_path / "out" / "report.html").read_text()
    assert f"{ODD} by fedavg" in report
    pages = {site: (tmp_path / "out" / "sites" / "planted" / f"{site}.html").read_text() for site in nodes}
    answers = {site: page.partition('<p class="card">')[2].partition("</p>")[0] for site, page in pages.items()}
    assert "Keep your own model." in answers[ODD]
    assert answers[ODD].endswith('<span class="flag">harmed</span>')
    assert "Keep your own model." not in answers["south"]
    assert "flag" not in answers["south"]
    assert all(other not in pages[ODD] for other in ("north", "south"))
