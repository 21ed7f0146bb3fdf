"""The fixtures: exact, the same bytes each time, and each fault met by the reader's own word for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from fedclient.data.dicom import find_series, read_series
from fedclient.data.images import read_image, read_labels
from fedclient.data.lidc import read_lidc
from fedclient.data.lidc_consensus import lesions, lidc_labels, stored_series
from fedclient.data.luna16 import mark_indices, read_annotations, spheres
from fedclient.data.polygons import enclosed
from fedclient.data.tables import read_table
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable
from simulations.fixtures import (
    Brain,
    Chest,
    Example,
    LunaCase,
    Picture,
    Reader,
    Segment,
    Year,
    brain,
    chest,
    four_readers,
    write_brats,
    write_decathlon,
    write_dicom_series,
    write_film_xml,
    write_lidc_xml,
    write_luna16,
    write_nnunet,
    write_pictures,
    write_rtstruct,
    write_seg,
)  # fmt: skip
from simulations.fixtures.outlines import loops

itk: Any = SimpleITK
load: Any = nibabel.load


@pytest.fixture(scope="module")
def person() -> Chest:
    return chest(1, size=64, slices=8)


@pytest.fixture(scope="module")
def head() -> Brain:
    return brain(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(root: Path, person: Chest, head: Brain) -> None:
    """One of each kind."""
    series = write_dicom_series(root / "series", person.volume, shuffled=True)
    write_seg(root / "seg.dcm", series, [Segment("Lung", person.lung)])
    write_rtstruct(root / "rt.dcm", series, {"Lung": person.lung == 1})
    write_lidc_xml(root / "lidc.xml", series, four_readers(person.nodule_masks[0]))
    write_luna16(root / "luna", [LunaCase("1.2", person.volume, person.nodules, lungs=person.lung)])
    example = Example("case_01", (person.volume.voxels[0].astype(np.int16),), person.lung, person.volume.affine_ras)
    write_decathlon(root, "Task06_Lung", [example], ["lung"])
    write_nnunet(root, "Dataset006_Lung", [example], ["lung"])
    write_brats(root / "brats", "2020", [head])
    write_pictures(root / "png", [Picture("a", np.eye(4, dtype=np.uint8), "none", {"patient_id": "p1"})])


def test_the_same_call_writes_the_same_bytes(tmp_path: Path, person: Chest, head: Brain) -> None:
    everything(tmp_path / "a", person, head)
    everything(tmp_path / "b", chest(1, size=64, slices=8), brain(0))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, -1, 1), (-1, 1, 1), (1, 1, -1), (-1, -1, -1)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_series_comes_back_in_whatever_direction_it_was_stored(
    tmp_path: Path, person: Chest, directions: tuple[int, int, int], shuffled: bool
) -> None:
    written = write_dicom_series(tmp_path, person.volume, directions=directions, shuffled=shuffled)
    read = read_series(written.paths)
    assert (read.voxels == person.volume.voxels).all()
    assert read.affine_ras == pytest.approx(person.volume.affine_ras, abs=1e-4)
    assert read.modality == "CT"


def test_itk_sees_the_same_series(tmp_path: Path, person: Chest) -> None:
    written = write_dicom_series(tmp_path, person.volume)
    reader = itk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in written.paths])
    image = reader.Execute()
    theirs = itk.GetArrayFromImage(image).transpose(2, 1, 0)
    assert (theirs == written.turned(person.volume.voxels[0])).all()
    at = image.TransformIndexToPhysicalPoint((5, 9, 2))
    assert at == pytest.approx((np.diag([-1, -1, 1, 1]) @ written.stored.affine_ras @ (5, 9, 2, 1))[:3], abs=1e-4)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_a_series_may_be_written_in_other_syntaxes_and_scales(tmp_path: Path, person: Chest, syntax: Any) -> None:
    written = write_dicom_series(tmp_path, person.volume, syntax=syntax, slope=0.5, intercept=-3024.0)
    assert (read_series(written.paths).voxels == person.volume.voxels).all()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"missing": [3]}, "SERIES_GAP"),
        ({"tilt_deg": 15.0}, "SERIES_TILT"),
        ({"duplicate": 2}, "SERIES_DUPLICATE"),
        ({"headers": {"ImagePositionPatient": None}}, "GEOMETRY_MISSING"),
        ({"headers": {"RescaleSlope": None}}, "INTENSITY_INVALID"),
        ({"headers": {"Modality": "SR"}}, "MODALITY_MISMATCH"),
    ],
)
def test_each_fault_is_met_by_its_code(tmp_path: Path, person: Chest, fault: dict[str, Any], code: str) -> None:
    written = write_dicom_series(tmp_path, person.volume, **fault)
    with pytest.raises(ImageUnreadable) as e:
        read_series(written.paths)
    assert e.value.code == code
    if code == "SERIES_TILT":
        assert "15.0 degrees" in str(e.value)


def test_a_tilted_series_is_cut_askew_through_the_same_body(tmp_path: Path, person: Chest) -> None:
    written = write_dicom_series(tmp_path, person.volume, tilt_deg=15)
    data = [pydicom.dcmread(path) for path in written.paths]
    positions = np.array([d.ImagePositionPatient for d in data], np.float64)
    assert np.ptp(positions[:, :2], axis=0) == pytest.approx((0, 0), abs=1e-4)  # the couch moved along z alone
    row, column = np.array(data[0].ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(row, column)
    assert np.degrees(np.arccos(abs(normal[2]))) == pytest.approx(15)
    at = written.stored.affine_ras @ (32, 31, 4, 1)  # near the middle, where the planes turn
    nearest = np.rint(np.linalg.solve(person.volume.affine_ras, at)[:3]).astype(int)
    found = data[4].pixel_array[31, 32] + data[4].RescaleIntercept
    around = person.volume.voxels[0][tuple(slice(n - 1, n + 2) for n in nearest)]
    assert around.min() <= found <= around.max()


def test_headers_can_carry_what_must_never_get_out(tmp_path: Path, person: Chest) -> None:
    planted = {"PatientName": "DOE^JANE", "InstitutionName": "St. Canary", "ConvolutionKernel": None}
    written = write_dicom_series(tmp_path, person.volume, patient_id="MRN-4711", headers=planted)
    data = pydicom.dcmread(written.paths[0])
    assert (data.PatientName, data.InstitutionName, data.PatientID) == ("DOE^JANE", "St. Canary", "MRN-4711")
    assert "ConvolutionKernel" not in data


def test_an_mr_series_has_no_hounsfield_units(tmp_path: Path, head: Brain) -> None:
    volume = Volume(head.images["t1"][None], head.affine_ras)
    written = write_dicom_series(tmp_path, volume, modality="MR")
    assert "RescaleSlope" not in pydicom.dcmread(written.paths[0])
    read = read_series(written.paths)
    assert read.modality == "MR"
    assert (read.voxels == volume.voxels).all()


def test_lidc_goes_from_masks_to_xml_and_back_to_the_consensus(tmp_path: Path, person: Chest) -> None:
    series = write_dicom_series(tmp_path / "ct", person.volume, directions=(1, 1, -1), shuffled=True)
    mask = person.nodule_masks[0]
    readers = four_readers(mask, malignancy=(4, 4, 5, 2))
    spots = Reader(readers[3].nodules, small=[(20, 30, 2)], others=[(40, 30, 3)])
    reads = read_lidc(write_lidc_xml(tmp_path / "ct" / "069.xml", series, [*readers[:3], spots]))
    (found,) = find_series(tmp_path / "ct").series
    image = read_series(found.files)
    assert reads is not None
    stored = stored_series(found, image)
    assert stored.affine_ras == pytest.approx(series.stored.affine_ras, abs=1e-3)
    (lesion,) = lesions(reads, stored)
    assert (lidc_labels([lesion], stored, image) == mask).all()
    assert (lesion.marked, lesion.present, lesion.malignancy) == (4, 4, 4.0)
    by_kind = {spot.kind: spot for spot in reads.spots}
    spot = by_kind["small-nodule"]
    n = stored.sop_uids.index(spot.sop_uid)
    voxel = np.linalg.solve(image.affine_ras, stored.affine_ras @ (spot.column, spot.row, n, 1))[:3]
    assert voxel == pytest.approx((20, 30, 2), abs=1e-3)
    assert by_kind["non-nodule"].z_mm == pytest.approx(stored.z_mm[n] + person.volume.spacing_mm[2], abs=1e-3)
    assert read_lidc(write_film_xml(tmp_path / "film.xml")) is None


def test_luna16_nodules_of_the_phantom_lie_on_its_nodules(tmp_path: Path, person: Chest) -> None:
    root = write_luna16(tmp_path, [LunaCase("1.2.3", person.volume, person.nodules, turned=True)])
    image = read_image(root / "subset0" / "1.2.3.mhd")
    marks = read_annotations(root / "annotations.csv")
    for mark, mask in zip(marks, person.nodule_masks, strict=True):
        middle = np.argwhere(mask).mean(axis=0)
        assert np.abs(mark_indices([mark], image)[0] - middle)[:2].max() < 1
        assert (spheres([mark], image) == 1)[mask].any()


def test_a_brain_has_nested_tumour_parts_and_nothing_around_it(head: Brain) -> None:
    assert sorted(head.images) == ["flair", "t1", "t1ce", "t2"]
    for image in head.images.values():
        assert (image[0] == 0).all()
        assert 0.2 < (image > 0).mean() < 0.7
    assert np.unique(head.parts).tolist() == [0, 1, 2, 3]
    t1ce, flair = head.images["t1ce"], head.images["flair"]
    assert t1ce[head.parts == 3].mean() > 1.5 * t1ce[head.parts == 1].mean()
    assert flair[head.parts == 2].mean() > 1.3 * flair[(head.parts == 0) & (flair > 0)].mean()
    assert 4 in brain(1, cavity=True).parts
    assert (brain(1).parts != head.parts).any()


@pytest.mark.parametrize(
    ("year", "pattern", "values"),
    [
        ("2018", "MICCAI_BraTS_2018_Data_Training/[HL]GG/Brats18_*_1/Brats18_*_1_{}.nii.gz", {0, 1, 2, 4}),
        ("2019", "MICCAI_BraTS_2019_Data_Training/[HL]GG/BraTS19_*_1/BraTS19_*_1_{}.nii.gz", {0, 1, 2, 4}),
        ("2020", "MICCAI_BraTS2020_TrainingData/BraTS20_Training_00?/BraTS20_Training_00?_{}.nii.gz", {0, 1, 2, 4}),
        ("2021", "BraTS2021_Training_Data/BraTS2021_0000?/BraTS2021_0000?_{}.nii.gz", {0, 1, 2, 4}),
        ("2023", "*/BraTS-GLI-0000?-000/BraTS-GLI-0000?-000-{}.nii.gz", {0, 1, 2, 3}),
        ("2024", "*/*/BraTS-GLI-0000?-10?/BraTS-GLI-0000?-10?-{}.nii.gz", {0, 1, 2, 3, 4}),
    ],
)
def test_each_year_of_brats_has_its_own_folders_and_labels(
    tmp_path: Path, year: Year, pattern: str, values: set[int]
) -> None:
    people = [brain(n, cavity=year == "2024") for n in range(2)]
    write_brats(tmp_path, year, people)
    suffixes = ("t1n", "t1c", "t2w", "t2f", "seg") if year >= "2023" else ("t1", "t1ce", "t2", "flair", "seg")
    found = {suffix: sorted(tmp_path.glob(pattern.format(suffix))) for suffix in suffixes}
    assert [len(paths) for paths in found.values()] == [2] * 5
    assert len(list(tmp_path.rglob("*.nii.gz"))) == 10
    image = read_image(found[suffixes[1]][0])
    labels = read_labels(found["seg"][0], like=image)
    assert set(np.unique(labels)) == values
    assert (image.voxels[0] == people[0].images["t1ce"]).all()
    assert ((labels > 0) == (people[0].parts > 0)).all()
    assert load(found["seg"][0]).affine[0, 0] == -1  # stored from the left, as the challenge's files are
    tables = {p.name for p in tmp_path.rglob("*.csv")}
    if year in ("2018", "2019", "2020"):
        (path,) = tmp_path.rglob("survival_*.csv")
        days = "Survival_days" if year == "2020" else "Survival"
        assert [line.values[days] for line in read_table(path, path.name, [days])] == ["361", "ALIVE (361 days later)"]
        assert ("name_mapping.csv" in tables) == (year == "2020")
    else:
        assert not tables


def examples(head: Brain) -> list[Example]:
    channels = tuple(head.images[name] for name in ("flair", "t1ce"))
    return [Example(f"case_{n:03d}", channels, head.parts, head.affine_ras) for n in range(2)]


def test_the_decathlon_stacks_channels_and_names_labels_by_number(tmp_path: Path, head: Brain) -> None:
    cases = examples(head)
    folder = write_decathlon(
        tmp_path, "Task01_Brain", cases, ["n", "o", "e"], channels=["FLAIR", "T1c"], test=cases[:1]
    )
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["modality"] == {"0": "FLAIR", "1": "T1c"}
    assert facts["labels"] == {"0": "background", "1": "n", "2": "o", "3": "e"}
    assert (facts["numTraining"], facts["numTest"], facts["tensorImageSize"]) == (2, 1, "4D")
    for pair in facts["training"]:
        assert load(folder / pair["image"]).shape == (*head.parts.shape, 2)
        assert (read_labels(folder / pair["label"]) == head.parts).all()
    assert (folder / facts["test"][0]).exists()


def test_nnunet_keeps_a_file_for_each_channel_and_numbers_labels_by_name(tmp_path: Path, head: Brain) -> None:
    folder = write_nnunet(tmp_path, "Dataset001_Brain", examples(head), ["n", "o", "e"], channels=["FLAIR", "T1c"])
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["labels"] == {"background": 0, "n": 1, "o": 2, "e": 3}
    assert facts["channel_names"] == {"0": "FLAIR", "1": "T1c"}
    assert (facts["numTraining"], facts["file_ending"]) == (2, ".nii.gz")
    names = sorted(p.name for p in (folder / "imagesTr").iterdir())
    assert names == [f"case_{n:03d}_{channel:04d}.nii.gz" for n in range(2) for channel in range(2)]
    image = read_image(folder / "imagesTr" / "case_001_0001.nii.gz")
    assert (image.voxels[0] == head.images["t1ce"]).all()
    assert (read_labels(folder / "labelsTr" / "case_001.nii.gz", like=image) == head.parts).all()


def test_pictures_keep_their_depth_and_their_rows(tmp_path: Path) -> None:
    deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    flat = np.arange(12, dtype=np.uint8).reshape(3, 4)
    who = {"patient_id": "p1", "split": "train"}
    write_pictures(tmp_path, [Picture("a", deep, "mass|effusion", who), Picture("b", flat, "none", who)])
    rows = [line.values for line in read_table(tmp_path / "labels.csv", "labels.csv", ["image"])]
    assert [row["label"] for row in rows] == ["mass|effusion", "none"]
    assert rows[0].items() >= who.items()
    for row, pixels in zip(rows, (deep, flat), strict=True):
        assert (read_image(tmp_path / row["image"]).voxels[0, :, :, 0] == pixels).all()


@pytest.mark.parametrize(
    ("shape", "holes"),
    [
        (lambda a, b: (a - 8) ** 2 + (b - 7) ** 2 <= 30, 0),
        (lambda a, b: (abs(a - 8) < 6) & (abs(b - 7) < 6) & ~((abs(a - 8) < 3) & (abs(b - 7) < 2)), 1),
        (lambda a, b: (a == 3) & (b == 4) | (a == 4) & (b == 5), 0),  # two pixels that touch at a corner
        (lambda a, b: (a > 2) & (a < 12) & (b == 5), 0),
    ],
)
def test_outlines_go_round_every_pixel_and_no_other(shape: Callable[..., Any], holes: int) -> None:
    mask = np.asarray(shape(*np.indices((16, 14))), np.bool_)
    found = loops(mask)
    assert (enclosed([loop.corners for loop in found], mask.shape) == mask).all()
    assert sum(loop.hole for loop in found) == holes
