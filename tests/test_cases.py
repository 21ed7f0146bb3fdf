"""A case: its channels by name, its labels by their kind, and a state that changes when anything of it does."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedclient.data.cases import (
    Case,
    Channel,
    Drawn,
    Marks,
    Mask,
    Shown,
    files_of,
    read_case,
    read_case_labels,
    state_of,
)
from fedclient.data.luna16 import Mark
from fedclient.data.nifti import read_nifti
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable
from shared_models.files import write_atomic
from simulations.fixtures import Segment, write_dicom_series, write_mhd, write_rtstruct, write_seg
from simulations.phantoms import nifti

AFFINE = np.diag([2.0, 2, 3, 1])
SHAPE = (4, 3, 2)


def grey(n: int) -> NDArray[np.int16]:
    return (np.arange(24, dtype=np.int16) + 100 * n).reshape(SHAPE)


def stored(path: Path, values: NDArray[np.generic], affine_ras: NDArray[np.float64] = AFFINE) -> Path:
    write_atomic(path, nifti(values, affine_ras))
    return path


def case_of(*channels: Channel, label: object = None) -> Case:
    return Case("ab" * 8, "p", channels, label, "train")  # type: ignore[arg-type]


@pytest.fixture
def brain(tmp_path: Path) -> Case:
    """T1 and FLAIR as files, T2 as the second part of a 4-D file."""
    four = stored(tmp_path / "4d.nii.gz", np.stack([grey(8), grey(2)], axis=-1))
    return case_of(
        Channel("T1n", (stored(tmp_path / "t1.nii.gz", grey(1)),)),
        Channel("t2", (four,), part=1),
        Channel("flair", (stored(tmp_path / "flair.nii.gz", grey(3)),)),
    )


def refusal(case: Case, *names: str) -> ImageUnreadable:
    with pytest.raises(ImageUnreadable) as e:
        read_case(case, names)
    return e.value


def test_channels_come_in_the_order_that_the_study_names(brain: Case) -> None:
    assert (read_case(brain, ["flair", "t2"]).voxels == np.stack([grey(3), grey(2)])).all()
    assert (read_case(brain, ["t1"]).voxels == grey(1)).all()  # BraTS 2023 calls it t1n
    assert (read_case(brain, ["T1N"]).voxels == grey(1)).all()


def test_channels_that_a_case_has_not_are_told_with_those_that_it_has(brain: Case) -> None:
    refused = refusal(brain, "t1", "t1ce")
    assert refused.code == "MODALITY_MISMATCH"
    assert "wants the channels t1, t1ce, the case has T1n, t2, flair" in str(refused)
    assert "wants one channel" in str(refusal(brain))
    bare = case_of(*(replace(channel, name="") for channel in brain.channels))
    assert "the case has 3 without names" in str(refusal(bare, "t1"))


@pytest.mark.parametrize("apart", ["shape", "place"])
def test_channels_on_different_grids_are_refused(brain: Case, tmp_path: Path, apart: str) -> None:
    moved = AFFINE + (np.eye(4, k=3) if apart == "place" else 0)
    stored(tmp_path / "flair.nii.gz", grey(3)[: 3 if apart == "shape" else 4], moved)
    assert refusal(brain, "t1", "flair").code == "CHANNELS_APART"


@pytest.mark.parametrize("apart", ["turned", "larger"])
def test_channels_are_compared_where_their_corners_lie(tmp_path: Path, apart: str) -> None:
    """A hundredth in an affine is millimetres at the end of 240 voxels."""
    cos, sin = np.cos(np.deg2rad(0.55)), np.sin(np.deg2rad(0.55))
    turn = np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    other = {"turned": turn, "larger": np.diag([1.009, 1.009, 1, 1])}[apart]
    near = np.eye(4) + 1e-4 * (other - np.eye(4))  # as float32 and rounded positions make it
    values = np.zeros((240, 240, 2), np.int16)
    first = Channel("t1", (stored(tmp_path / "t1.nii", values, np.eye(4)),))
    apart_from = Channel("t2", (stored(tmp_path / "t2.nii", values, other),))
    assert refusal(case_of(first, apart_from), "t1", "t2").code == "CHANNELS_APART"
    beside = Channel("t2", (stored(tmp_path / "near.nii", values, near),))
    assert read_case(case_of(first, beside), ["t1", "t2"]).voxels.shape == (2, 240, 240, 2)


def test_a_part_that_a_nifti_has_not_is_refused_and_one_of_a_3d_file_too(brain: Case, tmp_path: Path) -> None:
    for name, part in (("4d.nii.gz", 2), ("t1.nii.gz", 0)):
        with pytest.raises(ImageUnreadable, match="of a 4-D image is wanted") as e:
            read_nifti(tmp_path / name, part)
        assert e.value.code == "MODALITY_MISMATCH"
    with pytest.raises(ImageUnreadable, match="4-D"):
        read_nifti(tmp_path / "4d.nii.gz")


def labels(case: Case, *names: str) -> NDArray[np.uint8]:
    return read_case_labels(case, read_case(case, [case.channels[0].name]), names)


def test_a_site_maps_what_it_calls_things_to_labels_of_the_study(brain: Case, tmp_path: Path) -> None:
    values = np.zeros(SHAPE, np.uint8)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = 1, 2, 7
    names = {1: "Whole Organ", 2: "tumour", 7: "vessel"}
    case = replace(brain, label=Mask(stored(tmp_path / "m.nii.gz", values), names))
    with pytest.raises(ImageUnreadable, match=r"values \[7\].*besides: 7 = vessel"):
        labels(case, "whole-organ", "tumour")
    mapped = replace(case, structures={"vessel": "background", "other": "no-label-of-this-study"})
    assert labels(mapped, "tumour", "whole-organ")[:3, 0, 0].tolist() == [2, 1, 0]
    mapped = replace(case, structures={"vessel": "ignore", "Whole Organ": "tumour"})
    assert labels(mapped, "tumour")[:3, 0, 0].tolist() == [1, 1, 127]
    with pytest.raises(ImageUnreadable, match="labels Whole Organ, tumour, vessel; this study spleen"):
        labels(case, "spleen")


@pytest.mark.parametrize(("one", "two"), [("脾臓", "肝臓"), ("селезёнка", "печень"), ("ki67+", "ki67-")])
def test_structures_whose_names_hold_no_latin_letter_or_differ_in_a_sign_stay_apart(
    brain: Case, tmp_path: Path, one: str, two: str
) -> None:
    values = np.zeros(SHAPE, np.uint8)
    values[0], values[1] = 1, 2
    case = replace(brain, label=Mask(stored(tmp_path / "m.nii.gz", values), {1: one, 2: two}))
    with pytest.raises(ImageUnreadable, match=r"values \[1\].*besides: 1 = ") as e:
        labels(replace(case, structures={two: "organ"}), "organ")
    assert e.value.code == "LABEL_VALUES"
    both = replace(case, structures={two: "organ", one: "other"})
    assert labels(both, "organ", "other")[:3, 0, 0].tolist() == [2, 1, 0]


def test_a_structure_that_the_data_set_numbers_127_is_not_ignored(brain: Case, tmp_path: Path) -> None:
    values = np.zeros(SHAPE, np.uint8)
    values[0], values[1] = 1, 127
    file = stored(tmp_path / "m.nii.gz", values)
    case = replace(brain, label=Mask(file, {1: "liver", 127: "spleen"}))
    with pytest.raises(ImageUnreadable, match=r"values \[127\].*allows: 0 = background, 1 = liver\. .*127 = spleen"):
        labels(case, "liver")
    assert labels(case, "liver", "spleen")[:3, 0, 0].tolist() == [1, 2, 0]
    assert labels(replace(case, structures={"spleen": "ignore"}), "liver")[:3, 0, 0].tolist() == [1, 127, 0]
    unnamed = replace(case, label=Mask(file, {1: "liver"}))
    assert labels(unnamed, "liver")[:3, 0, 0].tolist() == [1, 127, 0]


def test_white_is_a_label_only_where_there_is_one(tmp_path: Path) -> None:
    for name, values in {"i": [[9, 9, 9]], "m": [[0, 127, 255]], "n": [[1, 127, 255]]}.items():
        Image.fromarray(np.array(values, np.uint8)).save(tmp_path / f"{name}.png")
    case = case_of(Channel(files=(tmp_path / "i.png",)), label=Mask(tmp_path / "m.png"))
    assert read_case_labels(case, read_case(case), ["lung"]).ravel().tolist() == [0, 127, 1]
    numbered = replace(case, label=Mask(tmp_path / "m.png", {1: "lung", 127: "ignore"}))
    assert read_case_labels(numbered, read_case(case), ["lung"]).ravel().tolist() == [0, 127, 1]
    for label, names in (
        (Mask(tmp_path / "m.png"), ["lung", "heart"]),
        (Mask(tmp_path / "m.png", {1: "lung", 2: "heart"}), ["lung"]),
        (Mask(tmp_path / "m.png", {1: "lung", 2: "heart"}), ["lung", "heart"]),
    ):
        with pytest.raises(ImageUnreadable, match=r"values \[255\].*1 = lung.*White \(255\) is no label") as e:
            read_case_labels(replace(case, label=label), read_case(case), names)
        assert e.value.code == "LABEL_VALUES"
    grey = replace(case, label=Mask(tmp_path / "m.png", {127: "lung", 255: "heart"}))
    assert read_case_labels(grey, read_case(case), ["heart", "lung"]).ravel().tolist() == [0, 2, 1]


def test_labels_of_another_kind_or_none_are_no_labels_of_a_segmentation(brain: Case) -> None:
    for label in (None, Shown(("mass",)), Marks(nodules=None)):
        with pytest.raises(ImageUnreadable) as e:
            labels(replace(brain, label=label), "nodule")
        assert e.value.code == "LABEL_MISSING"


def test_objects_on_one_series_are_laid_over_each_other_and_may_not_differ(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "ct", Volume(grey(0)[None].astype(np.float32), AFFINE, "CT"))
    lung, other = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    lung[1, 1], other[2, 1] = True, True
    seg = write_seg(tmp_path / "a.dcm", series, [Segment("Lung", lung)])
    case = case_of(Channel(files=(tmp_path / "ct",)), label=Drawn((seg,)))
    assert (labels(case, "lung", "heart") == lung).all()
    both = replace(case, label=Drawn((seg, write_rtstruct(tmp_path / "b.dcm", series, {"heart": other}))))
    assert (labels(both, "lung", "heart") == lung + 2 * other).all()
    assert not labels(both, "heart", "Lung")[0].any()
    torn = replace(case, label=Drawn((seg, write_rtstruct(tmp_path / "c.dcm", series, {"heart": lung}))))
    with pytest.raises(ImageUnreadable, match="say different things"):
        labels(torn, "lung", "heart")
    assert (labels(replace(case, label=Mask(seg)), "lung") == lung).all()


def test_a_mapping_to_a_label_of_another_study_is_left_aside(brain: Case, tmp_path: Path) -> None:
    case = replace(brain, label=Mask(stored(tmp_path / "m.nii.gz", np.ones(SHAPE, np.uint8)), {1: "a"}))
    assert (labels(replace(case, structures={"b": "of-another-study"}), "a") == 1).all()


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def test_the_state_of_a_case_follows_its_files_and_all_that_is_said_of_them(brain: Case, tmp_path: Path) -> None:
    mask = stored(tmp_path / "m.nii.gz", np.ones(SHAPE, np.uint8))
    case = replace(brain, label=Mask(mask, {1: "a"}))
    assert {path.name for path in files_of(case)} == {"t1.nii.gz", "4d.nii.gz", "flair.nii.gz", "m.nii.gz"}
    states = [state_of(case)]
    assert states == [state_of(case)]
    touched(mask)
    states.append(state_of(case))
    touched(tmp_path / "4d.nii.gz")
    states.append(state_of(case))
    states.append(state_of(replace(case, label=Mask(mask, {1: "b"}))))
    states.append(state_of(replace(case, structures={"a": "b"})))
    states.append(state_of(replace(case, channels=case.channels[::-1])))
    mark = Mark(2, "1.2", (0.0, 0.0, 0.0), 4.0)
    states.append(state_of(replace(case, label=Marks((mark,)))))
    states.append(state_of(replace(case, label=Marks((replace(mark, diameter_mm=5.0),)))))
    assert len(set(states)) == len(states)
    mask.unlink()
    with pytest.raises(ImageUnreadable, match="gone or locked"):
        state_of(case)


def test_the_voxels_behind_a_header_belong_to_the_state(tmp_path: Path) -> None:
    header = write_mhd(tmp_path / "a[1].mhd", grey(0), AFFINE)
    case = case_of(Channel(files=(header,)))
    before = state_of(case)
    touched(header.with_suffix(".raw"))
    assert state_of(case) != before


@pytest.mark.parametrize(("name", "line"), [("a.mhd", "ElementDataFile = v.bin"), ("a.nhdr", "data file: v.bin")])
def test_the_voxels_behind_a_header_belong_to_the_state_whatever_they_are_called(
    tmp_path: Path, name: str, line: str
) -> None:
    (tmp_path / name).write_text(f"NDims = 3\n{line}\n")
    (tmp_path / "v.bin").write_bytes(b"voxels")
    case = case_of(Channel(files=(tmp_path / name,)))
    before = state_of(case)
    touched(tmp_path / "v.bin")
    assert state_of(case) != before
