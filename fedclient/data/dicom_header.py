"""DICOM files opened with doubt: bounded, quiet, and every failure one of ours.

pydicom's warnings, log lines and exceptions quote values, so none of them gets out of here.
"""

import io
import logging
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from fedclient.data.formats import HEAD_BYTES, is_dicom
from shared_models.errors import ImageUnreadable

MAX_BYTES = 4 * 1024**3  # of a file, and of what a deflated one unpacks to
MOST_HEAD = 1 << 22  # bytes that are read of a file for its head; what is passed over does not count
MOST_VALUE = 1 << 18  # bytes of one value in a head
MOST_PASSED = 1 << 19  # elements and items that are passed over in a head; as many take a second
EACH_READ = 1 << 7  # what a read counts beside its bytes: of an item, be it empty, pydicom makes a kilobyte of objects
_UNDEFINED = 0xFFFFFFFF  # the length of what a delimiter ends
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
        if begin := _doubt(file):
            _inflate_within_bounds(file, begin)
        file.seek(0)
        return pydicom.dcmread(file, force=True)


def load_head(path: Path, tags: list[int]) -> Dataset:
    """Some elements of the groups up to 0028, without what comes after. For use inside `unbroken`.

    Raises:
        ImageUnreadable: INPUT_TOO_LARGE, more than `MOST_HEAD` would have to be read, a value of more than
            `MOST_VALUE`, or sequences without a stated length passed over that hold more than `MOST_PASSED`.
    """
    with path.open("rb") as file:
        begin = _doubt(file)
        file.seek(0)
        if begin:
            return _deflated_head(file, begin, tags)
        with _bounded(file) as head:
            found = read_partial(head, _stop(head, tags), force=True, specific_tags=list(tags))
        found.buffer = None
        return found


def _deflated_head(file: IO[bytes], begin: int, tags: list[int]) -> Dataset:
    with _bounded(io.BytesIO(file.read(min(begin, MOST_HEAD)))) as head:
        meta = read_partial(head, force=True).file_meta
    unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(MOST_HEAD + MOST_VALUE), MOST_HEAD)
    with _bounded(io.BytesIO(unpacked), len(unpacked) < MOST_HEAD) as head:
        found = read_dataset(head, False, True, stop_when=_stop(head, tags), specific_tags=list(tags))
    found.file_meta = meta
    return found


class _Head:
    """A file that ends, for pydicom, where enough was read of it; then it is `spent`.

    Attributes:
        whole: nothing is left out at its end.
    """

    def __init__(self, file: IO[bytes], whole: bool = True) -> None:
        self.file, self.whole = file, whole
        self.seek, self.tell = file.seek, file.tell
        self.read_bytes = self.passed = 0
        self.spent = False

    def read(self, size: int = -1) -> bytes:
        self.read_bytes += EACH_READ + size
        if self.spent or not 0 <= size <= MOST_VALUE or self.read_bytes > MOST_HEAD:
            self.spent = True
            return b""
        found = self.file.read(size)
        self.spent = len(found) < size and not self.whole
        return found

    def pass_over(self, explicit: bool) -> None:
        """From the first item of a value without a stated length to its delimiter, of which pydicom makes no objects.

        Args:
            explicit: elements state their VR, but for those that stand in one of VR UN.
        """
        order, depth = "", 1
        while len(begin := self.file.read(8)) == 8 and self.passed < MOST_PASSED:
            self.passed += 1
            if not order:
                if begin[:2] not in (b"\xfe\xff", b"\xff\xfe"):  # no items: pydicom looks for the delimiter
                    self.file.seek(-8, os.SEEK_CUR)
                    return
                order = "<" if begin[:1] == b"\xfe" else ">"
            group, element, length = struct.unpack(f"{order}HHL", begin)
            if (group, element) == (0xFFFE, 0xE0DD):
                depth -= 1
                if depth == 0:
                    self.file.seek(-8, os.SEEK_CUR)
                    return
            elif group != 0xFFFE:
                if explicit and begin[4:6].isalpha() and begin[4:6].isupper():
                    if begin[4:6] in _LONG_VRS:
                        (length,) = struct.unpack(f"{order}L", self.file.read(4))
                    else:
                        (length,) = struct.unpack(f"{order}H", begin[6:])
                depth += length == _UNDEFINED
            if length != _UNDEFINED:
                self.file.seek(length, os.SEEK_CUR)
        self.spent = len(begin) == 8 or not self.whole


@contextmanager
def _bounded(file: IO[bytes], whole: bool = True) -> Iterator[Any]:
    """A `_Head`, and the error for one that was spent in the block, whatever pydicom makes of its end."""
    head = _Head(file, whole)
    try:
        yield head
    finally:
        if head.spent:
            raise ImageUnreadable(
                f"DICOM: more than {MOST_HEAD >> 20} MiB, or than {MOST_PASSED} elements of sequences, would have to "
                f"be read to know what it is. Export it again without private elements.",
                code="INPUT_TOO_LARGE",
            ) from None


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


def _stop(head: _Head, tags: Container[int]) -> Callable[[BaseTag, str | None, int], bool]:
    """Tells pydicom to end after group 0028, and takes `head` past sequences that are not among `tags`."""

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag.group <= 0x0028 and length == _UNDEFINED and tag not in tags:
            head.pass_over(vr is not None)
        return tag.group > 0x0028

    return stop


def _doubt(file: IO[bytes]) -> int:
    """Refuses what is no DICOM, or too large, before pydicom sees it; where a deflated data set begins, 0 of others."""
    head = file.read(HEAD_BYTES)
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes > MAX_BYTES:
        raise ImageUnreadable(f"DICOM: {size_bytes} bytes; {MAX_BYTES} are read.", code="INPUT_TOO_LARGE")
    if not is_dicom(head):
        raise ImageUnreadable("DICOM: the file does not begin as DICOM does. Export it again.", code="DICOM_UNREADABLE")
    if head[128:132] == b"DICM":
        syntax, begin = _meta(file)
        if syntax == DeflatedExplicitVRLittleEndian:
            return begin
    return 0


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
