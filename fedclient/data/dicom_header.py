"""DICOM files opened with doubt: bounded, quiet, and every failure one of ours.

pydicom's warnings, log lines and exceptions quote values, so none of them gets out of here.
"""

import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedclient.data.formats import HEAD_BYTES, is_dicom
from shared_models.errors import ImageUnreadable

MAX_BYTES = 4 * 1024**3  # of a file, and of what a deflated one unpacks to
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
BROKEN = (
    InvalidDicomError, BytesLengthException, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError,
    ArithmeticError, NotImplementedError, RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip

logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


@contextmanager
def unbroken() -> Iterator[None]:
    """What pydicom or a codec raises in the block, on reading or when an element is first looked at, as ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BROKEN as e:
            raise ImageUnreadable(
                f"DICOM: the file is broken, cut short, or lacks something ({type(e).__name__}). "
                f"Copy or export it again.",
                code="DICOM_UNREADABLE",
            ) from None


def load(path: Path) -> Dataset:
    """The whole data set, pixels undecoded. For use inside `unbroken`."""
    with path.open("rb") as file:
        _doubt(file)
        return pydicom.dcmread(file, force=True)


def load_head(path: Path, tags: list[int]) -> Dataset:
    """Some elements of the groups up to 0028, without what comes after. For use inside `unbroken`."""
    with path.open("rb") as file:
        _doubt(file)
        return read_partial(file, stop_when=_after_group_0028, force=True, specific_tags=list(tags))


def number(data: Dataset, keyword: str) -> float | None:
    """The first value of an element as a finite number; None if it is absent, empty or no number."""
    found = numbers(data, keyword, None)
    return found[0] if found else None


def numbers(data: Dataset, keyword: str, count: int | None) -> tuple[float, ...] | None:
    """The values of an element, if they are finite numbers and as many as `count`, where that is given."""
    try:
        value = data.get(keyword)
        if value is None or value == "":
            return None
        several = value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
        found = tuple(float(each) for each in several)
    except BROKEN:
        return None
    return found if all(map(math.isfinite, found)) and (count is None or len(found) == count) else None


def text(data: Dataset, keyword: str) -> str:
    """The values of an element, upper case, joined by a backslash; empty if it is absent."""
    try:
        value: Any = data.get(keyword)
        if value is None:
            return ""
        several = value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
        return "\\".join(str(each).strip().upper() for each in several)
    except BROKEN:
        return ""


def _after_group_0028(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag.group > 0x0028


def _doubt(file: IO[bytes]) -> None:
    """Refuses what is no DICOM, or too large, before pydicom sees it; leaves the file at its beginning."""
    head = file.read(HEAD_BYTES)
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes > MAX_BYTES:
        raise ImageUnreadable(f"DICOM: {size_bytes} bytes; {MAX_BYTES} are read.", code="INPUT_TOO_LARGE")
    if not is_dicom(head):
        raise ImageUnreadable("DICOM: the file does not begin as DICOM does. Export it again.", code="DICOM_UNREADABLE")
    if head[128:132] == b"DICM":
        syntax, begin = _meta(file)
        if syntax == DeflatedExplicitVRLittleEndian:
            _inflate_within_bounds(file, begin)
    file.seek(0)


def _meta(file: IO[bytes]) -> tuple[str, int]:
    """The transfer syntax, and where the data set begins: counted, because the stated length of the group may lie."""
    file.seek(132)
    syntax = ""
    while len(head := file.read(8)) == 8 and head[:2] == b"\2\0":
        if head[4:6] in _LONG_VRS:
            (length,) = struct.unpack("<L", file.read(4))
        else:
            (length,) = struct.unpack("<H", head[6:])
        if length > MAX_BYTES:
            break
        if head[2:4] == b"\x10\0":
            syntax = file.read(length).rstrip(b"\0 ").decode("ascii", "replace")
        else:
            file.seek(length, os.SEEK_CUR)
    return syntax, file.tell() - len(head)


def _inflate_within_bounds(file: IO[bytes], begin: int) -> None:
    """pydicom unpacks a deflated data set in one go, whatever comes of it."""
    file.seek(begin)
    unpack, size_bytes = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while size_bytes <= MAX_BYTES and not unpack.eof and (packed := file.read(1 << 16)):
        while packed and size_bytes <= MAX_BYTES:
            size_bytes += len(unpack.decompress(packed, 1 << 24))
            packed = unpack.unconsumed_tail
    if size_bytes > MAX_BYTES:
        raise ImageUnreadable(f"DICOM: it unpacks to more than {MAX_BYTES} bytes.", code="INPUT_TOO_LARGE")
