"""Compressed frames, doubted before a decoder sees them.

A decoder makes room for what the frame says, not for what the header of the file says; and gdcm 3.2 ends the process on
a JPEG frame whose marker segments are spoilt (one byte is enough), so these are read here first.
"""

import re
import struct
from typing import NamedTuple

from shared_models.errors import ImageUnreadable

_LONE = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # in coded pixels: a marker that is no restart


class Stated(NamedTuple):
    """What a frame says of itself; bits is 0 where they are not read (JPEG 2000)."""

    rows: int
    columns: int
    bits: int


def check_size(frame: bytes, rows: int, columns: int) -> None:
    """Refuses a frame that states another size than the header."""
    found = stated(frame)
    if found is not None and (found.rows, found.columns) != (rows, columns):
        raise ImageUnreadable(
            f"DICOM: a compressed frame says it has {found.rows} x {found.columns} pixels, the header {rows} x "
            f"{columns}. Export it again.",
            code="DICOM_UNREADABLE",
        )


def stated(frame: bytes) -> Stated | None:
    """The size in a JPEG, JPEG-LS or JPEG 2000 frame; None for run lengths, which have no heading."""
    j2k = frame.find(b"\xff\x4f\xff\x51", 0, 1024)
    if j2k >= 0:
        x, y, x0, y0 = struct.unpack_from(">4L", frame, j2k + 8)
        return Stated(y - y0, x - x0, 0)
    at = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4])
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns = struct.unpack_from(">BHH", frame, at + 4)
            return Stated(rows, columns, bits)
        at += 1 if marker == 0xFF else 2 + length
    return None


def check_jpeg(frame: bytes, *, lossless: bool, bits_allocated: int) -> None:
    """Refuses a JPEG frame (ITU-T T.81) that is not one grey scan, sound down to its last marker segment.

    Raises:
        ValueError: which `unbroken` turns into DICOM_UNREADABLE.
    """
    if not frame.startswith(b"\xff\xd8"):
        raise ValueError
    at, framed = 2, False
    while True:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4])
        body = frame[at + 4 : at + 2 + length]
        if frame[at] != 0xFF or length < 2 or len(body) != length - 2:
            raise ValueError
        if marker in ((0xC3,) if lossless else (0xC0, 0xC1)):
            bits, _, _, components, _, sampling, _ = struct.unpack(">BHHBBBB", body)
            if framed or components != 1 or sampling >> 4 not in (1, 2, 3, 4) or sampling & 15 not in (1, 2, 3, 4):
                raise ValueError
            if not 2 <= bits <= 16 or (bits > 8) != (bits_allocated > 8) or (not lossless and bits not in (8, 12)):
                raise ValueError
            framed = True
        elif marker == 0xDA:
            components, _, _, predictor, _, _ = struct.unpack(">6B", body)
            if not framed or components != 1 or (lossless and not 1 <= predictor <= 7):
                raise ValueError
            break
        elif marker not in (0xC4, 0xDB, 0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:
            raise ValueError
        at += 2 + length
    end = _LONE.search(frame, at + 2 + length)
    if end is None or end[1] != b"\xd9":
        raise ValueError
