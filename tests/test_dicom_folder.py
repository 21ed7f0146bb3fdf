"""Which series a folder holds, whatever its files are called and whatever else lies there."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID

from fedclient.data.dicom import find_series, read_series
from fedclient.data.dicom_header import MOST_PASSED
from fedclient.data.images import read_image
from fedclient.data.listing import list_cases
from fedclient.data.where import Where, files_below
from shared_models.errors import ImageUnreadable, ManifestInvalid
from tests.dicoms import ORIGIN_MM, SLICES, STEP_MM, Edit, putting, slice_of, with_empty_items, write, write_series
from tests.test_dicom import enhanced, radiograph


def test_series_are_told_apart_and_their_slices_ordered(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    write_series(tmp_path / "b", 4, edit=putting("SeriesInstanceUID", "1.2.826.7"))
    found = find_series(tmp_path)
    assert [len(series.files) for series in found.series] == [SLICES, 4]
    for series in found.series:
        heights = [each.where.position_mm[2] for each in series.slices if each.where is not None]
        assert heights == sorted(heights)
        assert len(heights) == len(series.files)
    assert found.series[1].uid == "1.2.826.7"
    assert found.series[0].slices[0].sop_uid.startswith("1.2.826.0.1.3680043.9.1.")
    assert (found.series[0].modality, found.series[0].rows, found.series[0].frames) == ("CT", 10, 1)


def test_a_series_says_nothing_of_its_patient(tmp_path: Path) -> None:
    write_series(tmp_path / "Doe_Jane")
    shown = repr(find_series(tmp_path))
    assert "Doe" not in shown
    assert "1.2.826" not in shown


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
        ("PixelSpacing", [0.5, 0.5]),
        ("ImageType", ["DERIVED", "SECONDARY", "MPR"]),
    ],
)
def test_one_series_uid_may_hold_several_stacks(keyword: str, value: object, tmp_path: Path) -> None:
    write_series(tmp_path, edit=putting(keyword, value, (4, 5)))
    assert sorted(len(series.files) for series in find_series(tmp_path).series) == [2, 4]


@pytest.mark.parametrize("keyword", ["AcquisitionNumber", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue"])
def test_takes_of_the_same_part_of_the_patient_are_series_of_their_own(keyword: str, tmp_path: Path) -> None:
    for take in (1, 2, 3):
        write_series(tmp_path / str(take), edit=putting(keyword, take))
    found = find_series(tmp_path)
    assert [len(series.files) for series in found.series] == [SLICES] * 3
    assert read_series(found.series[1].files).voxels.shape[-1] == SLICES


def test_takes_one_behind_the_other_are_one_series(tmp_path: Path) -> None:
    """Step-and-shoot CT counts an acquisition for each step."""
    write_series(tmp_path, edit=lambda k, data: setattr(data, "AcquisitionNumber", k // 2))
    (series,) = find_series(tmp_path).series
    assert len(series.files) == SLICES
    assert read_series(series.files).spacing_mm[2] == pytest.approx(STEP_MM)


def moving(mm: float, take: int, **others: object) -> Edit:
    """Another acquisition, of slices that lie `mm` higher."""

    def edit(k: int, data: Dataset) -> None:
        data.AcquisitionNumber, data.SOPInstanceUID = take, f"1.2.{take}.{k + 1}"
        data.ImagePositionPatient = [*ORIGIN_MM[:2], ORIGIN_MM[2] + STEP_MM * k + mm]
        for keyword, value in others.items():
            setattr(data, keyword, value)

    return edit


def half_and_half(**others: object) -> Sequence[Edit]:
    """Two acquisitions, the second half a step higher."""
    return moving(0, 1, **others), moving(STEP_MM / 2, 2, **others)


@pytest.mark.parametrize(
    "sizes",
    [
        {"SliceThickness": STEP_MM},
        {"SliceThickness": 2.0, "SpacingBetweenSlices": STEP_MM},  # of MR, with a gap
        {"SliceThickness": None, "SpacingBetweenSlices": STEP_MM},
    ],
)
@pytest.mark.parametrize(
    "edit",
    [
        lambda k, data: setattr(data, "AcquisitionNumber", 1 + k % 2),
        lambda k, data: setattr(data, "AcquisitionNumber", 1 + k % 3),
        lambda k, data: setattr(data, "AcquisitionNumber", 1 + k // 2 % 2),
        lambda k, data: setattr(data, "AcquisitionNumber", 2 if k in (4, 5) else 1),
        lambda k, data: setattr(data, "ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", *["HELIX"] * (k % 2)]),
    ],
)
def test_slices_that_lie_in_turn_are_one_series_however_their_acquisitions_are_counted(
    edit: Edit, sizes: Mapping[str, object], tmp_path: Path
) -> None:
    def sized(k: int, data: Dataset) -> None:
        edit(k, data)
        for keyword, value in sizes.items():
            setattr(data, keyword, value)

    write_series(tmp_path, 12, edit=sized)
    (series,) = find_series(tmp_path).series
    assert series.siblings == 0
    assert [each.where.position_mm[2] for each in series.slices if each.where is not None] == pytest.approx(
        [ORIGIN_MM[2] + STEP_MM * k for k in range(12)]
    )
    assert read_series(series.files).spacing_mm[2] == pytest.approx(STEP_MM)


def test_slices_that_fill_the_holes_of_others_are_of_one_series_also_where_they_overlap(tmp_path: Path) -> None:
    """As reconstructions of CT do: 3 mm every 2.5 mm."""
    write_series(tmp_path, 12, edit=lambda k, data: setattr(data, "AcquisitionNumber", 2 if k in (4, 8, 9) else 1))
    assert [(len(series.files), series.siblings) for series in find_series(tmp_path).series] == [(12, 0)]


@pytest.mark.parametrize("thickness_mm", [STEP_MM, 3.0, None])
@pytest.mark.parametrize("lost", [1, 5, 6])
def test_acquisitions_in_turn_of_which_a_slice_is_lost_are_not_half_a_patient(
    lost: int, thickness_mm: float | None, tmp_path: Path
) -> None:
    def edit(k: int, data: Dataset) -> None:
        data.AcquisitionNumber, data.SliceThickness = 1 + k % 2, thickness_mm

    write_series(tmp_path, 12, edit=edit)[lost].unlink()
    (series,) = find_series(tmp_path).series
    with pytest.raises(ImageUnreadable) as refused:
        read_series(series.files)
    assert refused.value.code == "SERIES_GAP"


@pytest.mark.parametrize("number", [4, 99])
def test_a_slice_that_was_repeated_does_not_make_an_image_of_each_counted_slice(number: int, tmp_path: Path) -> None:
    write_series(tmp_path / "all", edit=lambda k, data: setattr(data, "AcquisitionNumber", k + 1))
    again = slice_of(3)
    again.AcquisitionNumber = number
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = UID("1.2.99")
    write(tmp_path / "again.dcm", again)
    (series,) = find_series(tmp_path).series
    with pytest.raises(ImageUnreadable) as refused:
        read_series(series.files)
    assert refused.value.code == "SERIES_DUPLICATE"


def test_time_points_whose_acquisitions_lie_in_turn_are_a_series_each(tmp_path: Path) -> None:
    def at(time: int) -> Edit:
        def edit(k: int, data: Dataset) -> None:
            data.TemporalPositionIdentifier, data.AcquisitionNumber = time, time + k % 2
            data.SliceThickness = STEP_MM

        return edit

    for time in (1, 2):
        write_series(tmp_path / str(time), edit=at(time))
    assert [(len(series.files), series.siblings) for series in find_series(tmp_path).series] == [(SLICES, 1)] * 2


@pytest.mark.parametrize("keyword", ["EchoTime", "TemporalPositionIdentifier", "DiffusionBValue"])
@pytest.mark.parametrize("slices", [3, SLICES])
def test_takes_of_which_each_slice_has_an_acquisition_number_of_its_own_are_a_series_each(
    slices: int, keyword: str, tmp_path: Path
) -> None:
    def counted(take: int) -> Edit:
        def edit(k: int, data: Dataset) -> None:
            data.AcquisitionNumber, data.SOPInstanceUID, data.SliceThickness = 2 * k + take, f"1.2.{take}.{k}", None
            setattr(data, keyword, take)

        return edit

    for take in (1, 2):
        write_series(tmp_path / str(take), slices, edit=counted(take))
    found = find_series(tmp_path).series
    assert [(len(series.files), series.siblings) for series in found] == [(slices, 1)] * 2
    assert read_series(found[0].files).spacing_mm[2] == pytest.approx(STEP_MM)


@pytest.mark.parametrize(
    "edits",
    [
        (putting("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "DUAL_A"]),
         putting("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "DUAL_B"])),
        (moving(0, 1), moving(0.9, 2)),  # phases of contrast medium, each whole
        (moving(0, 1), moving(STEP_MM / 2, 2)),
        (moving(0, 1), moving(STEP_MM * 2.5, 2)),
        (moving(0, 1, SliceThickness=None), moving(STEP_MM * 2.5, 2, SliceThickness=None)),
        half_and_half(SliceThickness=None),
        half_and_half(SliceThickness=2),  # of MR, with a gap in each
        half_and_half(SliceThickness=2, SpacingBetweenSlices=STEP_MM),
        half_and_half(SliceThickness=0.25),  # thin slices far apart, in and out of breath
        half_and_half(SliceThickness=0.25, SpacingBetweenSlices=STEP_MM),
        (lambda k, data: setattr(data, "EchoTime", 1 + k % 2),),
        (lambda k, data: setattr(data, "ImageType", ["ORIGINAL" if k % 2 else "DERIVED", "PRIMARY", "AXIAL"]),),
        (putting("PatientID", "other", (4, 5)),),
    ],
)  # fmt: skip
def test_images_that_are_not_of_one_series_stay_apart_and_say_that_they_share_its_uid(
    edits: Sequence[Edit], tmp_path: Path
) -> None:
    for n, edit in enumerate(edits):
        write_series(tmp_path / str(n), edit=edit)
    found = find_series(tmp_path).series
    assert [series.siblings for series in found] == [1, 1]
    assert sum(len(series.files) for series in found) == SLICES * len(edits)


def test_films_of_one_series_are_images_of_their_own_and_so_are_series_without_a_uid(tmp_path: Path) -> None:
    def nameless(patient: str) -> Edit:
        def edit(k: int, data: Dataset) -> None:
            data.SeriesInstanceUID, data.PatientID = "", patient

        return edit

    for n in range(2):
        write(tmp_path / f"film{n}", radiograph())
    for patient in ("a", "b"):
        write_series(tmp_path / patient, edit=nameless(patient))
    assert [series.siblings for series in find_series(tmp_path).series] == [0] * 4


def test_what_is_no_image_is_counted_and_passed_over(tmp_path: Path) -> None:
    write_series(tmp_path / "series")
    write(tmp_path / "scout", slice_of(0)).write_bytes(b"")
    scout = slice_of(50)
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write(tmp_path / "scout", scout)
    segmentation = slice_of(60)
    segmentation.Modality = "SEG"
    write(tmp_path / "seg", segmentation)
    report = slice_of(70)
    report.Modality = "SR"
    del report.Rows, report.Columns, report.PixelData
    write(tmp_path / "report", report)
    directory = slice_of(80)
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = UID("1.2.840.10008.1.3.10")
    write(tmp_path / "DICOMDIR", directory)
    (tmp_path / "notes.txt").write_text("Doe, Jane")
    (tmp_path / "._x").write_bytes(b"\0\5\x16\7")
    (tmp_path / "broken.dcm").write_bytes(b"nothing")
    found = find_series(tmp_path)
    assert len(found.series) == 1
    assert found.ignored == {"localiser": 1, "DICOMDIR": 1, "not DICOM": 2}
    assert [path.name for path in found.objects] == ["report", "seg"]
    assert [path.name for path in found.unreadable] == ["broken.dcm"]


def test_a_head_of_which_too_much_would_have_to_be_read_is_not_called_broken(tmp_path: Path) -> None:
    write_series(tmp_path)
    with_empty_items(tmp_path / "9.dcm", MOST_PASSED)
    assert [error.code for error in find_series(tmp_path).unreadable.values()] == ["INPUT_TOO_LARGE"]
    (finding,) = list_cases(Where(tmp_path), "salt").findings
    assert (finding.code, finding.what.split()[:4]) == ("INPUT_TOO_LARGE", ["1", "files", "of", "DICOM"])
    with pytest.raises(ImageUnreadable, match="to know what it is") as e:
        read_image(tmp_path)
    assert e.value.code == "INPUT_TOO_LARGE"


def test_films_and_files_of_many_frames_stand_alone(tmp_path: Path) -> None:
    for n in range(2):
        write(tmp_path / f"film{n}", radiograph())
    write(tmp_path / "enhanced", enhanced())
    found = find_series(tmp_path)
    assert sorted((series.frames, len(series.files)) for series in found.series) == [(1, 1), (1, 1), (SLICES, 1)]


def test_what_macos_leaves_beside_each_file_is_no_broken_slice(tmp_path: Path) -> None:
    for path in write_series(tmp_path):
        path.with_name(f"._{path.name}.dcm").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(200))
    found = find_series(tmp_path)
    assert (found.unreadable, found.ignored) == ({}, {"not DICOM": SLICES})
    assert read_image(tmp_path).voxels.shape[3] == SLICES


def test_a_link_out_of_the_folder_is_refused_and_one_inside_passed_over(tmp_path: Path) -> None:
    (first, *_) = write_series(tmp_path / "data")
    write_series(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(first)
    found = find_series(tmp_path / "data")
    assert found.ignored == {"link": 1}
    assert len(found.series[0].files) == SLICES
    for target in (tmp_path / "elsewhere", tmp_path / "elsewhere" / first.name, Path("/etc/passwd")):
        link = tmp_path / "data" / "out"
        link.symlink_to(target)
        with pytest.raises(ImageUnreadable) as e:
            find_series(tmp_path / "data")
        assert e.value.code == "PATH_ESCAPE"
        link.unlink()


def test_a_folder_that_may_not_be_read_is_told_and_one_that_went_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a scandir that refuses, as no rights bind root."""
    for name in ("kept", "other"):
        write_series(tmp_path / name)
    seen = os.scandir

    def refusing(error: type[OSError]) -> None:
        def scandir(path: str) -> object:
            if Path(path).name == "other":
                raise error(13, "no", path)
            return seen(path)

        monkeypatch.setattr(os, "scandir", scandir)

    refusing(PermissionError)
    with pytest.raises(ImageUnreadable, match=r"a folder below it cannot be read \(PermissionError\)") as e:
        find_series(tmp_path)
    assert e.value.code == "FILE_MISSING"
    assert "other" not in str(e.value)
    with pytest.raises(ManifestInvalid, match=r"cannot be read \(PermissionError\)") as refused:
        list_cases(Where(tmp_path, layout="pacs"), "salt")
    assert refused.value.code == "FILE_MISSING"
    refusing(FileNotFoundError)
    assert [len(series.files) for series in find_series(tmp_path).series] == [SLICES]


def test_a_pipe_is_no_file_and_never_opened(tmp_path: Path) -> None:
    (first, *_) = write_series(tmp_path)
    os.mkfifo(tmp_path / "reads.xml")
    ignored: Counter[str] = Counter()
    assert len(found := list(files_below(tmp_path.resolve(), ignored))) == SLICES
    assert first.resolve() in found
    assert ignored == {"no file": 1}


def test_a_folder_of_none_or_two_series_or_with_a_broken_file_is_not_guessed_at(tmp_path: Path) -> None:
    def code(folder: Path) -> str:
        with pytest.raises(ImageUnreadable) as e:
            read_image(folder)
        assert "pytest" not in str(e.value)
        return e.value.code

    (tmp_path / "empty").mkdir()
    assert code(tmp_path / "empty") == "DICOM_UNREADABLE"
    write_series(tmp_path / "two" / "a")
    write_series(tmp_path / "two" / "b", edit=putting("SeriesInstanceUID", "1.2.826.7"))
    assert code(tmp_path / "two") == "SERIES_MIXED"
    paths = write_series(tmp_path / "broken")
    content = paths[-1].read_bytes()
    for keep in (150, 500):  # within the group of the file, and before the rows
        paths[-1].write_bytes(content[:keep])
        assert code(tmp_path / "broken") == "DICOM_UNREADABLE"


def test_headers_are_read_without_their_pixels(tmp_path: Path) -> None:
    def large(k: int, data: Dataset) -> None:
        data.Rows = data.Columns = 512
        data.PixelData = np.zeros((512, 512), np.uint16).tobytes()

    paths = write_series(tmp_path, edit=large)
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\xe0\x7f\x10\0") + 12])  # the pixels themselves are gone
    assert len(find_series(tmp_path).series[0].files) == SLICES
