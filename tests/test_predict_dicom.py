"""Results as DICOM, read back by highdicom and pydicom: on the slices of the source, coded, and called no diagnosis."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from highdicom.sr import srread
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import PersonName

from fedclient.data.dicom import read_series
from fedclient.data.seg import read_seg
from fedclient.data.volume import Volume
from fedclient.predict.case import Prediction, predict_case
from fedclient.predict.dicom_sc import burnt_in
from fedclient.predict.headers import Headers
from fedclient.predict.outputs import write_case
from shared_models.study import Preprocess, Study, Task
from simulations.fixtures.dicom import write_dicom_series
from tests.dicoms import NAME, ORIGIN_MM, STEP_MM, putting, without, write, write_series
from tests.marking import DARK_HU, LUNG, NODULES, bright, chest_hu, dark, model
from tests.test_dicom import enhanced

AFFINE = np.diag([0.8, 0.7, 2.5, 1.0])
DICOM = ("seg", "sr", "sc")
VALIDATOR = shutil.which("dciodvfy")
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def written(folder: Path, hu: Any, study: Study = LUNG, through: Any = None, **how: Any) -> tuple[Path, Prediction]:
    """The folder of the results of a series of `hu`."""
    write_dicom_series(folder / "ct", Volume(hu, AFFINE.copy(), "CT"), **how)
    made = model(study) if through is None else model(study, through)
    found = predict_case(made, folder / "ct")
    files, _ = write_case(found, "case", folder, DICOM)
    assert files == ["segmentation.dcm", "report.dcm", "overlay.dcm"]
    return folder / "case", found


def content(path: Path) -> Any:
    """What a report says, as highdicom parses it by its template."""
    return srread(path).content


def source_volume(folder: Path) -> hd.Volume:
    """By highdicom's own reader."""
    return hd.get_volume_from_series([dcmread(path) for path in sorted(folder.iterdir())])


@pytest.mark.parametrize(
    ("directions", "planes"), [((1, 1, 1), 5), ((-1, 1, -1), 5), ((1, -1, 1), 37), ((-1, -1, -1), 37)]
)
def test_a_segmentation_lies_on_the_very_slices_of_its_source(directions, planes, tmp_path):
    hu = chest_hu((40, 36, planes))
    folder, _ = written(tmp_path, hu, directions=directions)
    seg, source = hd.seg.segread(folder / "segmentation.dcm"), source_volume(tmp_path / "ct")
    found = seg.get_volume(combine_segments=True)
    assert np.allclose(found.affine, source.affine, atol=1e-4)
    assert found.array.shape == source.array.shape
    assert np.array_equal(found.array, (source.array < DARK_HU).astype(np.uint8))
    first = dcmread(next((tmp_path / "ct").iterdir()))
    assert seg.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert seg.StudyInstanceUID == first.StudyInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    referred = {each.ReferencedSOPInstanceUID for each in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {dcmread(path).SOPInstanceUID for path in (tmp_path / "ct").iterdir()}


def test_each_slice_has_the_frame_that_was_drawn_on_it(tmp_path):
    folder, _ = written(tmp_path, chest_hu((40, 36, 37)), shuffled=True)
    seg = hd.seg.segread(folder / "segmentation.dcm")
    slices = [dcmread(path) for path in (tmp_path / "ct").iterdir()]
    frames = seg.get_pixels_by_source_instance([each.SOPInstanceUID for each in slices], combine_segments=True)
    for each, frame in zip(slices, frames, strict=True):
        assert np.array_equal(frame > 0, each.pixel_array - 1024.0 < DARK_HU)


def test_our_own_reader_finds_what_was_marked(tmp_path):
    folder, found = written(tmp_path, chest_hu())
    volume = read_series(sorted((tmp_path / "ct").iterdir()))
    assert np.array_equal(read_seg(folder / "segmentation.dcm", volume, {"lung": 1}), found.mask)


def test_slices_across_another_axis_get_their_frames_too(tmp_path):
    write_series(tmp_path / "ct", cosines=SAGITTAL)
    found = predict_case(model(), tmp_path / "ct")
    assert not found.grid.slices_along_k
    write_case(found, "case", tmp_path, ("seg",))
    seg, source = hd.seg.segread(tmp_path / "case/segmentation.dcm"), source_volume(tmp_path / "ct")
    assert np.array_equal(seg.get_volume(combine_segments=True).array > 0, source.array < DARK_HU)
    assert 0 < found.mask.mean() < 1


@pytest.mark.parametrize("frames", [1, 6])
def test_an_enhanced_image_whatever_its_order_of_frames_gets_a_segmentation_on_its_own_planes(frames, tmp_path):
    source = write(tmp_path / "enhanced.dcm", enhanced(frames))
    files, _ = write_case(predict_case(model(LUNG), source), "case", tmp_path, DICOM)
    assert files == ["segmentation.dcm", "report.dcm", "overlay.dcm"]
    assert_valid(tmp_path / "case")
    seg = hd.seg.segread(tmp_path / "case" / "segmentation.dcm")
    read = dcmread(source)
    planes = {}
    for group, stored in zip(
        read.PerFrameFunctionalGroupsSequence, read.pixel_array.reshape(frames, read.Rows, -1), strict=True
    ):
        scale = group.PixelValueTransformationSequence[0]
        height = group.PlanePositionSequence[0].ImagePositionPatient[2]
        planes[float(height)] = stored * float(scale.RescaleSlope) + float(scale.RescaleIntercept)
    found = seg.get_volume(combine_segments=True)
    assert np.array_equal(found.array, [planes[height] < DARK_HU for height in sorted(planes, reverse=True)])
    assert found.array.any()
    assert np.allclose(found.affine[:3, 3], [*ORIGIN_MM[:2], max(planes)])
    assert np.allclose(found.affine[:3, 0], [0, 0, -STEP_MM])


@pytest.mark.parametrize(
    ("edit", "thickness_mm"),
    [
        (putting("SpacingBetweenSlices", "1.0"), 3),  # another reconstruction's
        (putting("SpacingBetweenSlices", "-2.5"), 3),
        (without("SliceThickness"), STEP_MM),
        (putting("SliceThickness", ""), STEP_MM),
    ],
)
@pytest.mark.parametrize("slices", [6, 37])
def test_a_segmentation_says_how_far_apart_its_planes_lie_whatever_the_header_says(
    edit, thickness_mm, slices, tmp_path
):
    write_series(tmp_path / "ct", slices, edit=edit)
    assert results_of(tmp_path / "ct", tmp_path) == {}
    seg = hd.seg.segread(tmp_path / "case/segmentation.dcm")
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SpacingBetweenSlices == pytest.approx(STEP_MM)
    assert measures.SliceThickness == pytest.approx(thickness_mm)
    assert seg.get_volume(combine_segments=True).spacing[0] == pytest.approx(STEP_MM)
    volume = read_series(sorted((tmp_path / "ct").iterdir()))
    drawn = read_seg(tmp_path / "case/segmentation.dcm", volume, {"lung": 1})
    assert np.array_equal(drawn, predict_case(model(LUNG), tmp_path / "ct").mask)


def test_a_segmentation_of_an_enhanced_image_says_how_far_apart_its_planes_lie(tmp_path):
    data = enhanced()
    (measures,) = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.SpacingBetweenSlices = 1
    del measures.SliceThickness
    assert results_of(write(tmp_path / "enhanced.dcm", data), tmp_path) == {}
    assert_valid(tmp_path / "case")
    seg = hd.seg.segread(tmp_path / "case/segmentation.dcm")
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert (measures.SpacingBetweenSlices, measures.SliceThickness) == pytest.approx((STEP_MM, STEP_MM))
    assert seg.get_volume(combine_segments=True).spacing[0] == pytest.approx(STEP_MM)


def test_a_segmentation_says_what_it_shows_and_which_release_drew_it(tmp_path):
    folder, _ = written(tmp_path, chest_hu())
    seg = hd.seg.segread(folder / "segmentation.dcm")
    assert seg.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert (seg.SegmentationType, seg.Modality, seg.NumberOfFrames) == ("BINARY", "SEG", 5)
    described = seg.get_segment_description(1)
    assert (described.segmented_property_type.value, described.segmented_property_type.scheme_designator) == (
        "39607008",
        "SCT",
    )
    algorithm: Any = described.algorithm_identification
    assert (algorithm.name, algorithm.version, algorithm.parameters["release_sha256"]) == ("dark", "1.0", "d" * 64)
    assert described.algorithm_type.value == "AUTOMATIC"
    assert "not for diagnosis" in seg.SeriesDescription


def test_a_label_that_is_in_no_table_is_named_in_a_scheme_of_our_own(tmp_path):
    folder, _ = written(tmp_path, chest_hu(), replace(LUNG, task=Task(labels=("widget",))))
    kind = hd.seg.segread(folder / "segmentation.dcm").get_segment_description(1).segmented_property_type
    assert (kind.value, kind.scheme_designator, kind.meaning) == ("widget", "99FEDIMAGING", "widget")


def test_labels_that_begin_alike_have_codes_of_their_own(tmp_path):
    labels = ("carcinoma-of-lung-left", "carcinoma-of-lung-right", "carcinoma-of-lung-right-upper-lobe-adenocarcinoma")
    study = replace(LUNG, task=Task(labels=labels))
    folder, _ = written(tmp_path, chest_hu(), study, lambda images: np.repeat(dark(images), 3, axis=1))
    seg = hd.seg.segread(folder / "segmentation.dcm")
    kinds = [seg.get_segment_description(n).segmented_property_type for n in (1, 2, 3)]
    assert [kind.meaning for kind in kinds] == list(labels)
    assert len({kind.value for kind in kinds}) == 3
    assert all(len(kind.value) <= 16 for kind in kinds)  # DICOM's SH
    told = content(folder / "report.dcm").get_volumetric_roi_measurement_groups()
    assert [group.finding_type for group in told] == kinds


def nodules() -> Any:
    hu = np.full((1, 40, 36, 5), 40.0, np.float32)
    hu[0, 4:9, 6:9, 1:3] = 800  # 5 x 3 x 2 voxels
    hu[0, 20, 20, 4] = 800
    return hu


def test_each_nodule_is_a_segment_and_a_measurement_group_of_its_own(tmp_path):
    folder, _ = written(tmp_path, nodules(), NODULES, bright)
    seg = hd.seg.segread(folder / "segmentation.dcm")
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == ["nodule 1", "nodule 2"]
    voxels = seg.get_volume().array
    assert [int(voxels[..., n].sum()) for n in (0, 1)] == [30, 1]
    groups = content(folder / "report.dcm").get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["nodule 1", "nodule 2"]
    told = [{m.name.meaning: (m.value, m.unit.value) for m in group.get_measurements()} for group in groups]
    voxel_mm3 = 0.8 * 0.7 * 2.5
    longest = np.hypot(4 * 0.8, 2 * 0.7)
    along = np.hypot(4 * 0.8 / longest * 0.8, 2 * 0.7 / longest * 0.7)
    assert told[0]["Volume"] == (pytest.approx(30 * voxel_mm3, abs=1e-3), "mm3")
    assert told[0]["Long axis"] == (pytest.approx(longest + along, abs=1e-3), "mm")
    assert told[1]["Long axis"] == (pytest.approx(0.7, abs=1e-3), "mm")
    assert [group.referenced_segment.referenced_segment_numbers for group in groups] == [[1], [2]]
    assert {group.referenced_segment.referenced_sop_instance_uid for group in groups} == {seg.SOPInstanceUID}
    assert groups[0].finding_type.value == "27925004"


def test_where_nothing_is_marked_the_results_say_so(tmp_path):
    hu = np.full((1, 40, 36, 5), 40.0, np.float32)
    hu[0, :3] = -900
    folder, found = written(tmp_path, hu, NODULES, bright)
    assert not found.answers[0].called
    assert not hd.seg.segread(folder / "segmentation.dcm").pixel_array.any()
    (group,) = content(folder / "report.dcm").get_volumetric_roi_measurement_groups()
    assert [(m.name.meaning, m.value) for m in group.get_measurements()] == [("Volume", 0)]


def test_a_report_refers_to_the_slices_and_is_neither_verified_nor_final(tmp_path):
    folder, _ = written(tmp_path, chest_hu())
    report = dcmread(folder / "report.dcm")
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    referred = {
        each.ReferencedSOPInstanceUID
        for series in study.ReferencedSeriesSequence
        for each in series.ReferencedSOPSequence
    }
    assert {dcmread(path).SOPInstanceUID for path in (tmp_path / "ct").iterdir()} <= referred
    assert dcmread(folder / "segmentation.dcm").SOPInstanceUID in referred
    assert report.VerificationFlag == "UNVERIFIED"
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"


def test_a_capture_shows_the_marks_and_burnt_in_words(tmp_path):
    folder, found = written(tmp_path, chest_hu())
    capture = dcmread(folder / "overlay.dcm")
    assert (capture.SOPClassUID.name, capture.PhotometricInterpretation) == ("Secondary Capture Image Storage", "RGB")
    assert "not for diagnosis" in capture.SeriesDescription
    pixels = capture.pixel_array
    half = 512 * 40 * 8 // (512 * 36 * 7)  # of which only that it is there matters: the words are below both panels
    assert half >= 1
    words = pixels[-40:]
    assert (words.max(axis=2) > 200).sum() > 500
    orange = (pixels.astype(int) == (230, 159, 0)).all(axis=2)
    assert orange.any()
    shown = [dcmread(path) for path in (tmp_path / "ct").iterdir()]
    referred = capture.SourceImageSequence[0].ReferencedSOPInstanceUID
    (most,) = [each for each in shown if each.SOPInstanceUID == referred]
    assert np.isclose(float(most.ImagePositionPatient[2]), AFFINE[2, 2] * found.key.k)


@pytest.mark.parametrize(
    ("cosines", "letters"),
    [
        ((1, 0, 0, 0, 1, 0), ["L", "P"]),
        ((-1, 0, 0, 0, -1, 0), ["R", "A"]),  # a patient who lies on the belly, feet first or not
        ((1, 0, 0, 0, -1, 0), ["L", "A"]),
        ((0, -1, 0, 1, 0, 0), ["A", "L"]),
        ((0.8, 0.6, 0, -0.6, 0.8, 0), ["L", "P"]),  # askew: the nearest
        (SAGITTAL, ["L", "P"]),  # its planes are shown as axial ones
    ],
)
def test_a_capture_says_which_way_its_own_rows_and_columns_run_in_the_patient(cosines, letters, tmp_path):
    write_series(tmp_path / "ct", cosines=tuple(map(float, cosines)))
    write_case(predict_case(model(), tmp_path / "ct"), "case", tmp_path, ("sc",))
    assert list(dcmread(tmp_path / "case/overlay.dcm").PatientOrientation) == letters


def test_results_carry_the_patient_and_the_study_and_their_messages_do_not(tmp_path):
    write_series(tmp_path / "ct")
    found = predict_case(model(), tmp_path / "ct")
    write_case(found, "case", tmp_path, DICOM)
    for path in (tmp_path / "case").iterdir():
        assert str(dcmread(path).PatientName) == NAME
    assert NAME not in repr(found)


def _empty_study(_: int, data: Dataset) -> None:
    data.StudyInstanceUID = ""


@pytest.mark.parametrize("edit", [without("StudyInstanceUID"), _empty_study])
def test_a_header_without_its_study_bears_no_dicom_result(tmp_path, edit):
    write_series(tmp_path / "ct", edit=edit)
    found = predict_case(model(), tmp_path / "ct")
    with pytest.raises(Exception, match="does not bear a result"):
        write_case(found, "case", tmp_path, DICOM)
    assert not (tmp_path / "case").exists()
    write_case(found, "case", tmp_path, ("nifti",))


def results_of(source: Path, folder: Path) -> dict[str, str]:
    """What could not be made of it."""
    return write_case(predict_case(model(LUNG), source), "case", folder, DICOM)[1]


@pytest.mark.parametrize(
    ("sets", "name", "told"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎", "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞", "Hong^Gildong=洪^吉洞"),
        (["ISO_IR 100", "ISO 2022 IR 126"], "Müller", "Müller"),
        ("ISO_IR_100", "Mueller", "Mueller"),
        ("ISO_IR 192", b"M\xfcller^Eva", "M\N{REPLACEMENT CHARACTER}ller^Eva"),  # says UTF-8, and is Latin-1
    ],
)
def test_a_name_in_whatever_alphabet_stands_in_the_results(sets, name, told, tmp_path):
    def named(k: int, data: Any) -> None:
        data.SpecificCharacterSet = sets
        data.PatientName = PersonName(name) if isinstance(name, bytes) else name

    with disable_value_validation():
        write_series(tmp_path / "ct", edit=named)
    assert results_of(tmp_path / "ct", tmp_path) == {}
    for path in (tmp_path / "case").iterdir():
        assert str(dcmread(path).PatientName) == told


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        *[("PatientSex", value) for value in ("U", "W", "m", "Male")],
        *[("PatientBirthDate", value) for value in ("1950", "19500000", "00000000", "unknown")],
        ("StudyDate", "2026-01-05"), ("StudyTime", "12:00:01"), ("StudyTime", "240000"),
    ],
)  # fmt: skip
def test_a_fact_of_the_header_that_breaks_the_standard_is_left_empty_and_costs_no_result(keyword, value, tmp_path):
    with disable_value_validation():
        write_series(tmp_path / "ct", edit=lambda k, data: setattr(data, keyword, value))
    assert results_of(tmp_path / "ct", tmp_path) == {}
    for path in (tmp_path / "case").iterdir():
        assert dcmread(path)[keyword].is_empty


def test_slices_whose_orientation_differs_by_rounding_bear_results(tmp_path):
    def jitter(k: int, data: Any) -> None:
        data.ImageOrientationPatient = [1, 1e-8 * k, 0, -1e-8 * k, 1, 0]

    write_series(tmp_path / "ct", edit=jitter)
    assert results_of(tmp_path / "ct", tmp_path) == {}
    volume = read_series(sorted((tmp_path / "ct").iterdir()))
    drawn = read_seg(tmp_path / "case/segmentation.dcm", volume, {"lung": 1})
    assert np.array_equal(drawn, predict_case(model(LUNG), tmp_path / "ct").mask)


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize(
    "moved", [("PlaneOrientationSequence",), ("PlaneOrientationSequence", "PixelMeasuresSequence")]
)
def test_an_enhanced_image_whose_frames_say_their_orientation_each_bears_the_same_results(moved, frames, tmp_path):
    data = enhanced(frames)
    (shared,) = data.SharedFunctionalGroupsSequence
    for keyword in moved:
        for group in data.PerFrameFunctionalGroupsSequence:
            setattr(group, keyword, shared[keyword].value)
        delattr(shared, keyword)
    assert results_of(write(tmp_path / "ours.dcm", data), tmp_path) == {}
    assert results_of(write(tmp_path / "plain.dcm", enhanced(frames)), tmp_path / "plain") == {}
    found, plain = (
        hd.seg.segread(each / "case/segmentation.dcm").get_volume() for each in (tmp_path, tmp_path / "plain")
    )
    assert np.array_equal(found.array, plain.array)
    assert np.allclose(found.affine, plain.affine)


def test_a_file_of_many_frames_with_one_place_for_all_gets_everything_but_a_segmentation(tmp_path):
    write_series(tmp_path / "ct")
    stored = [dcmread(path) for path in sorted((tmp_path / "ct").iterdir())]
    stored.sort(key=lambda each: float(each.ImagePositionPatient[2]))
    data = stored[0]
    data.NumberOfFrames, data.SpacingBetweenSlices = len(stored), STEP_MM
    data.PixelData = b"".join(each.PixelData for each in stored)
    found = predict_case(model(LUNG), write(tmp_path / "many.dcm", data))
    files, missing = write_case(found, "case", tmp_path, (*DICOM, "nifti"))
    assert files == ["report.dcm", "overlay.dcm", "mask.nii.gz"]
    assert "do not say where they lie" in missing["seg"]


def test_a_format_that_the_header_does_not_bear_costs_no_other(tmp_path):
    write_series(tmp_path / "ct", edit=without("StudyInstanceUID"))
    found = predict_case(model(), tmp_path / "ct")
    files, missing = write_case(found, "case", tmp_path, (*DICOM, "nifti", "json"))
    assert files == ["mask.nii.gz", "result.json"]
    assert set(missing) == set(DICOM)
    assert all("does not bear a result" in why for why in missing.values())
    assert json.loads((tmp_path / "case/result.json").read_text())["not_written"] == missing


def test_slices_in_two_frames_of_reference_are_refused(tmp_path):
    write_series(tmp_path / "ct")
    found = predict_case(model(), tmp_path / "ct")
    data = dcmread(next((tmp_path / "ct").iterdir()))
    data.FrameOfReferenceUID = "1.2.3"
    data.save_as(found.source.files[0])  # type: ignore[union-attr]
    with pytest.raises(Exception, match="more than one frame of reference"):
        write_case(found, "case", tmp_path, ("seg",))


def test_a_radiograph_gets_report_and_capture_and_no_segmentation(tmp_path):
    def film(k: int, data: Any) -> None:
        data.Modality, data.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"
        for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "FrameOfReferenceUID"):
            delattr(data, keyword)

    write_series(tmp_path / "dx", slices=1, edit=film)
    study = replace(LUNG, modality="xray", preprocess=Preprocess((32, 32), "crop_pad", "percentile"))
    found = predict_case(model(study), tmp_path / "dx")
    files, missing = write_case(found, "case", tmp_path, DICOM)
    assert files == ["report.dcm", "overlay.dcm"]
    assert "no frame of reference" in missing["seg"]
    assert not dcmread(tmp_path / "case/overlay.dcm").PatientOrientation  # the film says nothing of it


def test_the_capture_of_a_radiograph_repeats_how_its_source_lies(tmp_path):
    def film(k: int, data: Any) -> None:
        data.Modality, data.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"
        data.PatientOrientation = ["R", "F"]
        for keyword in ("ImageOrientationPatient", "ImagePositionPatient", "FrameOfReferenceUID"):
            delattr(data, keyword)

    write_series(tmp_path / "dx", slices=1, edit=film)
    study = replace(LUNG, modality="xray", preprocess=Preprocess((32, 32), "crop_pad", "percentile"))
    write_case(predict_case(model(study), tmp_path / "dx"), "case", tmp_path, ("sc",))
    assert list(dcmread(tmp_path / "case/overlay.dcm").PatientOrientation) == ["R", "F"]


def assert_valid(folder: Path) -> None:
    """Of results, where the validator is installed."""
    for path in folder.iterdir() if VALIDATOR else ():
        found = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        errors = [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("Error")]
        assert not errors, (path.name, errors)


@pytest.mark.skipif(VALIDATOR is None, reason="dciodvfy is not installed (Debian: dicom3tools)")
@pytest.mark.parametrize("planes", [1, 5, 37])
def test_a_validator_finds_no_error(planes, tmp_path):
    folder, _ = written(tmp_path, chest_hu((40, 36, planes)))
    assert_valid(folder)


def item(**elements: str) -> list[Dataset]:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return [made]


@pytest.mark.parametrize(
    ("stated", "gone"),
    [
        ({"ReferencedPatientSequence": item(ReferencedSOPInstanceUID="1.2.3")}, "ReferencedPatientSequence"),
        ({"ProcedureCodeSequence": item(CodeMeaning="CT of the chest")}, "ProcedureCodeSequence"),
        ({"ProcedureCodeSequence": item(CodeValue="", CodingSchemeDesignator="99X")}, "ProcedureCodeSequence"),
        ({"PatientAge": "45"}, "PatientAge"),
        ({"PatientWeight": "80.5"}, "PatientWeight"),  # with a comma in the file
        ({"PatientIdentityRemoved": "YES"}, "PatientIdentityRemoved"),
        ({"StudyDescription": "x" * 65}, "StudyDescription"),
        ({"ClinicalTrialSponsorName": "ACME"}, "ClinicalTrialSponsorName"),
    ],
)
def test_what_is_broken_in_a_source_and_may_be_left_out_is_not_repeated(stated, gone, tmp_path):
    def odd(k: int, data: Dataset) -> None:
        with disable_value_validation():
            for keyword, value in stated.items():
                setattr(data, keyword, value)

    for path in write_series(tmp_path / "ct", edit=odd):
        path.write_bytes(path.read_bytes().replace(b"DS\4\0" + b"80.5", b"DS\4\0" + b"80,5"))
    write_case(predict_case(model(LUNG), tmp_path / "ct"), "case", tmp_path, DICOM)
    assert_valid(tmp_path / "case")
    for name in ("segmentation.dcm", "report.dcm", "overlay.dcm"):
        made = dcmread(tmp_path / "case" / name)
        assert gone not in made
        assert (made.PatientName, made.PatientID) == (NAME, "MRN4711")


def test_what_is_sound_in_a_source_is_repeated_and_a_trial_gets_its_empty_elements(tmp_path):
    stated = {
        "ReferencedPatientSequence": item(ReferencedSOPClassUID="1.2.4", ReferencedSOPInstanceUID="1.2.3"),
        "ProcedureCodeSequence": item(CodeValue="1", CodingSchemeDesignator="99X", CodeMeaning="CT of the chest"),
        "PatientAge": "045Y",
        "PatientWeight": "80.5",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "by hand",
        "StudyDescription": "Müller-Thorax",
        "ClinicalTrialSponsorName": "ACME",
        "ClinicalTrialProtocolID": "P1",
        "ClinicalTrialSubjectID": "S3",
    }

    def told(k: int, data: Dataset) -> None:
        data.SpecificCharacterSet = "ISO_IR 100"
        for keyword, value in stated.items():
            setattr(data, keyword, value)

    write_series(tmp_path / "ct", edit=told)
    write_case(predict_case(model(LUNG), tmp_path / "ct"), "case", tmp_path, ("seg", "sr"))
    assert_valid(tmp_path / "case")
    for name in ("segmentation.dcm", "report.dcm"):
        made = dcmread(tmp_path / "case" / name)
        assert {keyword: made[keyword].value for keyword in stated} == stated
        assert made.ClinicalTrialSiteName == ""


@pytest.mark.parametrize(
    ("stated", "modality", "told"), [("YES", "CT", "YES"), ("NO", "US", "NO"), ("", "CT", "NO"), ("", "US", "")]
)
def test_an_overlay_says_of_names_in_its_pixels_what_its_source_says(stated, modality, told):
    first = Dataset()
    first.Modality = modality
    if stated:
        first.BurnedInAnnotation = stated
    assert burnt_in(Headers(first, (first,))) == told
