"""DICOM that could be misread is refused, each fault by its own code, and no message tells who or where."""

import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from fedclient.data import dicom_header, dicom_pixels
from fedclient.data.dicom import find_series, read_series
from fedclient.data.images import read_image
from fedclient.data.stack import TILT_DEG, Plane, plane, stack
from shared_models.errors import ImageUnreadable
from tests.dicoms import (
    ORIGIN_MM,
    SLICES,
    STEP_MM,
    item,
    putting,
    recode,
    set_pixels,
    slice_of,
    stored_pixels,
    with_empty_items,
    without,
    write,
    write_series,
)
from tests.test_dicom import enhanced, radiograph


def refusal(read: Callable[[], object], code: str) -> str:
    """The message; it must come with that code, and tell neither patient, nor identifier, nor file."""
    with pytest.raises(ImageUnreadable) as e:
        read()
    message = str(e.value)
    assert e.value.code == code, message
    assert e.value.__cause__ is None
    assert e.value.__suppress_context__ or e.value.__context__ is None
    for secret in ("Doe", "Jane", "4711", "1.2.826", "pytest", "/tmp"):
        assert secret not in message, message
    return message


def shifted(by_mm: dict[int, float], sideways_mm: dict[int, float] | None = None) -> Callable[[int, Dataset], None]:
    """Moves slices along z, and along y."""

    def edit(k: int, data: Dataset) -> None:
        x, y, z = (float(mm) for mm in data.ImagePositionPatient)
        data.ImagePositionPatient = [x, y + (sideways_mm or {}).get(k, 0), z + by_mm.get(k, 0)]

    return edit


def test_a_missing_slice_is_a_gap_with_its_count(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    assert "1 slices are missing" in refusal(lambda: read_series(paths[:2] + paths[3:]), "SERIES_GAP")
    assert "3 slices are missing" in refusal(lambda: read_series([paths[0], paths[1], paths[5]]), "SERIES_GAP")
    assert read_series(paths[1:]).voxels.shape[-1] == SLICES - 1  # one missing at an end cannot be seen


def test_two_slices_at_one_place_are_duplicates(tmp_path: Path) -> None:
    paths = write_series(tmp_path, edit=shifted({3: -STEP_MM}))
    assert "1 of 6 slices" in refusal(lambda: read_series(paths), "SERIES_DUPLICATE")
    refusal(lambda: read_series([*paths, paths[0]]), "SERIES_DUPLICATE")


@pytest.mark.parametrize(("off_mm", "fine"), [(0.02, True), (0.03, False), (-0.3, False)])
def test_distances_may_vary_by_one_percent(off_mm: float, fine: bool, tmp_path: Path) -> None:
    paths = write_series(tmp_path, edit=shifted({5: off_mm}))
    if fine:
        assert read_series(paths).spacing_mm[2] == pytest.approx(STEP_MM + off_mm / 5)
    else:
        assert "more than 1 %" in refusal(lambda: read_series(paths), "SERIES_IRREGULAR")


def along_z(heights_mm: Sequence[float]) -> list[Plane]:
    return [plane((-30.5, -20.25, z), (1, 0, 0, 0, 1, 0), (0.5, 0.5)) for z in heights_mm]


@pytest.mark.parametrize("step_mm", [0.3125, 0.625, 0.4, 1.25])
@pytest.mark.parametrize("start_mm", [-394.375, -94.37, 1204.8125])
def test_positions_written_to_a_hundredth_of_a_millimetre_are_regular(step_mm: float, start_mm: float) -> None:
    heights = [float(np.float32(round(start_mm + step_mm * k, 2))) for k in range(200)]
    grid = stack(along_z(heights), step_mm)
    assert grid.affine_ras[2, 2] == pytest.approx(step_mm, abs=0.011 / 199)


@pytest.mark.parametrize(
    ("heights_mm", "code"),
    [
        ([0, 0.31, 0.63, 1.25, 1.56, 1.88], "SERIES_GAP"),  # 0.94 is missing
        ([0, 0.31, 0.63, 0.97, 1.25, 1.56, 1.88], "SERIES_IRREGULAR"),  # 0.94 is 0.03 off
        ([0, 0.63, 1.25, 1.91, 2.5, 3.13], "SERIES_IRREGULAR"),  # 1.88 is 0.03 off
        ([0, 0.02, 0.04, 0.08, 0.1, 0.12], "SERIES_GAP"),  # thinner than rounding may be; 0.06 is missing
    ],
)
def test_thin_slices_that_are_not_regular_are_refused(heights_mm: list[float], code: str) -> None:
    refusal(lambda: stack(along_z(heights_mm), 1), code)


@pytest.mark.parametrize("tilt_deg", [15.0, -15.0, 2.0])
def test_a_tilted_gantry_is_refused_with_its_angle(tilt_deg: float, tmp_path: Path) -> None:
    drift_mm = {k: STEP_MM * k * np.tan(np.radians(tilt_deg)) for k in range(SLICES)}
    paths = write_series(tmp_path, edit=shifted({}, drift_mm))
    assert f"leans by {abs(tilt_deg):.1f} degrees" in refusal(lambda: read_series(paths), "SERIES_TILT")


def test_a_lean_below_a_degree_is_kept_in_the_affine(tmp_path: Path) -> None:
    drift_mm = {k: STEP_MM * k * np.tan(np.radians(TILT_DEG / 2)) for k in range(SLICES)}
    volume = read_series(write_series(tmp_path, edit=shifted({}, drift_mm)))
    top = volume.affine_ras @ [7, 9, SLICES - 1, 1]  # column 0, row 0 of the last slice
    expected = np.add(ORIGIN_MM, (0, drift_mm[SLICES - 1], STEP_MM * (SLICES - 1)))
    assert top[:3] == pytest.approx(expected * (-1, -1, 1), abs=1e-6)


def test_a_slice_that_jumps_aside_is_no_tilt(tmp_path: Path) -> None:
    paths = write_series(tmp_path, edit=shifted({}, {3: 0.5}))
    assert "sideways" in refusal(lambda: read_series(paths), "SERIES_IRREGULAR")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
        ("PixelSpacing", [0.7, 0.9]),
        ("SeriesInstanceUID", "1.2.826.5"),
        ("Modality", "MR"),
    ],
)
def test_slices_of_two_kinds_are_not_stacked(keyword: str, value: object, tmp_path: Path) -> None:
    paths = write_series(tmp_path, edit=putting(keyword, value, (4,)))
    refusal(lambda: read_series(paths), "SERIES_MIXED")


def test_slices_of_two_sizes_are_not_stacked(tmp_path: Path) -> None:
    def smaller(k: int, data: Dataset) -> None:
        if k == 4:
            set_pixels(data, stored_pixels(k, 4, 4), bits=12)

    paths = write_series(tmp_path, edit=smaller)
    refusal(lambda: read_series(paths), "SERIES_MIXED")


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
@pytest.mark.parametrize("every", [True, False])
def test_a_slice_without_its_place_is_refused(keyword: str, every: bool, tmp_path: Path) -> None:
    paths = write_series(tmp_path, edit=without(keyword, range(SLICES) if every else (1,)))
    assert keyword in refusal(lambda: read_series(paths), "GEOMETRY_MISSING")


@pytest.mark.parametrize(
    "cosines", [(1, 0, 0, 0.2, 0.9797958971, 0), (2, 0, 0, 0, 1, 0), (1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0)]
)
def test_axes_that_make_no_right_angle_are_refused(cosines: tuple[float, ...], tmp_path: Path) -> None:
    data = slice_of(0)
    data.ImageOrientationPatient = list(cosines)
    refusal(lambda: read_image(write(tmp_path / "x", data)), "GEOMETRY_INVALID")


def test_a_pixel_spacing_of_zero_or_no_number_is_refused(tmp_path: Path) -> None:
    data = slice_of(0)
    data.PixelSpacing = [0, 0.7]
    refusal(lambda: read_image(write(tmp_path / "x", data)), "GEOMETRY_INVALID")
    data.PixelSpacing = ["inf", "1"]
    refusal(lambda: read_image(write(tmp_path / "x", data)), "GEOMETRY_MISSING")


@pytest.mark.parametrize("keep", [0, 10, 200, 700, -100, -20, -2])
def test_a_file_cut_short_is_refused(keep: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.dcm", slice_of(0))
    path.write_bytes(path.read_bytes()[:keep])
    refusal(lambda: read_image(path), "DICOM_UNREADABLE")


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit])
@pytest.mark.parametrize("inside", [True, False])
def test_compressed_pixels_cut_short_are_refused(syntax: UID, inside: bool, tmp_path: Path) -> None:
    data = slice_of(0)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64))
    set_pixels(data, noise.astype(np.uint8 if syntax == JPEGBaseline8Bit else np.uint16), bits=8)
    path = recode(write(tmp_path / "x.dcm", data), syntax)
    if inside:  # the file is whole, the frame in it is not
        data = dicom_header.load(path)
        (frame,) = generate_frames(data.PixelData, number_of_frames=1)
        data.PixelData = encapsulate([frame[: len(frame) // 2]])
        write(path, data, syntax)
    else:
        path.write_bytes(path.read_bytes()[:-300])
    refusal(lambda: read_image(path), "DICOM_UNREADABLE")


def test_a_missing_decoder_is_named_with_the_syntax_that_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recode(write(tmp_path / "x.dcm", slice_of(0)), JPEGLosslessSV1)
    monkeypatch.setattr(dicom_pixels, "get_decoder", lambda syntax: SimpleNamespace(available_plugins=("pillow",)))
    message = refusal(lambda: read_image(path), "DICOM_CODEC_MISSING")
    assert "1.2.840.10008.1.2.4.70" in message
    assert "python-gdcm" in message


def test_a_syntax_that_nothing_here_decodes_is_named(tmp_path: Path) -> None:
    data = slice_of(0)
    data.PixelData = encapsulate([b"\0\0\1\xba" * 20])
    data["PixelData"].VR = "OB"
    message = refusal(lambda: read_image(write(tmp_path / "x", data, MPEG2MPML)), "DICOM_CODEC_MISSING")
    assert "MPEG2" in message


def test_a_compressed_frame_larger_than_its_header_is_not_decoded(tmp_path: Path) -> None:
    path = recode(write(tmp_path / "x.dcm", slice_of(0)), JPEG2000Lossless)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\x4f\xff\x51") + 8
    content[at : at + 8] = (60_000).to_bytes(4) + (60_000).to_bytes(4)
    path.write_bytes(content)
    assert "60000 x 60000" in refusal(lambda: read_image(path), "DICOM_UNREADABLE")


@pytest.mark.parametrize(("at", "value"), [(6, 82), (6, 8), (11, 3), (13, 0), (15, 74), (3, 0xC1), (5, 3), (-1, 0)])
def test_a_spoilt_jpeg_is_refused_before_gdcm_sees_it(at: int, value: int, tmp_path: Path) -> None:
    """gdcm 3.2.6 ends the process (SIGSEGV, SIGABRT) on the first and the fifth."""
    path = recode(write(tmp_path / "x", slice_of(0)), JPEGLosslessSV1)
    data = dicom_header.load(path)
    (frame,) = generate_frames(data.PixelData, number_of_frames=1)
    spoilt = bytearray(frame.rstrip(b"\0"))
    assert spoilt[:4] == b"\xff\xd8\xff\xc3"
    spoilt[at] = value
    data.PixelData = encapsulate([bytes(spoilt)])
    refusal(lambda: read_image(write(path, data, JPEGLosslessSV1)), "DICOM_UNREADABLE")


def test_run_lengths_far_longer_than_their_pixels_are_not_unpacked(tmp_path: Path) -> None:
    path = recode(write(tmp_path / "x", slice_of(0)), RLELossless)
    data = dicom_header.load(path)
    (frame,) = generate_frames(data.PixelData, number_of_frames=1)
    data.PixelData = encapsulate([frame + bytes(100_000)])
    refusal(lambda: read_image(write(path, data, RLELossless)), "DICOM_UNREADABLE")


def test_a_header_that_promises_gigabytes_is_refused_before_decoding(tmp_path: Path) -> None:
    data = slice_of(0)
    data.Rows = data.Columns = 60_000
    refusal(lambda: read_image(write(tmp_path / "x", data)), "INPUT_TOO_LARGE")
    many = enhanced()
    many.NumberOfFrames = 2_000_000_000
    refusal(lambda: read_image(write(tmp_path / "y", many)), "INPUT_TOO_LARGE")


def test_a_deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = set_pixels(slice_of(0), np.zeros((2000, 2000), np.uint16), bits=12)
    path = write(tmp_path / "x", data, DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(dicom_header, "MAX_BYTES", 1_000_000)
    assert "unpacks" in refusal(lambda: read_image(path), "INPUT_TOO_LARGE")


def test_of_a_deflated_file_no_more_is_unpacked_than_its_head(tmp_path: Path) -> None:
    data = set_pixels(slice_of(0), np.zeros((4000, 4000), np.uint16), bits=12)
    data.PatientName = "Müller"
    data.SpecificCharacterSet = "ISO_IR 192"
    path = write(tmp_path / "x", data, DeflatedExplicitVRLittleEndian)
    tracemalloc.start()
    try:
        head = dicom_header.load_head(path, [0x00080060, 0x00100010, 0x00280010])
        assert (head.Modality, head.PatientName, head.Rows) == ("CT", "Müller", 4000)
        assert head.file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
        assert tracemalloc.get_traced_memory()[1] < 3 * dicom_header.MOST_HEAD
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("group", [2, 8])
def test_items_without_number_are_no_objects_but_passed_over_or_refused(group: int, tmp_path: Path) -> None:
    def seen(path: Path) -> str:
        with dicom_header.unbroken():
            return str(dicom_header.load_head(path, [0x00080060]).Modality)

    assert seen(with_empty_items(tmp_path / "few", 2000, group)) == "CT"
    many = with_empty_items(tmp_path / "many", dicom_header.MOST_PASSED, group)
    assert "4 MiB" in refusal(lambda: seen(many), "INPUT_TOO_LARGE")
    some = with_empty_items(tmp_path / "some", 50_000, group)
    tracemalloc.start()
    try:
        with suppress(ImageUnreadable):
            seen(some)
        assert tracemalloc.get_traced_memory()[1] < 5 * dicom_header.MOST_HEAD
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_a_derived_slice_may_name_thousands_that_it_is_made_of(syntax: UID, stated: bool, tmp_path: Path) -> None:
    """A projection through a thin CT, as most scanners write it: sequences and items without a stated length."""
    (purpose,) = item(CodeValue="121322", CodingSchemeDesignator="DCM", CodeMeaning="Source image")
    (source,) = item(ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2", ReferencedSOPInstanceUID="1.2.3.4" * 8)
    source.PurposeOfReferenceCodeSequence = [purpose]
    source.add_new(0x00090010, "LO", "PRIVATE")
    source.add_new(0x00091010, "OB", struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) * 4)  # looks like an end, and is none
    data = slice_of(0)
    data.SourceImageSequence = [source] * 3000
    for of, keyword in ((source, "PurposeOfReferenceCodeSequence"), (data, "SourceImageSequence")):
        of[keyword].is_undefined_length = not stated
    source.is_undefined_length_sequence_item = purpose.is_undefined_length_sequence_item = not stated
    path = write(tmp_path / "x.dcm", data, syntax)
    with dicom_header.unbroken():
        head = dicom_header.load_head(path, [0x00080060, 0x00280010])
    assert (head.Modality, head.Rows) == ("CT", data.Rows)
    assert not find_series(tmp_path).unreadable


def test_a_sequence_of_unknown_vr_is_passed_over_as_implicit_and_one_cut_short_is_refused(tmp_path: Path) -> None:
    inner = struct.pack("<HHL", 8, 0x1155, 4) + b"1.2\0" + struct.pack("<HHL", 0x0008, 0x1140, 0xFFFFFFFF)
    inner += struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    inner += struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    items = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    items += inner + struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    content = write(tmp_path / "x", slice_of(0)).read_bytes()
    at = content.index(b"\x08\0\x08\0CS")
    begin = content[:at] + struct.pack("<HH2sHL", 8, 7, b"UN", 0, 0xFFFFFFFF)

    def seen(what: bytes) -> str:
        (tmp_path / "x").write_bytes(what)
        with dicom_header.unbroken():
            return str(dicom_header.load_head(tmp_path / "x", [0x00080060]).Modality)

    assert seen(begin + items + content[at:]) == "CT"
    refusal(lambda: seen(begin + items[:-8]), "DICOM_UNREADABLE")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_what_is_long_and_not_asked_for_does_not_count_to_a_head(syntax: UID, tmp_path: Path) -> None:
    data = enhanced()
    data.add_new(0x00090010, "LO", "LONG")
    data.add_new(0x00091010, "OB", b"\0" * (2 * dicom_header.MOST_VALUE))
    frame = Dataset()
    frame.add_new(0x00090010, "LO", "LONG")
    frame.add_new(0x00091010, "OB", b"\1" * dicom_header.MOST_HEAD)
    data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence.append(frame)
    data["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
    path = write(tmp_path / "x", data, syntax)
    head = dicom_header.load_head(path, [0x00080016, 0x0020000E, 0x00280008])
    assert (head.SOPClassUID, head.NumberOfFrames) == (data.SOPClassUID, data.NumberOfFrames)


@pytest.mark.parametrize("modality", ["CR", "DX", "OT"])
def test_a_colour_radiograph_is_refused(modality: str, tmp_path: Path) -> None:
    data = radiograph(Modality=modality)
    data.PixelData, data.PlanarConfiguration = bytes(10 * 8 * 3), 0
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, "RGB"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    assert "colour" in refusal(lambda: read_image(write(tmp_path / "x", data)), "MODALITY_MISMATCH")


def test_ct_without_its_scale_is_refused_and_mr_is_not(tmp_path: Path) -> None:
    data = slice_of(0)
    del data.RescaleIntercept
    assert "Hounsfield" in refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")
    data.Modality = "MR"
    assert read_image(write(tmp_path / "y", data)).voxels.max() == stored_pixels(0).max()


@pytest.mark.parametrize("unit", ["MGML", "Z_EFF", "ED"])
def test_ct_in_another_unit_than_hounsfield_is_refused(unit: str, tmp_path: Path) -> None:
    data = slice_of(0)
    for usual in ("HU", "US"):
        data.RescaleType = usual
        assert read_image(write(tmp_path / usual, data)).modality == "CT"
    data.RescaleType = unit
    assert "spectral" in refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")


def test_frames_of_an_enhanced_ct_in_another_unit_are_refused(tmp_path: Path) -> None:
    data = enhanced(slices=3)
    for frame in data.PerFrameFunctionalGroupsSequence:
        for scale in frame.get("PixelValueTransformationSequence", []):
            scale.RescaleType = "MGML"
    assert "spectral" in refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")


def test_ct_with_a_falling_scale_is_refused(tmp_path: Path) -> None:
    data = slice_of(0)
    data.RescaleSlope = "-1"
    assert "dense would be dark" in refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")


def test_pixels_that_lie_above_unused_bits_are_refused(tmp_path: Path) -> None:
    data = slice_of(0)
    data.PixelData, data.HighBit = (stored_pixels(0).astype(np.uint16) << 4).tobytes(), 15
    told = refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")
    assert "12 stored bits is bit 15" in told


def test_slices_of_two_frames_of_reference_are_no_volume(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", edit=putting("FrameOfReferenceUID", "1.2.826.0.1.3680043.9.7", {2}))
    assert "frame of reference" in refusal(lambda: read_series(files), "SERIES_MIXED")


@pytest.mark.parametrize("slope", ["0", "1e30"])
def test_a_slope_that_is_no_slope_is_refused(slope: str, tmp_path: Path) -> None:
    data = slice_of(0)
    data.RescaleSlope = slope
    refusal(lambda: read_image(write(tmp_path / "x", data)), "INTENSITY_INVALID")


@pytest.mark.parametrize(
    ("elements", "code", "words"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "DICOM_MOSAIC", "Siemens"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "VFRAME"]}, "DICOM_MOSAIC", "UIH"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "MODALITY_MISMATCH", "localiser"),
        ({"Modality": "SEG"}, "MODALITY_MISMATCH", "SEG object"),
        ({"NumberOfFrames": 2, "PixelData": bytes(2 * 160)}, "GEOMETRY_MISSING", "no place"),
    ],
)
def test_what_is_no_volume_is_refused_by_name(
    elements: dict[str, object], code: str, words: str, tmp_path: Path
) -> None:
    data = slice_of(0)
    for keyword, value in elements.items():
        setattr(data, keyword, value)
    assert words in refusal(lambda: read_image(write(tmp_path / "x", data)), code)


def test_several_films_are_no_volume(tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n), radiograph()) for n in range(2)]
    assert "radiographs" in refusal(lambda: read_series(paths), "MODALITY_MISMATCH")


def test_frames_at_one_place_in_an_enhanced_image_are_refused(tmp_path: Path) -> None:
    def twice(k: int, frame: Dataset) -> None:
        where = [*ORIGIN_MM[:2], ORIGIN_MM[2] + STEP_MM * (k // 2)]
        frame.PlanePositionSequence = item(ImagePositionPatient=where)

    path = write(tmp_path / "x", enhanced(edit=twice))
    assert "time points" in refusal(lambda: read_series([path]), "SERIES_DUPLICATE")


def test_a_part_of_an_enhanced_image_or_one_without_places_is_refused(tmp_path: Path) -> None:
    data = enhanced()
    data.InConcatenationTotalNumber = 3
    refusal(lambda: read_image(write(tmp_path / "x", data)), "SERIES_GAP")
    data = enhanced(edit=without("PlanePositionSequence", (2,)))
    refusal(lambda: read_image(write(tmp_path / "y", data)), "GEOMETRY_MISSING")
    data = enhanced()
    data.PerFrameFunctionalGroupsSequence = data.PerFrameFunctionalGroupsSequence[:-1]
    refusal(lambda: read_image(write(tmp_path / "z", data)), "DICOM_UNREADABLE")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(132, 1300), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
def test_spoilt_bytes_are_read_or_refused_but_nothing_else(spoilt: list[tuple[int, int]], many: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "x"), enhanced(2) if many else slice_of(0))
        content = bytearray(path.read_bytes())
        for at, value in spoilt:
            content[at % len(content)] = value
        path.write_bytes(content)
        message = ""
        try:
            volume = read_image(path)
            assert np.isfinite(volume.affine_ras).all()
            assert volume.voxels.ndim == 4
        except ImageUnreadable as e:
            message = str(e)
        assert "Doe" not in message
