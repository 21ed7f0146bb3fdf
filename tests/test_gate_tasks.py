"""The readiness gate for tasks without masks: classes, follow-up and lesions are read as training reads them."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedclient.gate import ready as gate
from fedclient.gate.card import card_of
from fedclient.gate.facts import Needs, needs_of
from fedclient.gate.run import Checked, check
from fedclient.site import Site
from shared_models.errors import OrderRefused
from shared_models.files import write_atomic
from shared_models.study import Model, Study, Task, canonical, sha256
from shared_models.task_table import Covariate
from shared_models.wire import Order
from simulations.bench.gate import site_of
from simulations.fixtures.sown import Set, person

CLASSES = Study(
    "told", task=Task(kind="classification", labels=("benign", "malignant"), loss="ce"), model=Model("resnet18")
)
TABLE = Study(
    "foretold",
    task=Task(
        kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 300.0),
        covariates=(Covariate("age"),),
    ),
    model=Model("mlp", features=(), norm="none"),
)  # fmt: skip
LESIONS = Study("found", task=Task(kind="detection", labels=("nodule",), loss="centre"))


def images(root: Path, labels: list[str]) -> Site:
    """Sound images with a class each, the last to test on."""
    made = Set(root / "data", columns=("patient_id", "image", "mask", "split", "label"))
    for n, label in enumerate(labels):
        made.nifti(n, split="train" if n < len(labels) - 1 else "test")
        made.rows[-1] |= {"label": label, "mask": ""}
    return replace(site_of(made.finish(), root / "site"), deployed=True, salt="secret", smallest_count=11)


def table(root: Path, rows: list[str]) -> Site:
    write_atomic(root / "data" / "manifest.csv", "\n".join(["patient_id,split,time,event,age", *rows, ""]).encode())
    return replace(site_of(root / "data", root / "site"), deployed=True, salt="secret", smallest_count=11)


SOUND = [f"p{n},{'test' if n > 10 else 'train'},{50 + n},{n % 2},60" for n in range(14)]


def of(found: Checked) -> list[tuple[str, str, int]]:
    return [(f.code, f.severity, f.row) for f in found.findings if f.code != "DATASET_TOO_SMALL"]


def test_classes_that_the_study_knows_are_ready(tmp_path: Path) -> None:
    found = check(images(tmp_path, ["benign", "malignant", "benign"]), needs_of(CLASSES))
    assert found.ready
    assert of(found) == []
    assert found.plain()["splits"]["train"]["labelled"] == 2


def test_a_class_that_the_study_does_not_know_blocks(tmp_path: Path) -> None:
    found = check(images(tmp_path, ["benign", "malignent", "malignant", "benign"]), needs_of(CLASSES))
    assert of(found) == [("LABEL_VALUES", "block", 3)]


def test_a_class_that_no_training_case_shows_is_told(tmp_path: Path) -> None:
    found = check(images(tmp_path, ["benign", "benign", "malignant"]), needs_of(CLASSES))
    assert of(found) == [("CLASS_ABSENT", "warn", 0)]


def test_an_image_without_a_class_takes_no_part_and_stops_nobody(tmp_path: Path) -> None:
    site = images(tmp_path, ["benign", "", "malignant", "benign"])
    found = check(site, needs_of(CLASSES))
    assert found.ready
    assert of(found) == [("LABEL_MISSING", "warn", 3)]
    assert found.plain()["splits"]["train"] == {"cases": 3, "patients": 3, "labelled": 2}


def test_a_study_of_a_table_alone_passes_the_gate_of_a_deployed_site(tmp_path: Path) -> None:
    site = table(tmp_path, SOUND)
    assert of(check(site, needs_of(TABLE))) == []
    text = canonical(TABLE).decode()
    order = Order("train", "run-1", 1, 1, text, sha256(TABLE), "b" * 64)
    gate.ready(order, site, TABLE, processes=0)  # raises where it is not ready


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        ("p20,train,-3,1,60", ("LABEL_VALUES", "block", 16)),
        ("p20,train,30,2,60", ("LABEL_VALUES", "block", 16)),
        ("p20,train,30,1,", ("LABEL_MISSING", "warn", 16)),
        ("p20,train,30,1,old", ("LABEL_VALUES", "block", 16)),
        ("p20,train,,1,60", ("LABEL_MISSING", "warn", 16)),
    ],
)
def test_a_row_that_cannot_be_is_told_by_its_number(tmp_path: Path, row: str, finding: tuple[str, str, int]) -> None:
    assert of(check(table(tmp_path, [*SOUND, row]), needs_of(TABLE))) == [finding]


def test_patients_with_equal_rows_are_no_copies(tmp_path: Path) -> None:
    rows = [f"p{n},{'test' if n > 10 else 'train'},50,1,60" for n in range(14)]
    assert of(check(table(tmp_path, rows), needs_of(TABLE))) == []


def test_a_broken_row_stops_an_order_until_it_is_mended(tmp_path: Path) -> None:
    site = table(tmp_path, [*SOUND, "p20,train,-3,1,60"])
    order = Order("train", "run-1", 1, 1, canonical(TABLE).decode(), sha256(TABLE), "b" * 64)
    with pytest.raises(OrderRefused, match=r"LABEL_VALUES \(1\)"):
        gate.ready(order, site, TABLE, processes=0)


def test_without_a_study_a_table_is_looked_at_for_its_splits_alone(tmp_path: Path) -> None:
    assert of(check(table(tmp_path, SOUND), Needs())) == []


def test_a_study_of_images_is_told_that_a_table_has_none(tmp_path: Path) -> None:
    found = check(table(tmp_path, SOUND[:3]), needs_of(CLASSES))
    assert {code for code, _, _ in of(found)} >= {"FILE_MISSING"}


def test_the_card_of_a_table_tells_how_many_had_the_event_and_nothing_of_images(tmp_path: Path) -> None:
    rows = [f"p{n},{'test' if n > 29 else 'train'},{50 + n},{n % 2},60" for n in range(60)]
    tables = card_of(check(table(tmp_path, rows), needs_of(TABLE)), 11)["tables"]
    assert tables["label death"] == {"with": 30, "without": 30}
    assert "modality" not in tables


def lesions(root: Path, rows: list[tuple[str, tuple[float, float, float]]]) -> Site:
    site = images(root, [""] * 3)
    lines = [f"{who},{x},{y},{z},8" for who, (x, y, z) in rows]
    write_atomic(site.data / "nodules.csv", "\n".join(["patient_id,x_mm,y_mm,z_mm,diameter_mm", *lines, ""]).encode())
    return site


def middle(number: int) -> tuple[float, float, float]:
    volume = person(number).volume
    x, y, z, _ = volume.affine_ras @ [*(n / 2 for n in volume.voxels.shape[1:]), 1]
    return -x, -y, z


def test_lesions_in_their_images_are_ready(tmp_path: Path) -> None:
    found = check(lesions(tmp_path, [("p01", middle(0))]), needs_of(LESIONS))
    assert found.ready
    assert of(found) == []


def test_a_lesion_outside_its_image_blocks(tmp_path: Path) -> None:
    x, y, z = middle(1)
    found = check(lesions(tmp_path, [("p01", middle(0)), ("p02", (x, y, z + 900))]), needs_of(LESIONS))
    assert of(found) == [("LABEL_GEOMETRY_MISMATCH", "block", 3)]


def test_no_lesion_in_any_training_case_is_told(tmp_path: Path) -> None:
    assert of(check(lesions(tmp_path, [("p03", middle(2))]), needs_of(LESIONS))) == [("CLASS_ABSENT", "warn", 0)]
