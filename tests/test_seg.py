"""DICOM SEG: three kinds, against highdicom in both directions, and what does not lie on the image's grid."""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from fedclient.data.dicom import find_series, read_series
from fedclient.data.seg import read_seg, read_segments
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable
from simulations.fixtures import Segment, Written, write_dicom_series, write_seg
from simulations.fixtures.objects import Kind

DATA = Path(os.environ.get("FEDIMAGING_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
REAL = DATA / "ingest_formats" / "dicom"
hd: Any = highdicom
AFFINE = np.array([[0.7, 0, 0, -9], [0, 0.8, 0, 4], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])
SHAPE = (35, 33, 6)  # 1155 pixels: in a binary SEG frames begin in the middle of a byte


def refusal(code: str, call: Callable[..., object], *args: Any, **words: Any) -> str:
    with pytest.raises(ImageUnreadable) as e:
        call(*args, **words)
    assert e.value.code == code, str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def image() -> Volume:
    return Volume(np.random.default_rng(0).integers(-1000, 400, (1, *SHAPE)).astype(np.float32), AFFINE)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory, image: Volume) -> Written:
    return write_dicom_series(tmp_path_factory.mktemp("series"), image)


@pytest.fixture(scope="module")
def parts() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two structures that do not meet, on some of the slices each."""
    one, two = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    one[2:9, 3:11, 1:4], two[12:15, 1:5, 3:5] = True, True
    one[4, 5, 2] = False
    return one, two


def segments(parts: tuple[NDArray[Any], NDArray[Any]]) -> list[Segment]:
    return [Segment("Lung", parts[0], ("SCT", "39607008", "Lung")), Segment("Nodule", parts[1])]


KINDS: list[Kind] = ["BINARY", "FRACTIONAL", "LABELMAP"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [True, False])
def test_every_kind_comes_back_as_it_was_drawn(
    tmp_path: Path,
    image: Volume,
    series: Written,
    parts: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    kind: Kind,
    sparse: bool,
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts), kind=kind, sparse=sparse)
    expected = parts[0] * 1 + parts[1] * 2
    assert (read_seg(path, image, {"lung": 1, "2": 2}) == expected).all()
    assert (read_seg(path, image, {"SCT:39607008": 5}) == parts[0] * 5).all()
    assert (read_seg(path, image, {2: 1, 1: 1}) == (expected > 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_highdicom_reads_the_fixture_as_it_was_drawn(
    tmp_path: Path, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]], kind: Kind
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts), kind=kind)
    theirs = hd.seg.segread(str(path)).get_pixels_by_source_instance(
        list(series.stored.sop_uids), ignore_spatial_locations=True, combine_segments=kind != "FRACTIONAL",
        assert_missing_frames_are_empty=True,
    )  # fmt: skip
    if kind == "FRACTIONAL":
        theirs = theirs[..., 0] + 2 * theirs[..., 1]
    stored = theirs.transpose(2, 1, 0)  # [slices, rows, columns]
    assert (series.turned(parts[0] * 1 + parts[1] * 2) == stored).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_highdicom_writes_is_read_as_it_was_drawn(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]], kind: Kind
) -> None:
    masks = np.stack([series.turned(part).transpose(2, 1, 0) for part in parts], axis=-1)
    code = hd.sr.CodedConcept("85756007", "SCT", "Tissue")
    described = [
        hd.seg.SegmentDescription(n, label, code, code, hd.seg.SegmentAlgorithmTypeValues.MANUAL)
        for n, label in enumerate(("Lung", "Nodule"), start=1)
    ]
    sources = sorted((pydicom.dcmread(p) for p in series.paths), key=lambda d: float(d.ImagePositionPatient[2]))
    written = hd.seg.Segmentation(
        sources, masks.astype(np.float32 if kind == "FRACTIONAL" else np.uint8), kind, described,
        hd.UID(), 1, hd.UID(), 1, "maker", "model", "1", "1",
    )  # fmt: skip
    written.save_as(tmp_path / "s.dcm")
    assert (read_seg(tmp_path / "s.dcm", image, {"Lung": 1, "Nodule": 2}) == parts[0] * 1 + parts[1] * 2).all()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian])
def test_compressed_segments_are_read(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]], syntax: Any
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts), kind="FRACTIONAL", syntax=syntax)
    assert (read_seg(path, image, {"Lung": 1, "Nodule": 2}) == parts[0] * 1 + parts[1] * 2).all()


def test_a_missing_decoder_is_named_by_its_code(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts), kind="FRACTIONAL", syntax=RLELossless)
    data = path.read_bytes().replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.9\0")
    path.write_bytes(data)
    refusal("DICOM_CODEC_MISSING", read_seg, path, image, {"Lung": 1})


def test_a_fraction_is_measured_against_the_largest_value_there_can_be(
    tmp_path: Path, image: Volume, series: Written
) -> None:
    shares = np.zeros(SHAPE)
    shares[3, 4, 2], shares[4, 4, 2], shares[5, 4, 2] = 0.4, 0.5, 1.0
    for full in (10, 100, 250):
        path = write_seg(tmp_path / "s.dcm", series, [Segment("Lung", shares)], kind="FRACTIONAL", full=full)
        assert np.argwhere(read_seg(path, image, {"Lung": 1}))[:, 0].tolist() == [4, 5]
        assert np.argwhere(read_seg(path, image, {"Lung": 1}, threshold=0.3))[:, 0].tolist() == [3, 4, 5]
        assert np.argwhere(read_seg(path, image, {"Lung": 1}, threshold=1.0))[:, 0].tolist() == [5]
    low = write_seg(
        tmp_path / "s.dcm", series, [Segment("L", shares)], kind="FRACTIONAL", headers={"MaximumFractionalValue": 100}
    )
    refusal("LABEL_VALUES", read_seg, low, image, {"L": 1})  # holds 255


def test_overlapping_segments_need_a_winner(tmp_path: Path, image: Volume, series: Written) -> None:
    one, two = np.zeros(SHAPE, np.bool_), np.zeros(SHAPE, np.bool_)
    one[2:6, 2:6, 2], two[4:8, 2:6, 2] = True, True
    path = write_seg(tmp_path / "s.dcm", series, segments((one, two)))
    assert "8 voxels" in refusal("LABEL_VALUES", read_seg, path, image, {"Lung": 1, "Nodule": 2})
    assert (read_seg(path, image, {"Lung": 1, "Nodule": 2}, overlap="last")[two] == 2).all()
    assert (read_seg(path, image, {"Nodule": 2, "Lung": 1}, overlap="last")[one] == 1).all()
    assert (read_seg(path, image, {"Lung": 1, "Nodule": 2}, overlap="first")[one] == 1).all()
    assert (read_seg(path, image, {"Lung": 3, "Nodule": 3}) == (one | two) * 3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_or_empty_segment_is_refused_unless_that_is_said_to_happen(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]], kind: Kind
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments((parts[0], np.zeros(SHAPE, np.bool_))), kind=kind)
    for mapping in ({"Lung": 1, "Nodule": 2}, {"Lung": 1, "Spleen": 2}):
        refusal("LABEL_EMPTY", read_seg, path, image, mapping)
        assert (read_seg(path, image, mapping, empty_ok=True) == parts[0]).all()


@pytest.mark.parametrize("directions", [(1, 1, 1), (-1, -1, 1), (1, 1, -1), (-1, 1, -1)])
def test_a_seg_fits_its_series_whichever_way_that_is_stored(
    tmp_path: Path,
    image: Volume,
    parts: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    directions: tuple[int, int, int],
) -> None:
    series = write_dicom_series(tmp_path / "series", image, directions=directions)
    path = write_seg(tmp_path / "s.dcm", series, segments(parts))
    read = read_series(series.paths)
    assert (read_seg(path, read, {"Lung": 1, "Nodule": 2}) == parts[0] * 1 + parts[1] * 2).all()


def test_a_crop_of_the_image_keeps_its_labels_and_lost_labels_are_refused(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts))

    def cropped(*begin: int) -> Volume:
        affine = AFFINE.copy()
        affine[:3, 3] = (AFFINE @ (*begin, 1))[:3]
        i, j, k = begin
        return Volume(image.voxels[:, i:, j:, k:], affine)

    assert (read_seg(path, cropped(2, 3, 1), {"Lung": 1}) == parts[0][2:, 3:, 1:]).all()
    assert "outside" in refusal("LABEL_GEOMETRY_MISMATCH", read_seg, path, cropped(3, 0, 0), {"Lung": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (np.diag([1, 1, 1.08, 1]), "beside"),
        (np.diag([2.0, 1, 1, 1]), "another size"),
        (np.diag([1, 1, 0.5, 1]), "planes"),
        (np.array([[1, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "beside"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]]), "beside"),
        (np.array([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "askew"),
    ],
)
def test_another_grid_than_the_images_is_refused(
    tmp_path: Path,
    image: Volume,
    series: Written,
    parts: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    change: NDArray[np.float64],
    words: str,
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts))
    moved = replace(image, affine_ras=AFFINE @ change)
    assert words in refusal("LABEL_GEOMETRY_MISMATCH", read_seg, path, moved, {"Lung": 1})


def test_what_a_seg_holds_and_means_can_be_asked_and_stays_out_of_logs(
    tmp_path: Path, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> None:
    named = [Segment("JANE DOE left", parts[0]), Segment("Nodule", parts[1])]
    path = write_seg(tmp_path / "s.dcm", series, named, kind="LABELMAP")
    referenced, found = read_segments(path)
    assert referenced.series_uid == series.stored.series_uid
    assert [(s.number, s.name, s.codes) for s in found] == [
        (1, "JANE DOE left", ("SCT:85756007",)),
        (2, "Nodule", ("SCT:85756007",)),
    ]
    assert "DOE" not in repr(found)
    assert series.stored.series_uid not in repr(referenced)


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "image", "no frames", "positions", "kind"])
def test_broken_objects_are_refused_without_their_names(
    tmp_path: Path,
    image: Volume,
    series: Written,
    parts: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    spoil: str,
) -> None:
    path = write_seg(tmp_path / "JANE_DOE.dcm", series, segments(parts))
    content = path.read_bytes()
    if spoil == "image":
        content = series.paths[0].read_bytes()
    elif spoil in ("no frames", "positions", "kind"):
        data = pydicom.dcmread(path)
        if spoil == "no frames":
            del data.PerFrameFunctionalGroupsSequence
        elif spoil == "positions":
            del data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
        else:
            data.SegmentationType = "DOE"
        buffer = io.BytesIO()
        data.save_as(buffer)
        content = buffer.getvalue()
    else:
        content = {"cut": content[:-300], "empty": b"", "text": b"JANE DOE" * 100}[spoil]
    path.write_bytes(content)
    message = refusal("LABEL_UNREADABLE", read_seg, path, image, {"Lung": 1})
    assert "DOE" not in message
    assert str(tmp_path) not in message


def test_a_labelmap_with_a_segment_that_it_does_not_list_is_refused(
    tmp_path: Path, image: Volume, series: Written, parts: tuple[NDArray[np.bool_], NDArray[np.bool_]]
) -> None:
    path = write_seg(tmp_path / "s.dcm", series, segments(parts), kind="LABELMAP")
    data = pydicom.dcmread(path)
    data.SegmentSequence = data.SegmentSequence[:1]
    data.save_as(path)
    assert f"{parts[1][:, :, 3].sum()} voxels" in refusal("LABEL_VALUES", read_seg, path, image, {"Lung": 1})
    data.add_new("PixelPaddingValue", "US", 2)  # background may have any number
    data.save_as(path)
    assert (read_seg(path, image, {"Lung": 1}) == parts[0]).all()


real = pytest.mark.skipif(
    not REAL.is_dir(),
    reason=f"no real DICOM: {DATA} lacks ingest_formats; set FEDIMAGING_DATA to the folder that has it",
)


@real
def test_a_real_liver_lies_where_highdicom_puts_it() -> None:
    ct = find_series(REAL / "ct_ge_lightspeed_ultra").series[0]
    image = read_series(ct.files)
    path = REAL / "seg" / "liver.dcm"
    referenced, found = read_segments(path)
    assert referenced.series_uid == ct.uid
    assert [s.name for s in found] == ["Liver"]
    labels = read_seg(path, image, {"liver": 1})
    theirs = hd.seg.segread(str(path)).get_pixels_by_source_instance(
        [s.sop_uid for s in ct.slices], combine_segments=True, ignore_spatial_locations=True
    )
    assert (labels == theirs.transpose(2, 1, 0)[::-1, ::-1]).all()
    assert labels.sum() == 36233 + 35645 + 35220
    assert image.voxels[0][labels == 1].mean() == pytest.approx(50, abs=40)  # HU of a liver


@real
def test_real_overlapping_segments_are_refused_or_settled() -> None:
    image = read_series(find_series(REAL / "ct_ge_lightspeed_ultra").series[0].files)
    path = REAL / "seg" / "partial_overlaps.dcm"
    mapping = {name: n for n, name in enumerate(("green", "orange", "purple", "light_blue", "dark_blue"), start=1)}
    refusal("LABEL_VALUES", read_seg, path, image, mapping)
    labels = read_seg(path, image, mapping, overlap="last")
    assert np.unique(labels).tolist() == [0, 1, 2, 3, 4, 5]
    assert (labels == 5).sum() == 4713


@real
@pytest.mark.parametrize("name", ["sparse-labelmap-noppv.dcm", "sparse-labelmap-ppv5.dcm"])
def test_real_sparse_labelmaps_land_on_the_slices_they_name(name: str) -> None:
    affine = np.array([[-0.7, 0, 0, -46.464901], [0, -0.7, 0, -5.0188098], [0, 0, 2.5, -177.75], [0, 0, 0, 1.0]])
    image = Volume(np.zeros((1, 24, 38, 5), np.float32), affine)
    labels = read_seg(REAL / "seg" / name, image, {"Liver": 1})
    assert labels.sum(axis=(0, 1)).tolist() == [315, 0, 315, 0, 0]
