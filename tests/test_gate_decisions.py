"""What a person decides of findings holds for that and for nothing else; no finding hides a graver one."""

import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fedclient.data.cases import Case, Split, _of_objects, state_of
from fedclient.data.manifest import read_manifest
from fedclient.data.volume import Volume
from fedclient.gate.across import _copies
from fedclient.gate.facts import Facts, Needs
from fedclient.gate.ready import _path, _Used
from fedclient.gate.run import check, standing
from fedclient.gate.waivers import waive
from fedclient.site import Site
from shared_models.errors import ImageUnreadable, OrderRefused
from shared_models.files import write_atomic
from shared_models.parse import parse_json
from simulations.bench.gate import site_of
from simulations.fixtures.sown import LUNG, person
from simulations.phantoms import nifti
from tests.test_gate import healthy, order, ready


def deployed(data: Path, folder: Path) -> Site:
    return replace(site_of(data, folder), deployed=True, salt="secret", smallest_count=11)


def save(path: Path, voxels: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images with a class each, and a row whose image is gone."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for number in range(3):
        save(data / f"{number}.nii", rng.integers(-1000, 400, (24, 24, 8)).astype(np.int16))
    (data / "labels.csv").write_text("image,label,patient_id\n0.nii,a,p0\n1.nii,b,p1\n2.nii,a,p2\ngone.nii,a,p3\n")
    return data


def test_a_row_without_its_image_blocks_until_its_case_is_left_out(pictures, tmp_path):
    site = deployed(pictures, tmp_path / "site")
    missing = [found for found in check(site, Needs()).blocking if found.code == "FILE_MISSING"]
    assert len(missing) == 1
    waive(site.folder, "FILE_MISSING", missing[0].case, "this one has gone for good", exclude=True)
    assert not check(site, Needs()).blocking
    assert standing(site, Needs()).blocking == {}


def test_a_researcher_is_told_which_case_stops_the_simulation_and_of_no_command_of_a_hospital(pictures, tmp_path):
    with pytest.raises(OrderRefused, match=r"FILE_MISSING \(1\)\. FILE_MISSING: row 5: `image`.*Mend these") as told:
        ready(order(), replace(site_of(pictures, tmp_path / "work"), deployed=False), LUNG)
    assert "fedclient" not in str(told.value)


def test_a_change_that_nobody_waived_stops_every_later_order_too(tmp_path):
    healthy(tmp_path).finish()
    site = deployed(tmp_path / "data", tmp_path / "site")
    ready(order(), site, LUNG)
    for one, other in ((0, 7), (1, 8)):
        voxels = person(other).volume.voxels[0].astype(np.int16)
        write_atomic(site.data / f"images/{one}.nii.gz", nifti(voxels, person(one).volume.affine_ras))
    with pytest.raises(OrderRefused, match=r"DATASET_CHANGED \(2\)"):
        ready(order(round_number=2), site, LUNG)
    changed = sorted(key for key, state in check(site, Needs()).states.items() if state != before(site)[key])
    assert len(changed) == 2
    waive(site.folder, "DATASET_CHANGED", changed[0], "looked at by hand", exclude=False)
    for number in (3, 4):
        with pytest.raises(OrderRefused, match=r"DATASET_CHANGED \(1\)"):
            ready(order(round_number=number), site, LUNG)
    waive(site.folder, "DATASET_CHANGED", changed[1], "looked at by hand", exclude=False)
    ready(order(round_number=5), site, LUNG)


def test_data_mended_after_a_refused_first_order_have_not_changed_during_the_run(tmp_path):
    healthy(tmp_path).finish()
    site = deployed(tmp_path / "data", tmp_path / "site")
    for name in ("manifest.csv", "images/0.nii.gz"):
        sound = (site.data / name).read_bytes()
        write_atomic(site.data / name, b"patient_id\np0\n" if name == "manifest.csv" else b"no image")
        with pytest.raises(OrderRefused):
            ready(order(), site, LUNG)
        write_atomic(site.data / name, sound)
    ready(order(), site, LUNG)
    assert len(before(site)) == 4


def before(site: Site) -> dict[str, str]:
    return dict(parse_json(_Used, _path(site, "lung-1").read_bytes(), "").states)


def test_another_mask_of_the_same_size_and_time_is_another_state_and_a_folder_that_moved_is_none(tmp_path):
    data = tmp_path / "data"
    save(data / "image.nii", np.zeros((8, 8, 2), np.int16))
    for rater, rows in (("r1", slice(0, 2)), ("r2", slice(4, 6))):
        drawn = np.zeros((8, 8, 2), np.uint8)
        drawn[rows] = 1
        save(data / rater / "p.nii", drawn)
        os.utime(data / rater / "p.nii", (1_700_000_000, 1_700_000_000))

    def state(mask: str, at: Path) -> str:
        (at / "manifest.csv").write_text(f"patient_id,image,mask,split\np,image.nii,{mask},train\n")
        (case,) = read_manifest(at, None, "salt")
        return state_of(case)

    first = state("r1/p.nii", data)
    assert state("r2/p.nii", data) != first
    moved = data.rename(tmp_path / "moved")
    assert state("r1/p.nii", moved) == first


def facts(pixels: str, bands: list[str]) -> Facts:
    return Facts(
        None, None, None, None, None, False, True, (1.0, 1.0, 1.0), (64, 64, 1), 0, 1, pixels, tuple(bands), (), ()
    )


def test_a_leak_into_training_is_told_although_the_case_has_a_copy_in_its_own_split():
    bands = [f"b{part}" for part in range(32)]
    rows: list[tuple[str, str, Split, Facts]] = [
        ("a", "p1", "test", facts("1", bands)),
        ("b", "p2", "test", facts("2", [f"B{part}" if part < 8 else band for part, band in enumerate(bands)])),
        ("c", "p3", "train", facts("3", [f"C{part}" if part >= 24 else band for part, band in enumerate(bands)])),
    ]
    found = list(_copies([(Case(key * 16, patient, (), None, split), told) for key, patient, split, told in rows]))
    assert ("LEAKAGE_PIXEL", "block", "a" * 16) in [(each.code, each.severity, each.case) for each in found]


@pytest.mark.parametrize(
    ("first", "second", "united"),
    [
        pytest.param((1, 3), (5, 7), 4, id="two lesions"),
        pytest.param((1, 3), (1, 3), 2, id="the same twice"),
        pytest.param((1, 4), (3, 6), None, id="two versions of one"),
    ],
)
def test_two_objects_of_a_series_are_united_unless_they_outline_one_structure_unlike(
    first, second, united, tmp_path, monkeypatch
):
    def drawn(file: Path, volume: Volume, wanted: object, empty_ok: bool) -> NDArray[np.uint8]:
        painted = np.zeros(volume.voxels.shape[1:], np.uint8)
        painted[slice(*(first if file.name == "first" else second))] = 1
        return painted

    monkeypatch.setattr("fedclient.data.rtstruct.read_rtstruct", drawn)
    monkeypatch.setattr("fedclient.data.cases.object_kind", lambda _: "RTSTRUCT")
    volume = Volume(np.zeros((1, 8, 1, 1), np.float32), np.eye(4))
    files = [tmp_path / "first", tmp_path / "second"]
    if united is None:
        with pytest.raises(ImageUnreadable, match="outline one structure, and not alike"):
            _of_objects(files, volume, {"lung": 1}, ("lung",))
    else:
        assert int(_of_objects(files, volume, {"lung": 1}, ("lung",)).sum()) == united
