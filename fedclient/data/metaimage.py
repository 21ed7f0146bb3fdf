"""MetaImage (.mhd with .raw or .zraw, .mha), the format of LUNA16, by its direction matrix and in millimetres.

ITK's frame is LPS; `AnatomicalOrientation` is a remark that ITK itself ignores, and so is it here.
"""

import re
from pathlib import Path

import numpy as np

from fedclient.data.raw import Layout, beside, header_lines, numbers, read_layout, three
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable

NAME = "MetaImage"
TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_NM": "NM", "MET_MOD_US": "US"}
# Names that one thing has had
_SAME = {
    "Orientation": "TransformMatrix", "Rotation": "TransformMatrix", "Position": "Offset", "Origin": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}  # fmt: skip


def read_metaimage(path: Path) -> Volume:
    """A volume of one grey channel; `modality` where the header states one.

    Raises:
        ImageUnreadable: IMAGE_UNREADABLE, GEOMETRY_MISSING, GEOMETRY_INVALID, MODALITY_MISMATCH (4-D or vectors),
            PATH_ESCAPE, INPUT_TOO_LARGE, INTENSITY_INVALID.
    """
    header, begin = _header(path)
    if header.get("NDims") != "3" or header.get("ElementNumberOfChannels", "1") != "1":
        raise ImageUnreadable(
            f"{NAME}: NDims {header.get('NDims', 'absent')[:3]!r}, channels "
            f"{header.get('ElementNumberOfChannels', '1')[:3]!r}; one volume of 3 dimensions and one channel is read. "
            f"Split it.",
            code="MODALITY_MISMATCH",
        )
    missing = [key for key in ("TransformMatrix", "Offset", "ElementSpacing") if key not in header]
    if missing:
        raise ImageUnreadable(
            f"{NAME}: the header lacks {', '.join(missing)}, so nobody knows left from right. Write it again with ITK.",
            code="GEOMETRY_MISSING",
        )
    stated = header.get("ElementType", "")
    if stated not in TYPES or header.get("BinaryData", "False").lower() not in ("true", "1"):
        raise ImageUnreadable(f"{NAME}: voxels as text or of an unknown type. Write it again as binary MET_SHORT.")
    order = ">" if header.get("BinaryDataByteOrderMSB", "False").lower() in ("true", "1") else "<"
    packed = header.get("CompressedData", "False").lower() in ("true", "1")
    affine_lps = np.eye(4)
    directions = np.array(numbers(header["TransformMatrix"], 9, NAME, "TransformMatrix")).reshape(3, 3)
    spacing_mm = np.array(numbers(header["ElementSpacing"], 3, NAME, "ElementSpacing"))
    affine_lps[:3, :3] = directions.T * spacing_mm  # the file lists the direction of axis i, then j, then k
    affine_lps[:3, 3] = numbers(header["Offset"], 3, NAME, "Offset")
    if np.abs(np.linalg.norm(directions, axis=1) - 1).max() > 1e-3 or spacing_mm.min() <= 0:
        raise ImageUnreadable(
            f"{NAME}: directions must have length 1 and spacings be above 0. Write it again.", code="GEOMETRY_INVALID"
        )
    data, skip_bytes = _data(path, header, begin)
    layout = Layout(
        path=data,
        skip_bytes=skip_bytes,
        dtype=np.dtype(order + TYPES[stated]),
        packing="zlib" if packed else "raw",
        shape=three(header.get("DimSize", ""), NAME, "DimSize"),
        affine_lps=affine_lps,
    )
    return read_layout(layout, NAME, MODALITIES.get(header.get("Modality", "")))


def voxel_file(path: Path) -> Path:
    """The file that holds the voxels: the header itself, or one beside it.

    Raises:
        ImageUnreadable: IMAGE_UNREADABLE, a header that is broken or names a file that is not there; PATH_ESCAPE.
    """
    header, begin = _header(path)
    return _data(path, header, begin)[0]


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Keys and values up to ElementDataFile, and where the bytes after it begin."""
    head, lines = header_lines(path, NAME)
    header: dict[str, str] = {}
    begin = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+$", lines):
        begin += len(line)
        key, equals, value = (part.strip() for part in line.partition("="))
        key = _SAME.get(key, key)
        if line.strip() and (not equals or key in header):
            break
        if line.strip():
            header[key] = value
        if key == "ElementDataFile" and begin <= len(head) and line.endswith("\n"):
            return header, begin
        if key == "ElementDataFile":  # a last line without an end: nothing follows
            return header, len(head)
    raise ImageUnreadable(f"{NAME}: the header is broken, or says a thing twice. Write it again with ITK.")


def _data(path: Path, header: dict[str, str], begin: int) -> tuple[Path, int]:
    """The file of the voxels and the bytes before them."""
    named, skip = header["ElementDataFile"], numbers(header.get("HeaderSize", "0"), 1, NAME, "HeaderSize")[0]
    if named.split(" ")[0].upper() == "LIST" or "%" in named:
        raise ImageUnreadable(f"{NAME}: its slices are files of their own. Write it again as one .mha file.")
    if named.upper() == "LOCAL":
        return path, begin
    if skip != int(skip) or skip < -1:
        raise ImageUnreadable(f"{NAME}: HeaderSize is no number of bytes. Write it again with ITK.")
    return beside(path, named, NAME), int(skip)
