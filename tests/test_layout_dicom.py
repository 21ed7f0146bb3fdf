"""PACS exports and LIDC-IDRI: which series become cases, which labels find them, what is left out and why."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

import fedclient.data.layouts.series as series_module
from fedclient.data.cases import Case, Drawn, LidcReads, Listing, read_case, read_case_labels
from fedclient.data.dicom_folder import Found, find_series
from fedclient.data.listing import LAYOUTS, layout_of, list_cases
from fedclient.data.manifest import split_of
from fedclient.data.volume import Volume
from fedclient.data.where import Where
from shared_models.errors import ImageUnreadable, ManifestInvalid
from simulations.fixtures import (
    Reader,
    Seen,
    Segment,
    write_dicom_series,
    write_film_xml,
    write_lidc_xml,
    write_rtstruct,
    write_seg,
)  # fmt: skip
from tests.dicoms import SLICES, STEP_MM, putting, write_series

AFFINE = np.array([[2.0, 0, 0, -15], [0, 2, 0, -15], [0, 0, 3, 30], [0, 0, 0, 1]])
SQUARE = np.zeros((16, 16, 3), np.bool_)
SQUARE[4:8, 4:8, 1] = True


def volume(seed: int = 0) -> Volume:
    hu = np.random.default_rng(seed).integers(-1000, 400, (1, 16, 16, 3)).astype(np.float32)
    return Volume(hu, AFFINE, "CT")


def listing(folder: Path, layout: str = "auto", structures: Mapping[str, str] | None = None) -> Listing:
    return list_cases(Where(folder, layout=layout, structures=structures or {}), "salt")


def codes(found: Listing) -> list[str]:
    return sorted(finding.code for finding in found.findings)


def said(found: Listing, code: str) -> str:
    (what,) = [finding.what for finding in found.findings if finding.code == code]
    return what


def labels_of(case: Case, *names: str) -> np.ndarray:
    return read_case_labels(case, read_case(case), names)


# A PACS export


def test_series_in_folders_of_any_name_become_cases_with_the_labels_that_name_them(tmp_path: Path) -> None:
    one = write_dicom_series(tmp_path / "A" / "B" / "C", volume(1), patient_id="p1", shuffled=True)
    two = write_dicom_series(tmp_path / "X", volume(2), patient_id="p2", directions=(-1, -1, -1))
    bare = write_dicom_series(tmp_path / "X" / "more", volume(3), patient_id="p2", series="2")
    write_seg(tmp_path / "labels.dcm", one, [Segment("Lung", SQUARE)])
    write_rtstruct(tmp_path / "Z" / "noname", two, {"LUNG": np.roll(SQUARE, 3, axis=0)})
    (tmp_path / "readme.txt").write_text("export of today")
    found = listing(tmp_path)
    assert (found.layout, found.findings) == ("PACS export, 3 series", ())
    by_uid = {case.channels[0].series.uid: case for case in found.cases if case.channels[0].series}
    assert (read_case(by_uid[one.stored.series_uid]).voxels == volume(1).voxels).all()
    assert (labels_of(by_uid[one.stored.series_uid], "lung") == SQUARE).all()
    assert (labels_of(by_uid[two.stored.series_uid], "lung") == np.roll(SQUARE, 3, axis=0)).all()
    assert by_uid[bare.stored.series_uid].label is None
    assert by_uid[bare.stored.series_uid].split == by_uid[two.stored.series_uid].split == split_of("P2", "salt")


def test_neither_a_listing_nor_its_findings_tell_a_patient(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "Doe_Jane", volume(), patient_id="MRN-4711")
    (tmp_path / "Doe_Jane" / "9.dcm").write_bytes(b"cut short")
    shown = repr(listing(tmp_path))
    assert "DICOM_UNREADABLE" in shown
    assert not any(word in shown for word in ("4711", "Doe", "1.2.826"))


DERIVED, SCREEN = ["DERIVED", "SECONDARY", "MPR"], ["DERIVED", "SECONDARY", "DOSE_INFO"]
UNPLACED = {"ImagePositionPatient": None, "ImageOrientationPatient": None}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "3 files of localisers"),
        ({"ImageType": DERIVED}, "1 series derived from others of their study"),
        ({"ImageType": SCREEN, **UNPLACED}, "1 series without a place in the patient"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "1 secondary captures"),
        ({"Modality": "US"}, "1 series of a modality that no study learns from"),
        ({"Modality": "SR", "Rows": None, "Columns": None, "PixelData": None}, "3 objects that are no images"),
    ],
)
def test_what_no_study_learns_from_is_left_out_and_counted(
    tmp_path: Path, headers: Mapping[str, object], reason: str
) -> None:
    write_dicom_series(tmp_path / "a", volume())
    write_dicom_series(tmp_path / "b", volume(1), series="2", headers=headers)
    found = listing(tmp_path)
    assert len(found.cases) == 1
    assert said(found, "SERIES_LEFT_OUT").startswith(reason)


def test_a_derived_series_is_kept_where_it_is_all_there_is_or_somebody_drew_on_it(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "a", volume(), study="1", headers={"ImageType": DERIVED})
    write_dicom_series(tmp_path / "b", volume(1), study="2")
    drawn = write_dicom_series(tmp_path / "c", volume(2), study="2", series="2", headers={"ImageType": DERIVED})
    write_seg(tmp_path / "seg.dcm", drawn, [Segment("Lung", SQUARE)])
    assert (len(listing(tmp_path).cases), codes(listing(tmp_path))) == (3, [])


def test_a_series_that_was_exported_twice_is_one(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "a", volume())
    write_seg(tmp_path / "a" / "seg.dcm", series, [Segment("Lung", SQUARE)])
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    found = listing(tmp_path)
    (case,) = found.cases
    assert said(found, "DUPLICATE") == "3 files are copies of others"
    assert isinstance(case.label, Drawn)
    assert len(case.label.files) == 1
    assert (labels_of(case, "lung") == SQUARE).all()


def test_slices_in_turn_are_one_case_also_where_they_were_exported_twice(tmp_path: Path) -> None:
    def in_turn(k: int, data: Dataset) -> None:
        data.AcquisitionNumber, data.SliceThickness = 1 + k % 2, STEP_MM

    write_series(tmp_path / "a", edit=in_turn)
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    found = listing(tmp_path)
    (case,) = found.cases
    assert read_case(case).voxels.shape[3] == SLICES
    assert codes(found) == ["DUPLICATE"]


def test_a_series_that_holds_several_images_is_told(tmp_path: Path) -> None:
    write_series(tmp_path / "a", edit=putting("PatientID", "other", (4, 5)))
    write_dicom_series(tmp_path / "b", volume(), series="2")
    found = listing(tmp_path)
    assert len(found.cases) == 3
    assert said(found, "SERIES_SEVERAL").startswith("1 DICOM series hold 2 images")


def test_labels_of_a_series_that_is_not_there_are_told_and_one_broken_object_stops_nothing(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "a", volume())
    away = write_dicom_series(tmp_path / "away", volume(), series="2")
    write_seg(tmp_path / "seg.dcm", away, [Segment("Lung", SQUARE)])
    shutil.rmtree(tmp_path / "away")
    write_seg(tmp_path / "odd.dcm", away, [Segment("Lung", SQUARE)], headers={"SOPClassUID": "1.2.3"})
    found = listing(tmp_path)
    assert said(found, "LABEL_ORPHAN").startswith("1 SEG or RTSTRUCT objects name a series that is not here")
    assert "SOP" not in said(found, "LABEL_UNREADABLE")
    assert [case.label for case in found.cases] == [None]


def test_an_object_finds_its_stack_by_its_slices_where_a_series_holds_several(tmp_path: Path) -> None:
    first = write_dicom_series(tmp_path / "1", volume(1))
    uid = {"SeriesInstanceUID": first.stored.series_uid}
    second = write_dicom_series(tmp_path / "2", volume(2), series="x", headers={**uid, "AcquisitionNumber": 2})
    named = replace(second, stored=replace(second.stored, series_uid=first.stored.series_uid))
    write_seg(tmp_path / "seg.dcm", named, [Segment("Lung", SQUARE)])
    cases = listing(tmp_path).cases
    (drawn,) = [case for case in cases if case.label is not None]
    assert len(cases) == 2
    assert (read_case(drawn).voxels == volume(2).voxels).all()


def test_headers_are_read_again_when_a_file_came_or_changed_and_not_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def find(folder: Path) -> Found:
        looks.append(folder)
        return find_series(folder)

    monkeypatch.setattr(series_module, "find_series", find)
    series = write_dicom_series(tmp_path / "a", volume())
    assert listing(tmp_path).cases == listing(tmp_path).cases
    assert len(looks) == 1
    write_dicom_series(tmp_path / "b", volume(1), series="2")
    assert (len(listing(tmp_path).cases), len(looks)) == (2, 2)
    series.paths[0].write_bytes(series.paths[0].read_bytes()[:200])
    assert codes(listing(tmp_path)) == ["DICOM_UNREADABLE"]


def test_a_series_without_a_patient_is_refused_and_a_link_out_of_the_folder_too(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_dicom_series(data / "a", volume())
    write_dicom_series(data / "b", volume(1), series="2", headers={"PatientID": ""})
    found = listing(data)
    assert (len(found.cases), said(found, "PATIENT_UNKNOWN")) == (1, "1 series without PatientID, left out")
    (data / "out").symlink_to(tmp_path)
    with pytest.raises(ManifestInvalid) as e:
        listing(data)
    assert e.value.code == "PATH_ESCAPE"


def test_structures_that_the_study_does_not_name_are_told_with_the_way_to_map_them(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "a", volume())
    write_seg(tmp_path / "seg.dcm", series, [Segment("Pulmo", SQUARE)])
    (case,) = listing(tmp_path).cases
    with pytest.raises(ImageUnreadable, match="`structures` under") as e:
        labels_of(case, "lung")
    assert e.value.code == "LABEL_MISSING"
    (mapped,) = listing(tmp_path, structures={"Pulmo": "lung"}).cases
    assert (labels_of(mapped, "lung") == SQUARE).all()


# LIDC-IDRI


def reads(spans: Sequence[tuple[int, int]], malignancy: Sequence[int]) -> list[Reader]:
    """Each reader drew columns of the square from the first to before the second index along I."""
    masks = [np.zeros_like(SQUARE) for _ in spans]
    for mask, (begin, end) in zip(masks, spans, strict=True):
        mask[begin:end, 4:8, 1] = True
    return [Reader((Seen(m, {"malignancy": score}),)) for m, score in zip(masks, malignancy, strict=True)]


FOUR = reads([(4, 8), (4, 8), (5, 9), (6, 10)], (4, 4, 5, 3))
#         i = 4 5 6 7 8 9
# readers     2 3 4 4 2 1, and two of four are half of them
CONSENSUS = np.zeros(SQUARE.shape, np.bool_)
CONSENSUS[4:9, 4:8, 1] = True


@pytest.mark.parametrize("tree", ["present", "old", "apart"])
def test_the_readers_find_their_series_in_each_of_the_archives_trees(tmp_path: Path, tree: str) -> None:
    patient = tmp_path / "LIDC-IDRI" / "LIDC-IDRI-0001"
    folder = patient / ("1.3.6.1/1.3.6.2" if tree == "old" else "01-01-2000-NA-NA-30178/3000566.000000-NA-03192")
    series = write_dicom_series(folder, volume(), patient_id="LIDC-IDRI-0001", shuffled=True, directions=(1, 1, -1))
    write_lidc_xml((tmp_path / "tcia-lidc-xml" / "157" if tree == "apart" else folder) / "158.xml", series, FOUR)
    write_film_xml(patient / "film" / "1.xml")
    write_dicom_series(patient / "film", volume(1), series="film", headers={"Modality": "DX", **UNPLACED})
    found = listing(tmp_path)
    (case,) = found.cases
    assert (found.layout, case.patient) == ("LIDC-IDRI, 1 CT series", "LIDC-IDRI-0001")
    assert said(found, "SERIES_LEFT_OUT") == "3 series that are no CT (chest films)"
    assert (labels_of(case, "nodule") == CONSENSUS).all()
    assert (labels_of(case, "benign", "malignant") == 2 * CONSENSUS).all()  # the median of 3, 4, 4, 5


def test_xml_of_absent_series_is_for_the_record_and_two_versions_of_one_are_no_label(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "a", volume(), patient_id="p1")
    two = write_dicom_series(tmp_path / "b", volume(1), patient_id="p2")
    away = write_dicom_series(tmp_path / "away", volume(), patient_id="p3")
    shutil.rmtree(tmp_path / "away")
    for name, of, readers in [("1", series, FOUR), ("2", series, FOUR), ("3", two, FOUR), ("4", two, FOUR[:2])]:
        write_lidc_xml(tmp_path / "xml" / f"{name}.xml", of, readers)
    write_lidc_xml(tmp_path / "xml" / "5.xml", away, FOUR)
    (tmp_path / "xml" / "6.xml").write_text("<other/>")
    found = listing(tmp_path)
    assert {case.patient: isinstance(case.label, LidcReads) for case in found.cases} == {"P1": True, "P2": False}
    assert codes(found) == ["LABEL_ORPHAN", "LABEL_UNREADABLE", "LABEL_VALUES"]
    assert said(found, "LABEL_ORPHAN") == "1 XML files are of CT series that are not here"


def test_of_slices_in_one_place_the_lower_instance_number_stays(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path, volume(), duplicate=1)
    write_lidc_xml(tmp_path / "1.xml", series, FOUR)
    (case,) = listing(tmp_path).cases
    assert len(case.channels[0].files) == 3
    assert (labels_of(case, "nodule") == CONSENSUS).all()
    with pytest.raises(ImageUnreadable, match="lie where another one lies"):
        read_case(listing(tmp_path, "pacs").cases[0])


def test_a_folder_of_dicom_is_an_export_unless_it_is_something_else_too(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "a", volume())
    assert layout_of(Where(tmp_path)) == "pacs"
    write_lidc_xml(tmp_path / "a" / "1.xml", series, FOUR)
    assert layout_of(Where(tmp_path)) == "lidc-idri"
    assert LAYOUTS["pacs"].alone
