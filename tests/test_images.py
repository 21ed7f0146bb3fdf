"""Readers: geometry and grey levels survive, and what could be misread is refused."""

import gzip
import itertools
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fedclient.data.images import read_image, read_labels
from fedclient.data.nifti import read_nifti, twofold
from shared_models.errors import ImageUnreadable

Nifti1Image: Any = nibabel.Nifti1Image  # has no types
Nifti2Image: Any = nibabel.Nifti2Image
ORIENTATIONS = [
    (axes, signs) for axes in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
AFFINE = np.diag([0.7, 0.8, 2.5, 1.0])


def write_nifti(
    path: Path, values: NDArray[Any], affine: NDArray[np.float64] = AFFINE, sform: int = 1, qform: int = 0
) -> Path:
    image: Any = Nifti1Image(values, affine)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    nibabel.save(image, path)
    return path


def spoil_header(path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    return path


def complaint(read: Callable[[Path], object], path: Path, code: str | None = None) -> str:
    with pytest.raises(ImageUnreadable) as e:
        read(path)
    assert code is None or e.value.code == code
    assert path.name not in str(e.value)  # file names hold patient numbers
    assert str(path.parent) not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@settings(max_examples=48, deadline=None)
@given(st.sampled_from(ORIENTATIONS), st.sampled_from([(0, 0, 0), (3, 1, 2), (1, 4, 0)]))
def test_a_voxel_keeps_its_place_in_the_patient_whatever_the_stored_orientation(
    folder: Path, orientation: tuple[tuple[int, ...], tuple[int, ...]], spot: tuple[int, int, int]
) -> None:
    axes, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (axis, sign, mm) in enumerate(zip(axes, signs, (0.7, 0.8, 2.5), strict=True)):
        affine[axis, column] = sign * mm
    affine[:3, 3] = (-12, 30, 7)
    stored = np.zeros((4, 5, 6), np.int16)
    stored[spot] = 100
    volume = read_image(write_nifti(folder / "LIDC-0001.nii", stored, affine))
    found = np.argwhere(volume.voxels[0] == 100)[0]
    assert volume.affine_ras @ [*found, 1] == pytest.approx(affine @ [*spot, 1])
    turned = volume.affine_ras[:3, :3]
    assert (np.diag(turned) > 0).all()
    assert np.count_nonzero(turned) == 3
    assert volume.left_right_axis == 0
    assert volume.spacing_mm == pytest.approx([dict(zip(axes, (0.7, 0.8, 2.5), strict=True))[a] for a in range(3)])


def test_an_oblique_volume_is_turned_by_whole_axes_only(folder: Path) -> None:
    c, s = np.cos(0.2), np.sin(0.2)
    affine = np.array([[-c, 5 * s, 0, 5], [-s, -5 * c, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    volume = read_image(write_nifti(folder / "oblique.nii.gz", stored, affine))
    assert volume.voxels[0] == pytest.approx(stored[::-1, ::-1])
    assert volume.affine_ras @ [0, 0, 0, 1] == pytest.approx(affine @ [1, 2, 0, 1])
    assert volume.spacing_mm == pytest.approx((1, 5, 3))
    assert volume.left_right_axis == 0  # although a step along J moves as far to the side


def test_sform_wins_over_qform_and_qform_stands_in_for_it(folder: Path) -> None:
    stored = np.zeros((2, 2, 2), np.int16)
    image: Any = Nifti1Image(stored, np.diag([1.0, 1, 1, 1]))
    image.set_sform(np.diag([2.0, 2, 2, 1]), 1)
    image.set_qform(np.diag([3.0, 3, 3, 1]), 1)
    nibabel.save(image, folder / "both.nii")
    assert read_image(folder / "both.nii").spacing_mm == pytest.approx((2, 2, 2))
    image.set_sform(np.diag([2.0, 2, 2, 1]), 0)
    nibabel.save(image, folder / "q.nii")
    assert read_image(folder / "q.nii").spacing_mm == pytest.approx((3, 3, 3))


def test_a_nifti_whose_qform_lies_otherwise_than_its_sform_is_found(folder: Path) -> None:
    path = write_nifti(folder / "two.nii", np.zeros((2, 3, 4), np.int16), qform=1)
    assert twofold(path) == ""
    for signs, told in (((-1, 1, 1), "mirrored"), ((-1, -1, 1), "turned by a quarter or more")):
        image: Any = nibabel.load(path)
        image.set_qform(AFFINE @ np.diag([*signs, 1.0]), 1)
        nibabel.save(image, folder / "other.nii")
        assert f"lies {told} beside its sform" in twofold(folder / "other.nii")
    assert twofold(write_nifti(folder / "one.nii", np.zeros((2, 3, 4), np.int16))) == ""


def test_a_nifti_whose_header_states_two_places_or_voxel_sizes_is_found(folder: Path) -> None:
    values = np.zeros((200, 200, 9), np.int16)
    cos, sin = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    for qform, told in (
        (np.diag([0.5, 0.5, 5, 1]), "voxels of 0.5 x 0.5 x 5 (pixdim), and 1 x 1 x 1 by its sform"),
        (np.eye(4) + 40 * np.eye(4, k=3), "by its qform a NIfTI file lies up to 40 voxels beside its sform"),
        (np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "voxels beside its sform"),
        (np.diag([1.001, 1.001, 1.05, 1]), ""),
    ):
        image: Any = Nifti1Image(values, np.eye(4))
        image.set_qform(qform, 1)
        image.set_sform(np.eye(4), 1)
        nibabel.save(image, folder / "said.nii")
        found = twofold(folder / "said.nii")
        assert told in found
        assert bool(found) == bool(told)
    for pixdim, told in (((0.5, 0.5, 5), "0.5 x 0.5 x 5 (pixdim)"), ((0, 0, 0), ""), ((1.01, 1, 1), "")):
        path = write_nifti(folder / "sform.nii", values, np.eye(4))
        found = twofold(spoil_header(path, 80, struct.pack("<3f", *pixdim)))
        assert told in found
        assert bool(found) == bool(told)
    assert twofold(write_nifti(folder / "flat.nii", np.zeros((2, 3), np.int16))) == ""


@pytest.mark.parametrize("pixdim", [(0.7, 0.8, 0), (0, 0, 0), (0.7, 0.8, -2.5), (0.7, 0.8, np.nan)])
def test_no_voxel_size_is_made_up_for_a_qform_that_has_none(folder: Path, pixdim: tuple[float, ...]) -> None:
    path = write_nifti(folder / "q.nii", np.zeros((2, 3, 4), np.int16), sform=0, qform=1)
    assert read_image(path).spacing_mm == pytest.approx((0.7, 0.8, 2.5))
    stated = struct.pack("<3f", *pixdim)
    assert "states voxels of" in complaint(read_image, spoil_header(path, 80, stated), "GEOMETRY_INVALID")
    by_sform = write_nifti(folder / "s.nii", np.zeros((2, 3, 4), np.int16), qform=1)
    assert read_image(spoil_header(by_sform, 80, stated)).spacing_mm == pytest.approx((0.7, 0.8, 2.5))
    plane = write_nifti(folder / "flat.nii", np.zeros((2, 3), np.int16), sform=0, qform=1)
    assert read_image(spoil_header(plane, 88, struct.pack("<f", 0))).spacing_mm == pytest.approx((0.7, 0.8, 1))
    two = write_nifti(folder / "two.nii.gz", np.zeros((2, 3, 4), np.int16), sform=0, qform=1)
    nibabel.save(Nifti2Image.from_image(nibabel.load(two)), folder / "q2.nii")
    assert read_image(folder / "q2.nii").spacing_mm == pytest.approx((0.7, 0.8, 2.5))
    spoil_header(folder / "q2.nii", 112, struct.pack("<3d", *pixdim))
    assert "states voxels of" in complaint(read_image, folder / "q2.nii", "GEOMETRY_INVALID")


def test_a_sheared_nifti_is_refused_and_a_slightly_oblique_one_read(folder: Path) -> None:
    for cosine, refused in ((0.01, False), (0.1, True)):
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        affine[:3, 2] = 0, cosine, np.sqrt(1 - cosine**2)
        path = write_nifti(folder / "sheared.nii", np.zeros((2, 3, 4), np.int16), affine)
        if refused:
            assert "84.3 degrees" in complaint(read_image, path, "GEOMETRY_INVALID")
        else:
            assert read_image(path).voxels.shape == (1, 2, 3, 4)


def test_a_nifti_in_a_unit_that_nobody_knows_is_read_in_millimetres(folder: Path) -> None:
    path = spoil_header(write_nifti(folder / "u.nii", np.zeros((2, 3, 4), np.int16)), 123, b"\x07")
    assert read_image(path).spacing_mm == pytest.approx((0.7, 0.8, 2.5))


def test_a_nifti_without_orientation_is_refused(folder: Path) -> None:
    path = write_nifti(folder / "lost.nii", np.zeros((2, 2, 2), np.int16), sform=0)
    assert "left from right" in complaint(read_image, path)


def test_slope_and_metres_are_applied(folder: Path) -> None:
    path = write_nifti(folder / "scaled.nii", np.full((2, 2, 2), 3, np.int16))
    spoil_header(path, 112, struct.pack("<2f", 0.5, -1024))  # scl_slope, scl_inter
    assert (read_image(path).voxels == 0.5 * 3 - 1024).all()
    spoil_header(path, 123, b"\1")  # xyzt_units: metre
    assert read_image(path).spacing_mm == pytest.approx((700, 800, 2500))


def test_only_one_volume_a_file_is_read(folder: Path) -> None:
    several = write_nifti(folder / "fmri.nii", np.zeros((2, 3, 4, 5), np.int16))
    assert "4-D with shape (2, 3, 4, 5)" in complaint(read_image, several)
    single = write_nifti(folder / "single.nii", np.zeros((2, 3, 4, 1), np.int16))
    assert read_image(single).voxels.shape == (1, 2, 3, 4)
    plane = write_nifti(folder / "plane.nii", np.zeros((2, 3), np.int16))
    assert read_image(plane).voxels.shape == (1, 2, 3, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[[np.nan]]], np.float32), "NaN or infinite"),
        (np.array([[[1e300]]], np.float64), "NaN or infinite"),
        (np.zeros((2, 2, 2), np.complex64), "complex64"),
        (np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "real numbers"),
    ],
)
def test_voxels_that_are_no_finite_real_numbers_are_refused(folder: Path, values: NDArray[Any], words: str) -> None:
    assert words in complaint(read_image, write_nifti(folder / "odd.nii", values))


def test_a_flat_or_infinite_affine_is_refused(folder: Path) -> None:
    path = write_nifti(folder / "flat.nii", np.zeros((2, 2, 2), np.int16))
    assert "sform" in complaint(read_image, spoil_header(path, 280, struct.pack("<4f", 0, 0, 0, 0)))
    assert "sform" in complaint(read_image, spoil_header(path, 280, struct.pack("<4f", np.inf, 0, 0, 0)))


def test_a_header_that_promises_gigabytes_is_refused_before_reading(folder: Path) -> None:
    path = write_nifti(folder / "bomb.nii", np.zeros((2, 2, 2), np.int16))
    spoil_header(path, 40, struct.pack("<8h", 3, 30000, 30000, 30000, 1, 1, 1, 1))
    assert "voxels" in complaint(read_image, path)


@pytest.mark.parametrize("keep", [0, 100, 400])
def test_a_file_cut_short_is_refused(folder: Path, keep: int) -> None:
    for name in ("cut.nii", "cut.nii.gz"):
        values = np.random.default_rng(0).integers(0, 1000, (9, 9, 9)).astype(np.int16)
        path = write_nifti(folder / name, values)
        path.write_bytes(path.read_bytes()[:keep])
        assert "broken or cut short" in complaint(read_image, path)
    picture = folder / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(picture)
    picture.write_bytes(picture.read_bytes()[:keep])
    assert "broken" in complaint(read_image, picture)


@pytest.mark.parametrize("part", [None, 0, 1])
@pytest.mark.parametrize("level", [0, 6])
def test_one_flipped_bit_in_a_packed_nifti_is_found(tmp_path: Path, level: int, part: int | None) -> None:
    shape = (16, 16, 8) if part is None else (16, 16, 8, 2)
    values = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int16)
    path = tmp_path / "packed.nii.gz"
    whole = gzip.compress(write_nifti(tmp_path / "plain.nii", values).read_bytes(), level)
    path.write_bytes(whole)
    assert (read_nifti(path, part).voxels[0] == (values if part is None else values[..., part])).all()
    for at in (*range(1000, len(whole), 397), len(whole) - 6):
        spoilt = bytearray(whole)
        spoilt[at] ^= 16
        path.write_bytes(spoilt)
        assert "broken or cut short" in complaint(lambda path: read_nifti(path, part), path, "IMAGE_UNREADABLE")
    path.write_bytes(whole[:-6])
    assert "broken or cut short" in complaint(lambda path: read_nifti(path, part), path, "IMAGE_UNREADABLE")


def test_what_follows_on_the_voxels_of_a_packed_nifti_is_not_unpacked_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedclient.data.nifti.MAX_REST_BYTES", 2 << 20)
    plain = write_nifti(tmp_path / "plain.nii", np.zeros((4, 4, 4), np.int16)).read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(1 << 20)))
    assert read_image(path).voxels.shape == (1, 4, 4, 4)
    path.write_bytes(gzip.compress(plain + bytes(4 << 20)))
    assert "follow on the voxels" in complaint(read_image, path, "INPUT_TOO_LARGE")


def test_a_picture_keeps_rows_columns_and_depth(folder: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(grey).save(folder / "g8.png")
    Image.fromarray(grey.astype(np.uint16) * 10_000).save(folder / "g16.png")
    eight, sixteen = read_image(folder / "g8.png"), read_image(folder / "g16.png")
    assert eight.voxels.shape == (1, 2, 3, 1)
    assert (eight.voxels[0, :, :, 0] == grey).all()
    assert (sixteen.voxels[0, :, :, 0] == grey.astype(np.float32) * 10_000).all()
    assert eight.spacing_mm == (1, 1, 1)
    assert eight.left_right_axis == 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_grey_stored_as_colour_has_the_same_grey_levels(folder: Path, mode: str) -> None:
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Image.fromarray(grey).convert(mode).save(folder / "c.png")
    assert (read_image(folder / "c.png").voxels[0, :, :, 0] == grey).all()


def test_colour_becomes_luminance_and_bilevel_black_and_white(folder: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(folder / "red.png")
    assert (read_image(folder / "red.png").voxels == 76).all()
    Image.new("1", (2, 2), 1).save(folder / "one.png")
    assert (read_image(folder / "one.png").voxels == 255).all()


def test_a_palette_with_transparency_is_read_without_a_warning(folder: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 90, 90, 90])
    picture.save(folder / "t.png", transparency=bytes([0, 128]))
    assert (read_image(folder / "t.png").voxels == 90).all()


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.tif"])
def test_a_picture_that_wants_to_be_turned_for_display_is_refused(folder: Path, name: str) -> None:
    exif = Image.Exif()
    for turn in (1, 6):
        exif[0x0112] = turn
        Image.new("L", (6, 4)).save(folder / name, exif=exif)
        if turn == 1:
            assert read_image(folder / name).voxels.shape == (1, 4, 6, 1)
    assert "Save it upright" in complaint(read_image, folder / name, "GEOMETRY_INVALID")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose heading promises that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    heading = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + heading + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("edge", [8193, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_heading(folder: Path, edge: int) -> None:
    path = folder / "bomb.png"
    path.write_bytes(png_of(edge, edge))
    assert "pixels" in complaint(read_image, path)


@pytest.mark.parametrize(
    ("name", "words"), [("x.gif", ".gif files"), ("x.png", "no PNG"), ("DOE-JOHN", "nameless files")]
)
def test_other_formats_are_refused_by_name_and_by_content(folder: Path, name: str, words: str) -> None:
    Image.new("L", (3, 3)).save(folder / name, format="GIF")
    assert words in complaint(read_image, folder / name)


def test_cmyk_and_animations_are_refused(folder: Path) -> None:
    Image.new("CMYK", (3, 3)).save(folder / "k.jpg")
    assert "CMYK" in complaint(read_image, folder / "k.jpg")
    Image.new("L", (3, 3)).save(folder / "a.png", save_all=True, append_images=[Image.new("L", (3, 3), 9)])
    assert "animated" in complaint(read_image, folder / "a.png")


@pytest.mark.parametrize(
    ("stored", "labels"),
    [
        ([0, 255], [0, 1]),
        ([0, 127, 255], [0, 127, 1]),
        ([0, 0], [0, 0]),
        ([0, 1], [0, 1]),
        ([1, 2, 127], [1, 2, 127]),
        ([0, 1, 255], [0, 1, 255]),
    ],
)
def test_black_and_white_masks_become_labels_and_labels_stay(
    folder: Path, stored: list[int], labels: list[int]
) -> None:
    for mode in ("L", "RGB", "P"):
        Image.fromarray(np.array([stored], np.uint8)).convert(mode).save(folder / "m.png")
        read = read_labels(folder / "m.png")
        assert read.dtype == np.uint8
        assert read[0, :, 0].tolist() == labels


def test_a_bilevel_mask_becomes_zero_and_one(folder: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(folder / "b.png")
    assert read_labels(folder / "b.png")[0, :, 0].tolist() == [1, 0]


def test_coloured_jpeg_and_sixteen_bit_masks_are_refused(folder: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(folder / "red.png")
    assert "coloured" in complaint(read_labels, folder / "red.png")
    Image.new("L", (2, 2)).save(folder / "m.jpg")
    assert "blurs" in complaint(read_labels, folder / "m.jpg")
    Image.fromarray(np.full((2, 2), 256, np.uint16)).save(folder / "deep.png")
    assert "above 255" in complaint(read_labels, folder / "deep.png")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_nifti_labels_are_kept_in_any_type(folder: Path, kind: type[np.generic]) -> None:
    values = np.array([0, 1, 2, 127], kind).reshape(2, 2, 1)
    assert (read_labels(write_nifti(folder / "l.nii", values)) == values).all()


@pytest.mark.parametrize(("value", "words"), [(0.5, "fractions"), (-1, "below 0"), (300, "255"), (np.nan, "number")])
def test_nifti_labels_that_are_no_labels_are_refused(folder: Path, value: float, words: str) -> None:
    path = write_nifti(folder / "l.nii", np.full((2, 2, 2), value, np.float32))
    assert words in complaint(read_labels, path)


def test_a_mask_on_another_grid_than_its_image_is_refused(folder: Path) -> None:
    values = np.zeros((4, 4, 4), np.int16)
    image = read_image(write_nifti(folder / "i.nii", values))
    moved, half = AFFINE.copy(), AFFINE.copy()
    moved[2, 3] = 2.5
    half[:3, 3] = 0.35  # half a pixel along each axis
    for other, words in (
        (write_nifti(folder / "s.nii", values[:, :, 1:]), "voxels"),
        (write_nifti(folder / "m.nii", values, moved), "voxels apart"),
        (write_nifti(folder / "h.nii", values, half), "voxels apart"),
        (write_nifti(folder / "z.nii", values, np.diag([0.7, 0.8, 3.0, 1])), "voxels apart"),
    ):
        assert words in complaint(lambda path: read_labels(path, like=image), other)
    near = AFFINE.copy()
    near[:3, 3] = 0.05  # as positions of two decimals may lie
    assert not read_labels(write_nifti(folder / "n.nii", values, near), like=image).any()


def test_a_mask_stored_in_another_direction_fits_its_image(folder: Path) -> None:
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    flipped = AFFINE @ np.array([[-1, 0, 0, 1], [0, -1, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = read_image(write_nifti(folder / "ras.nii", values))
    labels = read_labels(write_nifti(folder / "lps.nii", values[::-1, ::-1].astype(np.uint8), flipped), like=image)
    assert (labels == image.voxels[0]).all()


@pytest.mark.parametrize("name", ["scan", "scan.png", "scan.dcm", "scan.nii", "scan.bin"])
def test_a_file_is_what_its_first_bytes_say_whatever_it_is_called(folder: Path, name: str) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    Image.fromarray(stored[0].astype(np.uint8)).save(folder / "p.png")
    for source in (write_nifti(folder / "n.nii", stored), write_nifti(folder / "n.nii.gz", stored), folder / "p.png"):
        (folder / name).write_bytes(source.read_bytes())
        assert (read_image(folder / name).voxels == read_image(source).voxels).all()


def test_nifti_2_is_read(folder: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nifti2: Any = nibabel.Nifti2Image
    nibabel.save(nifti2(stored, AFFINE), folder / "two.nii.gz")
    assert (read_image(folder / "two.nii.gz").voxels[0] == stored).all()


@pytest.mark.parametrize("name", ["weights.pt", "x.npy", "x.nii", "x.pkl"])
def test_files_whose_content_may_run_are_refused(folder: Path, name: str) -> None:
    for content in (pickle.dumps([1]), b"\x93NUMPY\1\0", b"PK\3\4archive"):
        (folder / name).write_bytes(content)
        assert "code" in complaint(read_image, folder / name, "UNSAFE_FORMAT")


def test_a_file_that_is_not_there_or_is_empty_is_refused(folder: Path) -> None:
    assert "cannot be opened" in complaint(read_image, folder / "gone.nii")
    for name in ("empty.nii", "empty.png", "empty.mha", "empty.nrrd", "empty.dcm", "empty.tif"):
        (folder / name).write_bytes(b"")
        complaint(read_image, folder / name)


@pytest.mark.parametrize("version", [1, 2])
def test_a_nifti_whose_voxels_begin_beyond_all_reason_is_not_unpacked(folder: Path, version: int) -> None:
    kind: Any = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    nibabel.save(kind(np.zeros((2, 2, 2), np.int16), AFFINE), folder / "far.nii")
    at, offset = (108, struct.pack("<f", 1e12)) if version == 1 else (168, struct.pack("<q", 10**12))
    path = spoil_header(folder / "far.nii", at, offset)
    path.write_bytes(gzip.compress(path.read_bytes()))
    complaint(read_image, path, "INPUT_TOO_LARGE")


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (np.arange(6, dtype=np.uint8), "L"),
        (np.arange(6, dtype=np.uint16) * 10_000, "I;16"),
        (np.arange(6, dtype=np.int32) - 3, "I"),
        (np.arange(6, dtype=np.float32) * 0.37 - 1, "F"),
    ],
)
def test_a_tiff_keeps_its_depth(folder: Path, values: NDArray[Any], mode: str) -> None:
    grey = values.reshape(2, 3)
    picture = Image.fromarray(grey)
    assert picture.mode == mode
    for compression in (None, "tiff_deflate", "tiff_lzw"):
        picture.save(folder / "x.tiff", compression=compression)
        assert (read_image(folder / "x.tiff").voxels[0, :, :, 0] == grey.astype(np.float32)).all()


def test_tiffs_that_could_be_misread_are_refused(folder: Path) -> None:
    Image.new("L", (3, 3)).save(folder / "p.tif", save_all=True, append_images=[Image.new("L", (3, 3), 9)])
    assert "pages" in complaint(read_image, folder / "p.tif", "MODALITY_MISMATCH")
    Image.new("CMYK", (3, 3)).save(folder / "c.tif")
    complaint(read_image, folder / "c.tif", "MODALITY_MISMATCH")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(folder / "n.tif")
    complaint(read_image, folder / "n.tif", "INTENSITY_INVALID")
    Image.fromarray(np.full((2, 2), 7, np.uint16)).save(folder / "w.tif")
    content = (folder / "w.tif").read_bytes()
    black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert black in content
    (folder / "w.tif").write_bytes(content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    assert "zero is white" in complaint(read_image, folder / "w.tif", "MODALITY_MISMATCH")


@pytest.mark.parametrize(("bits", "kind"), [(8, 2), (32, 1)])
def test_tiff_numbers_that_pillow_takes_for_others_are_refused(folder: Path, bits: int, kind: int) -> None:
    whole = Image.fromarray(np.zeros((2, 2), np.uint8 if bits == 8 else np.int32))
    whole.save(folder / "s.tif", tiffinfo={339: 2})
    stated = struct.pack("<HHIHH", 339, 3, 1, 2, 0)
    content = (folder / "s.tif").read_bytes()
    assert stated in content
    (folder / "s.tif").write_bytes(content.replace(stated, struct.pack("<HHIHH", 339, 3, 1, kind, 0)))
    assert "would come out wrong" in complaint(read_image, folder / "s.tif", "INTENSITY_INVALID")


def test_a_tiff_mask_is_read_as_a_png_mask_is(folder: Path) -> None:
    Image.fromarray(np.array([[0, 255], [127, 0]], np.uint8)).save(folder / "m.tif")
    assert read_labels(folder / "m.tif")[:, :, 0].tolist() == [[0, 1], [127, 0]]


def test_a_picture_as_mask_of_a_volume_is_refused(folder: Path) -> None:
    like = read_image(write_nifti(folder / "i.nii", np.zeros((4, 5, 1), np.int16)))
    Image.new("L", (5, 4)).save(folder / "m.png")
    words = complaint(lambda path: read_labels(path, like=like), folder / "m.png", "LABEL_GEOMETRY_MISMATCH")
    assert "rows and columns" in words


def test_a_picture_knows_where_its_pixels_went(folder: Path) -> None:
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(folder / "g.png")
    volume = read_image(folder / "g.png")
    assert volume.voxel_of_pixel is not None
    i, j, k, _ = (volume.voxel_of_pixel @ [2, 1, 0, 1]).astype(int)  # column 2, row 1
    assert volume.voxels[0, i, j, k] == 5
    assert (volume.provenance.rows, volume.provenance.columns, volume.provenance.lossy) == (2, 3, False)
    Image.new("L", (3, 3)).save(folder / "j.jpg")
    assert read_image(folder / "j.jpg").provenance.lossy


def test_each_refusal_has_its_code(folder: Path) -> None:
    zeros = np.zeros((2, 2, 2), np.int16)
    lost = write_nifti(folder / "lost.nii", zeros, sform=0)
    complaint(read_image, lost, "GEOMETRY_MISSING")
    flat = spoil_header(write_nifti(folder / "flat.nii", zeros), 280, struct.pack("<4f", 0, 0, 0, 0))
    complaint(read_image, flat, "GEOMETRY_INVALID")
    complaint(read_image, write_nifti(folder / "4d.nii", np.zeros((2, 3, 4, 5), np.int16)), "MODALITY_MISMATCH")
    complaint(read_image, write_nifti(folder / "nan.nii", np.array([[[np.nan]]], np.float32)), "INTENSITY_INVALID")
    bomb = spoil_header(write_nifti(folder / "b.nii", zeros), 40, struct.pack("<8h", 3, *[30_000] * 3, 1, 1, 1, 1))
    complaint(read_image, bomb, "INPUT_TOO_LARGE")
    (folder / "bomb.png").write_bytes(png_of(60_000, 60_000))
    complaint(read_image, folder / "bomb.png", "INPUT_TOO_LARGE")
    complaint(read_labels, write_nifti(folder / "l.nii", np.full((2, 2, 2), 0.5, np.float32)), "LABEL_VALUES")
    (folder / "cut.nii").write_bytes(lost.read_bytes()[:300])
    complaint(read_image, folder / "cut.nii", "IMAGE_UNREADABLE")


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<u1", "<i4", ">f4", "<f8", "<u2"])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.37, -1024.5), (2.0, 0.0)])
def test_nifti_voxels_are_to_the_bit_what_nibabel_makes_of_them(tmp_path, kind, scale):
    rng = np.random.default_rng(0)
    content = rng.integers(0, 200, (7, 5, 4, 2)).astype(kind)
    header = nibabel.Nifti1Header(endianness=kind[0])
    header.set_data_dtype(np.dtype(kind))
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(content, affine, header)
    image.set_sform(affine, code="scanner")
    image.header.set_slope_inter(*scale)
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(image, tmp_path / name)
        stored: Any = nibabel.load(tmp_path / name)
        for part in (0, 1):
            wanted = np.asarray(stored.dataobj[..., part], dtype=np.float32)[::-1]
            found = read_nifti(tmp_path / name, part).voxels[0]
            assert found.dtype == np.float32
            assert (found == wanted).all()
