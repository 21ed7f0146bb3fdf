"""MetaImage and NRRD: each voxel keeps its place and value as ITK finds them, and headers are doubted."""

import bz2
import gzip
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedclient.data import raw
from fedclient.data.images import read_image, read_labels
from shared_models.errors import ImageUnreadable
from tests.dicoms import assert_same_image

DIRECTIONS = [
    np.array([[s if a == column else 0 for column in range(3)] for a, s in zip(axes, signs, strict=True)], float)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
VALUES = (np.arange(5 * 6 * 7).reshape(5, 6, 7) * 13 % 2000 - 1000).astype(np.int16)  # [z, y, x]


def image(direction: NDArray[np.float64] = DIRECTIONS[0], values: NDArray[Any] = VALUES) -> SimpleITK.Image:
    made = SimpleITK.GetImageFromArray(values)
    made.SetDirection(direction.ravel().tolist())
    made.SetSpacing((0.7, 0.8, 2.5))
    made.SetOrigin((-195.25, 12.5, -378))
    return made


def written(path: Path, made: SimpleITK.Image | None = None, *, packed: bool = False) -> Path:
    SimpleITK.WriteImage(image() if made is None else made, str(path), useCompression=packed)
    return path


def refusal(path: Path, code: str) -> str:
    with pytest.raises(ImageUnreadable) as e:
        read_image(path)
    assert e.value.code == code, str(e.value)
    assert path.name not in str(e.value)
    assert "/tmp" not in str(e.value)
    return str(e.value)


def edited(path: Path, old: str, new: str) -> Path:
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))
    return path


@settings(max_examples=24, deadline=None)
@given(st.sampled_from(range(48)), st.sampled_from([".mha", ".mhd", ".nrrd", ".nhdr"]), st.booleans())
def test_a_voxel_keeps_its_place_whatever_the_direction(
    tmp_path_factory: pytest.TempPathFactory, direction: int, suffix: str, packed: bool
) -> None:
    path = written(tmp_path_factory.getbasetemp() / f"DOE-JANE{suffix}", image(DIRECTIONS[direction]), packed=packed)
    volume = read_image(path)
    assert_same_image(volume, SimpleITK.ReadImage(str(path)))
    assert (np.diag(volume.affine_ras[:3, :3]) > 0).all()
    assert volume.voxels.flags.c_contiguous


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_an_oblique_direction_is_honoured(suffix: str, tmp_path: Path) -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    path = written(tmp_path / f"x{suffix}", image(np.array([[-c, s, 0], [-s, -c, 0], [0, 0, 1]])))
    assert_same_image(read_image(path), SimpleITK.ReadImage(str(path)))


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_every_type_of_number_is_read(kind: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"x{suffix}", image(values=(VALUES % 100).astype(kind)))
    assert_same_image(read_image(path), SimpleITK.ReadImage(str(path)))


def test_a_negative_direction_as_in_luna16_turns_the_volume_and_not_the_patient(tmp_path: Path) -> None:
    """The header of LUNA16, key by key; (3, 2, 1) lies at offset + direction * spacing * index."""
    (tmp_path / "1.3.6.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
        "TransformMatrix = -1 0 0 0 -1 0 0 0 1\nOffset = 145.5 201.25 -378\nCenterOfRotation = 0 0 0\n"
        "AnatomicalOrientation = RAI\nElementSpacing = 0.7 0.8 2.5\nDimSize = 7 6 5\nElementType = MET_SHORT\n"
        "ElementDataFile = 1.3.6.raw\n"
    )
    (tmp_path / "1.3.6.raw").write_bytes(VALUES.tobytes())
    volume = read_image(tmp_path / "1.3.6.mhd")
    x, y, z = 145.5 - 3 * 0.7, 201.25 - 2 * 0.8, -378 + 2.5
    i, j, k, _ = (np.linalg.inv(volume.affine_ras) @ [-x, -y, z, 1]).round().astype(int)
    assert volume.voxels[0, i, j, k] == VALUES[1, 2, 3]
    assert_same_image(volume, SimpleITK.ReadImage(str(tmp_path / "1.3.6.mhd")))


def test_a_modality_is_told_where_the_header_states_it(tmp_path: Path) -> None:
    path = written(tmp_path / "x.mha")
    assert read_image(path).modality is None
    assert read_image(edited(path, "NDims = 3", "Modality = MET_MOD_CT\nNDims = 3")).modality == "CT"


def test_big_endian_voxels_are_read(tmp_path: Path) -> None:
    path = edited(written(tmp_path / "x.mhd"), "ByteOrderMSB = False", "ByteOrderMSB = True")
    (tmp_path / "x.raw").write_bytes(VALUES.astype(">i2").tobytes())
    assert_same_image(read_image(path), image())


def nrrd(space: str = "left-posterior-superior", encoding: str = "raw", more: str = "", data: bytes = b"") -> bytes:
    return (
        f"NRRD0004\n# remark\ntype: int16\ndimension: 3\nspace: {space}\nsizes: 7 6 5\n"
        f"space directions: (0.7,0,0) (0,0.8,0) (0,0,2.5)\nkinds: domain domain domain\nendian: little\n"
        f"encoding: {encoding}\nspace origin: (-195.25,12.5,-378)\nwho:=Doe, Jane\n{more}\n"
    ).encode() + data


@pytest.mark.parametrize("space", ["LPS", "right-anterior-superior", "RAS", "left-anterior-superior"])
def test_the_space_of_an_nrrd_is_known(space: str, tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_bytes(nrrd(space, data=VALUES.tobytes()))
    assert_same_image(read_image(tmp_path / "x.nrrd"), SimpleITK.ReadImage(str(tmp_path / "x.nrrd")))


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("gz", gzip.compress), ("bzip2", bz2.compress), ("raw", bytes)]
)
def test_every_packing_of_an_nrrd_is_unpacked(encoding: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_bytes(nrrd(encoding=encoding, data=pack(VALUES.tobytes())))
    assert_same_image(read_image(tmp_path / "x.nrrd"), image())
    (tmp_path / "y.nhdr").write_bytes(nrrd(encoding=encoding, more="data file: ./y.bin\n"))
    (tmp_path / "y.bin").write_bytes(pack(VALUES.tobytes()))
    assert_same_image(read_image(tmp_path / "y.nhdr"), image())


def test_bytes_before_the_voxels_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.nhdr").write_bytes(nrrd(more="data file: x.bin\nbyte skip: 5\n"))
    (tmp_path / "y.nhdr").write_bytes(nrrd(more="data file: x.bin\nbyte skip: -1\n"))
    (tmp_path / "x.bin").write_bytes(b"12345" + VALUES.tobytes())
    path = edited(written(tmp_path / "z.mhd"), "NDims = 3", "NDims = 3\nHeaderSize = -1")
    (tmp_path / "z.raw").write_bytes(b"12345" + VALUES.tobytes())
    for each in (tmp_path / "x.nhdr", tmp_path / "y.nhdr", path):
        assert_same_image(read_image(each), image())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["x.mha", "x.mhd", "x.nrrd", "x.nhdr"])
def test_voxels_cut_short_are_refused(name: str, packed: bool, tmp_path: Path) -> None:
    path = written(tmp_path / name, packed=packed)
    data = path if name.endswith(("mha", "nrrd")) else next(p for p in tmp_path.iterdir() if p != path)
    data.write_bytes(data.read_bytes()[:-30])
    refusal(path, "IMAGE_UNREADABLE")


@pytest.mark.parametrize("name", ["x.mhd", "x.nhdr"])
def test_voxels_that_are_more_than_promised_or_gone_are_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name)
    data = tmp_path / "x.raw"
    data.write_bytes(data.read_bytes() + b"\0\0")
    assert "more" in refusal(path, "IMAGE_UNREADABLE")
    data.unlink()
    assert "not there" in refusal(path, "IMAGE_UNREADABLE")


@pytest.mark.parametrize("size", ["60000 60000 60000", "1 1 1073741825", "0 6 5", "-7 -6 5", "7.5 6 5"])
def test_a_header_that_lies_about_its_size_is_refused_before_reading(size: str, tmp_path: Path) -> None:
    refusal(edited(written(tmp_path / "x.mha"), "DimSize = 7 6 5", f"DimSize = {size}"), "INPUT_TOO_LARGE")
    refusal(edited(written(tmp_path / "x.nrrd"), "sizes: 7 6 5", f"sizes: {size}"), "INPUT_TOO_LARGE")


@pytest.mark.parametrize("encoding", ["gzip", "bzip2"])
def test_a_bomb_unpacks_no_further_than_its_header_says(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = gzip.compress if encoding == "gzip" else bz2.compress
    (tmp_path / "x.nrrd").write_bytes(nrrd(encoding=encoding, data=pack(bytes(50_000_000))))
    unpacked: list[int] = []
    original = raw._unpacked

    def watched(*arguments: Any) -> bytearray:
        content = original(*arguments)
        unpacked.append(len(content))
        return content

    monkeypatch.setattr(raw, "_unpacked", watched)
    assert "more" in refusal(tmp_path / "x.nrrd", "IMAGE_UNREADABLE")
    assert unpacked == [VALUES.nbytes + 1]


@pytest.mark.parametrize("outside", ["../secret.raw", "/etc/passwd", "link.raw", "..\\secret.raw", "C:/secret.raw"])
def test_voxels_outside_the_folder_are_not_opened(outside: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.raw").write_bytes(VALUES.tobytes())
    (tmp_path / "data" / "link.raw").symlink_to(tmp_path / "secret.raw")
    path = edited(written(tmp_path / "data" / "x.mhd"), "File = x.raw", f"File = {outside}")
    assert "outside" in refusal(path, "PATH_ESCAPE")
    (tmp_path / "data" / "y.nhdr").write_bytes(nrrd(more=f"data file: {outside}\n"))
    assert "outside" in refusal(tmp_path / "data" / "y.nhdr", "PATH_ESCAPE")


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("NDims = 3", "NDims = 4", "MODALITY_MISMATCH"),
        ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", "MODALITY_MISMATCH"),
        ("NDims = 3", "NDims = 3\nDimSize = 1 1 1", "IMAGE_UNREADABLE"),
        ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "", "GEOMETRY_MISSING"),
        ("ElementSpacing = 0.", "Elementspacing = 0.", "GEOMETRY_MISSING"),
        ("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 1 1 0", "GEOMETRY_INVALID"),
        ("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 0.6 0.8 0", "GEOMETRY_INVALID"),
        ("ElementSpacing = 0.", "ElementSpacing = -0.", "GEOMETRY_INVALID"),
        ("ElementSpacing = 0.", "ElementSpacing = nan 0.", "IMAGE_UNREADABLE"),
        ("MET_SHORT", "MET_STRING", "IMAGE_UNREADABLE"),
        ("BinaryData = True", "BinaryData = False", "IMAGE_UNREADABLE"),
        ("= LOCAL", "= LIST", "IMAGE_UNREADABLE"),
        ("= LOCAL", "= slice%03d.raw 1 5 1", "IMAGE_UNREADABLE"),
        ("ElementDataFile = LOCAL", "ElementDatafile = LOCAL", "IMAGE_UNREADABLE"),
    ],
)
def test_a_metaimage_that_could_be_misread_is_refused(old: str, new: str, code: str, tmp_path: Path) -> None:
    refusal(edited(written(tmp_path / "x.mha"), old, new), code)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("dimension: 3", "dimension: 4", "MODALITY_MISMATCH"),
        ("kinds: domain domain domain", "kinds: vector domain domain", "MODALITY_MISMATCH"),
        ("space: left-posterior-superior", "space: scanner-xyz", "GEOMETRY_MISSING"),
        ("space: left-posterior-superior\n", "", "GEOMETRY_MISSING"),
        ("(0,0.8,0)", "none", "GEOMETRY_MISSING"),
        ("space origin: (-195.25,12.5,-378)\n", "", "GEOMETRY_MISSING"),
        ("(0,0.8,0)", "(0.4,0.8,0)", "GEOMETRY_INVALID"),
        ("(0,0.8,0)", "(0,0,0)", "GEOMETRY_INVALID"),
        ("(0,0.8,0)", "(0,inf,0)", "IMAGE_UNREADABLE"),
        ("endian: little", 'endian: little\nspace units: "cm" "cm" "cm"', "GEOMETRY_INVALID"),
        ("type: int16", "type: block", "IMAGE_UNREADABLE"),
        ("encoding: raw", "encoding: ascii", "IMAGE_UNREADABLE"),
        ("endian: little\n", "", "IMAGE_UNREADABLE"),
        ("endian: little", "endian: little\nendian: big", "IMAGE_UNREADABLE"),
        ("endian: little", "endian: little\nline skip: 2", "IMAGE_UNREADABLE"),
        ("endian: little", "endian: little\ndata file: LIST", "IMAGE_UNREADABLE"),
        ("endian: little", "endian: little\ndata file: %03d.raw 1 5 1", "IMAGE_UNREADABLE"),
    ],
)
def test_an_nrrd_that_could_be_misread_is_refused(old: str, new: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "x.nrrd").write_bytes(nrrd(data=VALUES.tobytes()))
    refusal(edited(tmp_path / "x.nrrd", old, new), code)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_voxels_that_are_no_finite_numbers_are_refused(suffix: str, tmp_path: Path) -> None:
    for value in (np.nan, np.inf, 1e300):
        path = written(tmp_path / f"x{suffix}", image(values=np.full((2, 2, 2), value, np.float64)))
        refusal(path, "INTENSITY_INVALID")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd", ".nhdr"])
def test_labels_are_read_from_either_on_the_grid_of_their_image(suffix: str, tmp_path: Path) -> None:
    like = read_image(written(tmp_path / "image.mha", image(DIRECTIONS[5])))
    drawn = (VALUES > 0).astype(np.uint8) * 3
    labels = read_labels(written(tmp_path / f"mask{suffix}", image(DIRECTIONS[5], drawn), packed=True), like=like)
    assert ((like.voxels[0] > 0) * 3 == labels).all()
    moved = image(DIRECTIONS[5], drawn)
    moved.SetOrigin((0, 0, 0))
    with pytest.raises(ImageUnreadable, match="voxels apart") as e:
        read_labels(written(tmp_path / f"moved{suffix}", moved), like=like)
    assert e.value.code == "LABEL_GEOMETRY_MISMATCH"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["mha", "nrrd"]), st.lists(st.tuples(st.integers(0, 340), st.integers(0, 255)), max_size=8),
    st.booleans(),
)  # fmt: skip
def test_spoilt_bytes_are_read_or_refused_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, spoilt: list[tuple[int, int]], packed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"spoilt.{kind}"
    content = bytearray(written(path, packed=packed).read_bytes())
    for at, value in spoilt:
        content[at] = value
    path.write_bytes(content)
    message = ""
    try:
        assert read_image(path).voxels.dtype == np.float32
    except ImageUnreadable as e:
        message = str(e)
    assert "spoilt" not in message


def test_zlib_and_gzip_data_are_told_apart_by_their_own_heading(tmp_path: Path) -> None:
    path = written(tmp_path / "x.mhd", packed=True)
    assert (tmp_path / "x.zraw").read_bytes()[:1] == zlib.compress(b"")[:1]
    (tmp_path / "x.zraw").write_bytes(gzip.compress(VALUES.tobytes()))
    assert_same_image(read_image(path), image())
