"""NRRD (.nrrd, .nhdr with its data beside it), the format of 3D Slicer, by its space directions."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclient.data.raw import Layout, Packing, beside, header_lines, numbers, read_layout, three
from fedclient.data.volume import Volume
from shared_models.errors import ImageUnreadable

NAME = "NRRD"
TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
PACKINGS: dict[str, Packing] = {"raw": "raw", "gzip": "zlib", "gz": "zlib", "bzip2": "bzip2", "bz2": "bzip2"}
# To LPS: the signs of left, posterior, superior
SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip


def read_nrrd(path: Path) -> Volume:
    """A volume of one grey channel.

    Raises:
        ImageUnreadable: IMAGE_UNREADABLE, GEOMETRY_MISSING, GEOMETRY_INVALID, MODALITY_MISMATCH (4-D or vectors),
            PATH_ESCAPE, INPUT_TOO_LARGE, INTENSITY_INVALID.
    """
    header, begin = _header(path)
    kinds = header.get("kinds", "").lower().split()
    if header.get("dimension") != "3" or any(kind not in ("domain", "space", "none", "???") for kind in kinds):
        raise ImageUnreadable(
            f"{NAME}: 4-D, vectors or colour; one volume of 3 dimensions and one channel is read. Split it.",
            code="MODALITY_MISMATCH",
        )
    kind = next((code for code, names in TYPES.items() if header.get("type", "").lower() in names), None)
    packing = PACKINGS.get(header.get("encoding", "").lower())
    endian = {"little": "<", "big": ">"}.get(header.get("endian", "").lower())
    if kind is None or packing is None or (endian is None and kind[1] != "1"):
        raise ImageUnreadable(f"{NAME}: voxels as text, of an unknown type, packing or byte order. Save as gzip.")
    affine_lps = _affine(header)
    shape = three(header.get("sizes", ""), NAME, "sizes")
    skip = numbers(header.get("byte skip", "0"), 1, NAME, "byte skip")[0]
    if header.get("line skip", "0") != "0" or skip != int(skip) or skip < -1 or (skip and packing != "raw"):
        raise ImageUnreadable(f"{NAME}: it skips lines, or bytes of packed data. Save it again as one .nrrd file.")
    data = path
    named = header.get("data file", header.get("datafile"))
    if named is not None:
        if named.split(" ")[0].upper() == "LIST" or "%" in named:
            raise ImageUnreadable(f"{NAME}: its slices are files of their own. Save it as one .nrrd file.")
        data, begin = beside(path, named, NAME), 0
    return read_layout(
        Layout(
            data, -1 if skip < 0 else begin + int(skip), np.dtype((endian or "<") + kind), packing, shape, affine_lps
        ),
        NAME,
    )


def _affine(header: dict[str, str]) -> NDArray[np.float64]:
    signs = SPACES.get(header.get("space", "").lower())
    directions = re.findall(r"\(([^()]*)\)", header.get("space directions", ""))
    origin = re.findall(r"\(([^()]*)\)", header.get("space origin", ""))
    if signs is None or len(directions) != 3 or len(origin) != 1:
        raise ImageUnreadable(
            f"{NAME}: space, space directions or space origin is absent or not tied to a patient, so nobody knows left "
            f"from right. Save it from 3D Slicer with its geometry.",
            code="GEOMETRY_MISSING",
        )
    units = {unit for unit in re.findall(r'"([^"]*)"', header.get("space units", "")) if unit}
    if units - {"mm", "millimeter", "millimeters"}:
        raise ImageUnreadable(f"{NAME}: space units are not mm. Save it in millimetres.", code="GEOMETRY_INVALID")
    affine_lps = np.eye(4)
    for column, vector in enumerate((*directions, *origin)):
        values = numbers(vector.replace(",", " "), 3, NAME, "space directions and origin")
        affine_lps[:3, column] = np.multiply(values, signs)
    return affine_lps


def _header(path: Path) -> tuple[dict[str, str], int]:
    """Fields in small letters, and where the bytes after the empty line begin; keys with `:=` are passed over."""
    head, lines = header_lines(path, NAME)
    header: dict[str, str] = {}
    begin = 0
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+$", lines)):
        begin += len(line)
        words = line.strip()
        if not words:
            return header, begin
        field, colon, value = words.partition(": ")
        key = field.lower()
        if number == 0 or words.startswith("#") or ":=" in words:
            continue
        if not colon or key in header:
            break
        header[key] = value.strip()
    else:
        if begin == len(head) < 1 << 16:
            return header, begin  # a detached header needs no empty line
    raise ImageUnreadable(f"{NAME}: the header is broken, or says a thing twice. Save it again.")
