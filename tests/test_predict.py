"""Prediction: marks on the source's own grid, what is measured of them, what is odd, and what cannot be read."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from fedclient.cli import app
from fedclient.data.dicom import read_series
from fedclient.data.volume import PICTURE_PIXELS, Volume
from fedclient.predict import case
from fedclient.predict.blocks import opened
from fedclient.predict.case import Prediction, painting_order, predict_case
from fedclient.predict.inputs import Source, Unread, list_inputs
from fedclient.predict.measure import Measure, longest_mm
from fedclient.predict.outputs import FORMATS, write_case
from fedclient.predict.run import Done, Failed, predict_all, predict_table
from fedclient.predict.uncertainty import entropy, variants
from shared_models.drift import profile_of, reference
from shared_models.errors import ImageUnreadable, StateInvalid
from shared_models.study import Augment, Evaluate, Model, Preprocess, Study, Task
from shared_models.task_table import Covariate, Region
from simulations.fixtures.dicom import write_dicom_series
from simulations.fixtures.faults import FAULTS
from simulations.fixtures.sown import Set
from tests.dicoms import NAME, putting, set_pixels, write_series
from tests.marking import DARK_HU, LUNG, chest_hu, dark, model

AFFINE = np.diag([0.8, 0.7, 2.5, 1.0])


def volume(voxels: Any, modality: str | None = "CT", affine: Any = AFFINE) -> Volume:
    return Volume(np.ascontiguousarray(voxels, np.float32), affine.copy(), modality)


def nifti(path: Path, values: Any, affine: Any = AFFINE) -> Path:
    image: Any = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine, code="scanner")
    nibabel.save(image, path)
    return path


def sources(*paths: Path, study: Study = LUNG) -> list[Source | Unread]:
    return list_inputs(paths, study).found


def only(path: Path, study: Study = LUNG) -> Source:
    (found,) = sources(path, study=study)
    assert isinstance(found, Source), found
    return found


# ---- masks and measures ----


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_what_is_marked_lies_where_the_voxels_lie_whichever_way_a_series_was_stored(directions, tmp_path):
    hu = chest_hu()
    write_dicom_series(tmp_path, volume(hu), directions=directions, shuffled=True)
    found = predict_case(model(), tmp_path)
    assert np.array_equal(found.mask, (hu[0] < DARK_HU).astype(np.uint8))
    assert np.allclose(found.grid.affine_ras, AFFINE)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_long_series_in_runs_gives_what_it_gives_as_one_volume(direction, tmp_path):
    hu = chest_hu((40, 36, 37))
    written = write_dicom_series(tmp_path, volume(hu), directions=(1, 1, direction))
    grid, runs = opened(only(tmp_path), LUNG)
    assert grid is not None
    assert max(run.voxels.shape[3] for run in runs) <= 16
    in_runs, whole = predict_case(model(), tmp_path), predict_case(model(), volume(hu))
    assert len(written.paths) == 37
    assert np.array_equal(in_runs.mask, whole.mask)
    assert in_runs.answers == whole.answers
    assert in_runs.key.k == whole.key.k
    assert np.array_equal(in_runs.key.voxels, hu[0, :, :, whole.key.k])
    counted = ("size.planes", "spacing.planes", "share.lung", "lesions.lung", "inside.lung", "chance.lung")
    assert {name: in_runs.cells[name] for name in counted} == {name: whole.cells[name] for name in counted}


def test_a_long_series_at_45_degrees_lies_the_same_way_in_all_of_its_planes(tmp_path):
    """Which axis of the patient a row runs along, rounding decides: the second half of the slices has it otherwise."""

    def askew(k: int, data: Any) -> None:
        angle = np.pi / 4 + (1e-6 if k < 20 else -1e-6)
        data.ImageOrientationPatient = [
            f"{c:.8f}" for c in (np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0)
        ]
        data.PixelSpacing = [0.7, 0.7]
        set_pixels(data, (np.arange(256).reshape(16, 16) * 13 + k * 131).astype(np.uint16) % 4096, bits=12)

    paths = write_series(tmp_path, 37, edit=askew)
    found, whole = predict_case(model(), tmp_path), read_series(paths)
    assert np.array_equal(found.mask, whole.voxels[0] < DARK_HU)
    assert np.allclose(found.grid.affine_ras, whole.affine_ras)


def test_what_is_kept_of_a_long_series_does_not_grow_with_it(tmp_path):
    write_dicom_series(tmp_path, volume(chest_hu((40, 36, 90))))
    grid, runs = opened(only(tmp_path), LUNG)
    assert grid is not None
    tally = case._Tally(model(), grid, False)
    for run in runs:
        tally.add(run)
    held = [*(each.voxels for each in tally.looked), *tally.examples]
    assert all(each.base is None for each in held)
    assert sum(each.shape[3] for each in held[: len(tally.looked)]) <= case.LOOKED_AT + 15
    assert tally.marks is not None
    assert sum(len(each) for each in tally.marks.packed) < 90 * 40 * 36 / 8


HOLES = """
import numpy as np
from fedclient.predict.heap import give_back
def rss_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
given = give_back()
np.ones(3 << 20).sum()  # 24 MiB, after which glibc by itself would put smaller arrays into its heap
before = rss_mib()
planes = [np.ones(1 << 18) for _ in range(20)]  # 2 MiB each
kept = bytes(200_000)  # above them in such a heap
del planes
print(given, rss_mib() - before < 10)
"""


def test_planes_go_back_to_the_system_though_small_things_are_kept_behind_them():
    told = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout.split()
    if told[0] == "False":
        pytest.skip("the C library is not glibc")
    assert told == ["True", "True"]


def test_volume_and_diameter_are_those_computed_by_hand():
    measure = Measure((0.5, 2.0, 3.0))
    planes = np.zeros((3, 12, 8), np.bool_)
    planes[0, 1:11, 2] = True  # ten voxels of 0.5 mm in a row: 5 mm
    planes[1, 1, 2:6] = True  # goes on above it: four of 2 mm, 8 mm
    planes[2, 8, 7] = True  # alone: 0.5 mm its shorter side
    for plane in planes:
        measure.add(plane)
    first, second = measure.parts
    assert (first.voxels, first.volume_mm3, first.longest_mm, first.first, first.last) == (14, 42.0, 8.0, 0, 1)
    assert (second.voxels, second.longest_mm, second.first) == (1, 0.5, 2)
    assert measure.volume_mm3 == 45.0


def test_a_diameter_runs_askew_too():
    measure = Measure((1.0, 1.0, 1.0))
    measure.add(np.eye(4, dtype=np.bool_) | np.eye(4, k=1, dtype=np.bool_))
    assert measure.parts[0].longest_mm == pytest.approx(3 * 2**0.5 + 1)  # centres 3 and 3 apart, and one voxel more


def test_parts_of_random_marks_are_those_of_scipy_and_their_diameter_that_of_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        marked = rng.random((7, 8, 5)) < rng.uniform(0.2, 0.7)
        measure = Measure((1.0, 1.0, 1.0))
        for k in range(5):
            measure.add(marked[:, :, k])
        pieces: Any = ndimage.label(marked)[0]
        assert [part.voxels for part in measure.parts] == sorted(np.bincount(pieces.ravel())[1:].tolist())[::-1]
        for k in range(5):
            numbered = measure.numbered(k, marked[:, :, k])
            assert len(set(zip(numbered.ravel(), pieces[:, :, k].ravel(), strict=True))) == len(np.unique(numbered))
        at = np.argwhere(marked[:, :, 0]) * (0.7, 1.3)
        if len(at) > 1:
            away = np.sqrt(((at[:, None] - at) ** 2).sum(axis=2)).max()
            assert away + 0.7 - 1e-9 <= longest_mm(marked[:, :, 0], (0.7, 1.3)) <= away + 1.3 + 1e-9


def test_parts_that_meet_only_later_are_one_part_under_one_number():
    measure = Measure((1.0, 1.0, 1.0))
    apart, joined = np.zeros((5, 5), np.bool_), np.zeros((5, 5), np.bool_)
    apart[0, 0] = apart[0, 4] = apart[4, 4] = True
    joined[0] = True
    for plane in (apart, joined):
        measure.add(plane)
    assert [part.voxels for part in measure.parts] == [7, 1]
    assert measure.numbered(0, apart)[[0, 0, 4], [0, 4, 4]].tolist() == [1, 1, 2]


def test_a_nifti_mask_lies_on_the_very_grid_of_its_file(tmp_path):
    stored = chest_hu()[0].transpose(1, 0, 2)[:, ::-1].astype(np.int16)
    affine = np.array([[0, -0.8, 0, 3.0], [0.7, 0, 0, -4.0], [0, 0, 2.5, 5.0], [0, 0, 0, 1]])
    path = nifti(tmp_path / "a.nii.gz", stored, affine)
    found = predict_case(model(), path)
    write_case(found, "a", tmp_path, ("nifti",))
    mask: Any = nibabel.load(tmp_path / "a" / "mask.nii.gz")
    assert np.allclose(mask.affine, affine)
    assert np.array_equal(np.asarray(mask.dataobj), (stored < DARK_HU).astype(np.uint8))


def test_a_picture_gets_a_mask_of_its_own_rows_and_columns_and_no_millimetres(tmp_path):
    study = replace(LUNG, modality="xray", preprocess=Preprocess((32, 32), "crop_pad", "percentile"))
    pixels = np.full((20, 30), 200, np.uint8)
    pixels[4:9, 7:16] = 10
    Image.fromarray(pixels).save(tmp_path / "film.png")
    found = predict_case(model(study, lambda images: -images.astype(np.float32)), tmp_path / "film.png")
    written, _ = write_case(found, "film", tmp_path, FORMATS)
    assert sorted(written) == ["mask.png", "overlay.png", "result.json"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "film" / "mask.png")) > 0, pixels < 100)
    (answer,) = json.loads((tmp_path / "film" / "result.json").read_bytes())["answers"]
    assert answer["pixels"] == 45
    assert "volume_mm3" not in answer


def test_a_region_is_painted_over_the_one_that_holds_it():
    regions = (Region("core", ("a",)), Region("whole", ("a", "b")))
    task = Task(labels=("a", "b"), loss="dice_bce", regions=regions)
    study = replace(LUNG, task=task)
    both = model(study, lambda images: np.concatenate([dark(images + np.float32(0.2)), dark(images)], axis=1))
    hu = chest_hu()
    hu[hu < DARK_HU] = np.where(np.indices(hu.shape)[1][hu < DARK_HU] < 20, -980, -800)
    assert painting_order(study) == [1, 0]
    assert np.array_equal(predict_case(both, volume(hu)).mask, np.select([hu[0] < -900, hu[0] < DARK_HU], [1, 2], 0))


# ---- classes, prognosis, calibration ----

CLASSES = Study(
    name="classes", task=Task(kind="classification", labels=("benign", "malign"), loss="bce"),
    model=Model("resnet18"), preprocess=Preprocess((32, 32), "crop_pad"),
)  # fmt: skip


def level(images: Any) -> Any:
    """Two logits: the mean of an example less a half, and its opposite, times 8."""
    mean = images.astype(np.float32).mean(axis=(1, 2, 3))
    return np.stack([mean - 0.5, 0.5 - mean], axis=1).astype(np.float32) * 8


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_a_case_of_many_planes_has_the_mean_of_their_probabilities():
    hu = np.stack([np.full((32, 32), -650.0), np.full((32, 32), 400.0)], axis=2)[None]  # means of 0.25 and 1
    first, second = predict_case(model(CLASSES, level), volume(hu)).answers
    assert first.chance == pytest.approx(sigmoid([-2, 4]).mean(), abs=1e-5)
    assert second.chance == pytest.approx(1 - first.chance, abs=1e-5)
    assert (first.called, second.called) == (True, False)


def test_probabilities_are_calibrated_by_the_temperature_of_the_release():
    hu = np.full((1, 32, 32, 1), 400.0)
    cool = model(CLASSES, level, temperatures=np.array([2.0, 1.0], np.float32))
    first, second = predict_case(cool, volume(hu)).answers
    assert first.chance == pytest.approx(float(sigmoid(4 / 2)), abs=1e-5)
    assert second.chance == pytest.approx(float(sigmoid(-4)), abs=1e-5)


def test_what_is_called_is_what_was_called_when_the_model_was_tested_whatever_the_temperature():
    study = replace(CLASSES, evaluate=Evaluate(threshold=0.3))
    hu = np.full((1, 32, 32, 1), -545.0)  # an eighth less than half of the window: logits of -1.4 and 1.4
    warm = model(study, level, temperatures=np.array([4.0, 4.0], np.float32))
    first, second = predict_case(warm, volume(hu)).answers
    assert first.chance == pytest.approx(float(sigmoid(-1.4 / 4)), abs=1e-5)
    assert first.chance > 0.3 > sigmoid(-1.4)
    assert (first.called, second.called) == (False, True)


def test_calibration_moves_no_mask():
    hu = chest_hu()
    warm = predict_case(model(temperatures=np.array([5.0], np.float32)), volume(hu))
    plain = predict_case(model(), volume(hu))
    assert np.array_equal(warm.mask, plain.mask)
    assert warm.answers[0].chance < plain.answers[0].chance
    assert warm.cells == plain.cells  # drift is told of what the network answers


def test_a_prognosis_tells_that_the_event_has_come_by_each_day():
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0))
    study = replace(CLASSES, task=task)
    (answer,) = predict_case(model(study, level), volume(np.full((1, 32, 32, 1), 400.0))).answers
    hazards = sigmoid([4, -4])
    assert answer.by_day[100.0] == pytest.approx(hazards[0], abs=1e-5)
    assert answer.by_day[200.0] == pytest.approx(1 - (1 - hazards[0]) * (1 - hazards[1]), abs=1e-5)


def test_how_sure_an_answer_is_cannot_be_asked_of_a_release_for_tables(tmp_path, monkeypatch):
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0),
                covariates=(Covariate("age", 50.0, 10.0),))  # fmt: skip
    tables = model(Study(name="t", task=task, model=Model("mlp", features=(), norm="none")))
    monkeypatch.setattr("shared_models.release.open_release", lambda *_, **__: None)
    monkeypatch.setattr("fedclient.trust.Watch.warnings", lambda _: [])
    monkeypatch.setattr("fedclient.predict.model.load_model", lambda *_: tables)
    (tmp_path / "people.csv").write_text("name,age\nx,60\n")
    words = ["predict", "r", str(tmp_path / "people.csv"), "-o", str(tmp_path / "out"), "--research", "--uncertainty"]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 1
    assert "--uncertainty: is of images" in ran.output
    assert not (tmp_path / "out").exists()


def test_rows_of_a_table_get_their_risks_and_one_without_a_number_fails_alone(tmp_path):
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0),
                covariates=(Covariate("age", 50.0, 10.0),))  # fmt: skip
    study = Study(name="t", task=task, model=Model("mlp", features=(), norm="none"))
    twice = model(study, lambda table: np.repeat(table, 2, axis=1).astype(np.float32))
    (tmp_path / "people.csv").write_text(f"name,age\n{NAME},60\n{NAME},\n")
    done, failed = predict_table(twice, [tmp_path / "people.csv"], tmp_path / "out", ("json", "csv"))
    assert isinstance(done, Done)
    assert isinstance(failed, Failed)
    assert failed.code == "LABEL_MISSING"
    assert float(done.rows[0]["chance"]) == pytest.approx(1 - (1 - sigmoid(1)) ** 2, abs=1e-5)
    assert not any(NAME in path.read_text() for path in (tmp_path / "out").iterdir())


def test_a_number_below_another_column_is_not_predicted_on(tmp_path):
    """As in training, spaces around the name of a column are none of it; 12,5 without quotes is two fields."""
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0),
                covariates=(Covariate("age", 50.0, 10.0),))  # fmt: skip
    study = Study(name="t", task=task, model=Model("mlp", features=(), norm="none"))
    twice = model(study, lambda table: np.repeat(table, 2, axis=1).astype(np.float32))
    path = tmp_path / "people.csv"
    path.write_text("score, age ,stage\n1,60,2\n12,5,60,2\n,,\n")
    done, failed = predict_table(twice, [path], tmp_path / "out", ("csv",))
    assert isinstance(done, Done)
    assert float(done.rows[0]["chance"]) == pytest.approx(1 - (1 - sigmoid(1)) ** 2, abs=1e-5)
    assert isinstance(failed, Failed)
    assert (failed.code, failed.why.partition(".")[0]) == ("LABEL_UNREADABLE", "it has 4 fields, the heading 3")
    path.write_text("age,stage,age\n60,2,61\n")
    (failed,) = predict_table(twice, [path], tmp_path / "again", ("csv",))
    assert isinstance(failed, Failed)
    assert "'age' twice" in failed.why


def test_a_stray_quote_in_a_table_takes_no_row_for_text(tmp_path):
    task = Task(kind="prognosis", labels=("death",), loss="hazard", intervals_days=(100.0, 200.0),
                covariates=(Covariate("age", 50.0, 10.0),))  # fmt: skip
    study = Study(name="t", task=task, model=Model("mlp", features=(), norm="none"))
    (tmp_path / "people.csv").write_text(f'age,note\n60,ok\n61,"{NAME}\n62,"\n63,ok\n')
    (failed,) = predict_table(model(study, lambda table: table), [tmp_path / "people.csv"], tmp_path / "out", ("csv",))
    assert isinstance(failed, Failed)
    assert "row 3 is not CSV" in failed.why
    assert NAME not in failed.why


# ---- uncertainty ----


def test_entropy_is_0_for_sure_and_1_for_a_half_and_shannon_s_between():
    half = entropy(np.array([[0.5, 0.25, 1.0]], np.float32), exclusive=False)
    assert half == pytest.approx([1, 0.811278, 0], abs=1e-4)
    third = entropy(np.full((3, 1), 1 / 3, np.float32), exclusive=True)
    assert third == pytest.approx([1], abs=1e-4)


def test_the_picture_is_changed_only_as_the_study_allows_and_what_moves_is_moved_back():
    allowed = replace(LUNG, augment=Augment(flip_left_right=True, shift=0.25, gamma=0.1, brightness=0.1, noise=0.1))
    assert [each.name for each in variants(LUNG, 0)] == ["as it is"]
    found = {each.name: each for each in variants(allowed, 0)}
    assert len(found) == 9
    images = np.arange(64 * 64, dtype=np.float32).reshape(1, 1, 64, 64)
    flipped = found["left and right exchanged"]
    assert np.array_equal(flipped.change(images)[0, 0, 0], images[0, 0, -1])
    assert np.array_equal(flipped.back(flipped.change(images)), images)
    shifted = found["shift, more"]
    assert shifted.change(images)[0, 0, 20, 30] == images[0, 0, 12, 22]
    inner = (0, 0, slice(8, 56), slice(8, 56))
    assert np.array_equal(shifted.back(shifted.change(images))[inner], images[inner])


def test_a_map_of_uncertainty_is_highest_where_the_answer_is_a_half(tmp_path):
    hu = chest_hu()
    hu[0, 20, 20, 2] = DARK_HU  # a logit of 0
    found = predict_case(model(), volume(hu), uncertainty=True)
    write_case(found, "a", tmp_path, ("nifti", "json"))
    image: Any = nibabel.load(tmp_path / "a" / "uncertainty.nii.gz")
    assert np.unravel_index(image.get_fdata().argmax(), hu.shape[1:]) == (20, 20, 2)
    assert image.get_fdata()[20, 20, 2] == pytest.approx(1)
    told = json.loads((tmp_path / "a" / "result.json").read_bytes())["uncertainty"]
    assert told["changes"] == ["as it is"]
    assert told["mean"] == pytest.approx(image.get_fdata().mean(), abs=0.002)


# ---- images of another kind ----


def codes(found: Prediction) -> set[str]:
    return {doubt.code for doubt in found.doubts}


def test_a_ct_of_the_chest_raises_no_doubt(tmp_path):
    write_dicom_series(tmp_path, volume(chest_hu()))
    assert codes(predict_case(model(), tmp_path)) == set()


def test_mr_given_to_a_ct_model_is_flagged_by_its_header_and_without_one_by_its_grey_values(tmp_path):
    mr = np.clip(chest_hu() + 1000, 0, None)
    write_dicom_series(tmp_path / "mr", volume(mr), modality="MR")
    assert "MODALITY_MISMATCH" in codes(predict_case(model(), tmp_path / "mr"))
    path = nifti(tmp_path / "mr.nii", np.clip(mr[0] + 30, 30, None).astype(np.int16))
    assert "MODALITY_MISMATCH" in codes(predict_case(model(), path))


def test_a_radiograph_given_to_a_ct_model_is_flagged(tmp_path):
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(tmp_path / "film.png")
    Image.fromarray((np.arange(900, dtype=np.uint16) * 60).reshape(30, 30)).save(tmp_path / "deep.png")
    for name in ("film.png", "deep.png"):
        assert "MODALITY_MISMATCH" in codes(predict_case(model(), tmp_path / name))


def test_an_image_beyond_every_case_of_the_release_is_flagged_with_its_distance():
    seen = [predict_case(model(), volume(chest_hu(seed=seed))).cells for seed in range(3)]
    known = model(fingerprint=reference([profile_of(LUNG, seen)]))
    assert codes(predict_case(known, volume(chest_hu(seed=9)))) == set()
    odd = predict_case(known, volume(np.where(chest_hu() < DARK_HU, -300, chest_hu() + 700)))
    (doubt,) = [each for each in odd.doubts if each.code == "OUT_OF_DISTRIBUTION"]
    assert doubt.distance is not None
    assert 0 < doubt.distance <= 1
    assert "raw.p50" in doubt.words


def test_an_image_of_a_series_that_holds_several_is_doubted(tmp_path):
    write_series(tmp_path, edit=putting("PatientID", "other", (4, 5)))
    found = [predict_case(model(), source) for source in sources(tmp_path) if isinstance(source, Source)]
    assert [codes(each) for each in found] == [{"SERIES_SEVERAL"}] * 2
    assert "holds 2 images" in found[0].doubts[0].words
    assert "this one has 2 slices" in found[1].doubts[0].words


def test_a_reference_of_another_version_is_a_doubt_about_every_image_and_fails_none():
    older = {"profiles": [{"cases": 12, "counts": {"raw.p10": [12, 0]}}]}
    found = predict_case(model(fingerprint=older), volume(chest_hu()))
    (doubt,) = found.doubts
    assert doubt.code == "REFERENCE_UNKNOWN"
    assert "another study or version" in doubt.words


# ---- inputs ----


def test_a_folder_of_series_and_files_is_a_case_each_and_names_tell_nothing(tmp_path):
    write_dicom_series(tmp_path / NAME / "ct", volume(chest_hu()))
    write_dicom_series(tmp_path / NAME / "other", volume(chest_hu()), series="2")
    nifti(tmp_path / f"{NAME}.nii.gz", chest_hu()[0].astype(np.int16))
    (tmp_path / "notes.txt").write_text(NAME)
    found = list_inputs([tmp_path], LUNG)
    assert [each.name[:6] for each in found.found] == ["series", "series", "image-"]
    assert len({each.name for each in found.found}) == 3
    assert found.passed["not an image"] == 1
    assert NAME not in repr(found)


def test_dicom_files_given_one_by_one_are_put_together_by_their_series(tmp_path):
    paths = write_dicom_series(tmp_path, volume(chest_hu())).paths
    (found,) = sources(*paths[::-1])
    assert isinstance(found, Source)
    assert len(found.files) == 5
    assert np.array_equal(predict_case(model(), found).mask, predict_case(model(), tmp_path).mask)


def test_channels_of_a_case_are_found_by_the_ends_of_their_names(tmp_path):
    study = replace(
        LUNG, channels=("t1", "flair"), modality="mr", preprocess=Preprocess((48, 48), "crop_pad", "zscore")
    )
    for who in ("a", "b"):
        for end in ("flair", "0000"):
            nifti(tmp_path / f"{who}_{end}.nii.gz", chest_hu()[0].astype(np.int16))
    found = sources(tmp_path, study=study)
    first = model(study, lambda images: images[:, :1].astype(np.float32))
    assert len(found) == 2
    assert all(isinstance(each, Source) and len(each.files) == 2 for each in found)
    assert predict_case(first, found[0]).grid.shape == (40, 36, 5)  # type: ignore[arg-type]


def test_a_pipe_is_not_waited_for_and_what_is_not_there_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    nifti(tmp_path / "a.nii", chest_hu()[0].astype(np.int16))
    found = list_inputs([tmp_path, tmp_path / "pipe.nii", tmp_path / "gone.nii"], LUNG)
    assert [type(each) for each in found.found] == [Source, Unread, Unread]
    assert found.passed["no file"] == 1


def test_two_files_of_one_name_in_two_folders_do_not_share_results(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        nifti(tmp_path / folder / "x.nii", chest_hu()[0].astype(np.int16))
    first, second = sources(tmp_path / "a", tmp_path / "b")
    assert first.name != second.name


# ---- many cases, and what is written ----


def test_a_case_that_fails_stops_no_other_and_the_table_tells_of_all(tmp_path):
    good = nifti(tmp_path / "a.nii", chest_hu()[0].astype(np.int16))
    (tmp_path / "b.nii").write_bytes(good.read_bytes()[:2000])
    outcomes = list(predict_all(model(), list_inputs([tmp_path / "b.nii", good], LUNG), tmp_path / "out", ("csv",)))
    assert [type(each) for each in outcomes] == [Failed, Done]
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["IMAGE_UNREADABLE", "ok"]
    voxels = int((chest_hu() < DARK_HU).sum())
    assert float(rows[1]["volume_ml"]) == pytest.approx(voxels * 0.8 * 0.7 * 2.5 / 1000, rel=1e-4)


def test_results_that_are_there_are_not_overwritten_unasked(tmp_path):
    path = nifti(tmp_path / "a.nii", chest_hu()[0].astype(np.int16))
    found, out = predict_case(model(), path), tmp_path / "out"
    write_case(found, "case", out, ("json",))
    with pytest.raises(StateInvalid, match="results already"):
        write_case(found, "case", out, ("json",))
    write_case(found, "case", out, ("nifti",), overwrite=True)
    assert [each.name for each in (out / "case").iterdir()] == ["mask.nii.gz"]


def test_results_that_cannot_be_written_whole_are_not_written(tmp_path, monkeypatch):
    found = predict_case(model(), nifti(tmp_path / "a.nii", chest_hu()[0].astype(np.int16)))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedclient.predict.outputs.write_json", full)
    with pytest.raises(OSError, match="No space"):
        write_case(found, "case", tmp_path / "out", ("nifti", "json"))
    assert list((tmp_path / "out").iterdir()) == []


REFUSED = (
    "IMAGE_UNREADABLE", "DICOM_UNREADABLE", "DICOM_CODEC_MISSING", "DICOM_MOSAIC", "UNSAFE_FORMAT", "INPUT_TOO_LARGE",
    "SERIES_GAP", "SERIES_IRREGULAR", "SERIES_TILT", "SERIES_DUPLICATE", "GEOMETRY_MISSING", "GEOMETRY_INVALID",
)  # fmt: skip
HOSTILE = [fault for fault in FAULTS if fault.code in REFUSED and not fault.whole]


@pytest.mark.parametrize("fault", HOSTILE, ids=lambda fault: fault.name)
def test_a_hostile_file_is_an_error_of_its_own_and_no_crash(fault, tmp_path):
    fault.make(Set(tmp_path / "data"))
    study = replace(LUNG, preprocess=Preprocess((64, 64)))
    outcomes = list(predict_all(model(study), list_inputs([tmp_path / "data"], study), tmp_path / "out", ("csv",)))
    failed = [each for each in outcomes if isinstance(each, Failed)]
    assert failed, outcomes
    assert all(str(tmp_path) not in each.why for each in failed)


def test_an_image_of_the_wrong_number_of_channels_is_refused():
    with pytest.raises(ImageUnreadable, match="2 channels"):
        predict_case(model(), volume(np.concatenate([chest_hu()] * 2)))


def test_a_picture_is_shown_as_it_is_displayed_and_has_no_scale():
    still = Volume(np.zeros((1, 4, 6, 1), np.float32), np.eye(4), None, voxel_of_pixel=PICTURE_PIXELS)
    assert predict_case(model(), still).grid.shape == (4, 6, 1)
