"""Bodies of many parts straight to disk, a block at a time: `multipart/form-data` of pages and `multipart/related`.

Bounds hold before a byte is looked into: of the whole body, of the number of parts, of the headers of each.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from fedclient.serving.jobs import Overloaded, Room
from shared_models.errors import FederationError

MOST_HEADERS = 8192  # bytes of the headers of one part
MOST_PARTS = 20_000
STALL_S = 60.0  # longest wait for the next bytes
SLOWEST = 1 << 16  # bytes a second on the mean, once `STALL_S` are over
LONGEST_S = 3600.0  # of a body


class BodyRefused(FederationError):
    """A body that is not taken.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Part:
    """One part, on disk.

    Attributes:
        filename: as sent, and not to be trusted.
    """

    path: Path
    filename: str = field(repr=False, default="")
    content_type: str = ""
    size_bytes: int = 0


async def parts_of(
    body: AsyncIterator[bytes],
    content_type: str,
    kind: str,
    most_bytes: int,
    room: Room,
    new_file: Callable[[int, str], Path],
    clock: Callable[[], float] = time.monotonic,
    lost: Callable[[Path], None] = lambda path: None,
) -> list[Part]:
    """Writes each part to `new_file(number, filename)`, the number from 1; files of a body that is refused are deleted.

    Room is taken for what was written; of a refused body it is given back.

    Args:
        kind: `multipart/form-data` or `multipart/related`.
        lost: hears, in another thread, of each file of a body that is refused, before it is deleted.

    Raises:
        BodyRefused: another kind, no parts, broken, too large, too many, or too slow.
        Overloaded: no room, or a disk that takes no more.
    """
    given, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if given.decode("latin-1") != kind or not re.fullmatch(rb"[\x21-\x7e ]{1,70}", boundary):
        raise BodyRefused(415, f"send the files as {kind} with a boundary.")
    writer = _Writer(most_bytes, room, new_file)
    parser = MultipartParser(boundary, writer.callbacks())
    try:
        iterator, began = body.__aiter__(), clock()
        while True:
            left_s = time_left(clock() - began, writer.seen)
            try:
                async with asyncio.timeout(min(STALL_S, left_s)):
                    block = await anext(iterator)
            except StopAsyncIteration:
                break
            writer.count(len(block))
            parser.write(block)
        parser.finalize()
        if not writer.ended or not writer.parts:
            raise BodyRefused(400, "the body is cut short, or holds no file.")
    except BaseException as error:
        await asyncio.to_thread(writer.undo, lost)
        if isinstance(error, MultipartParseError):
            raise BodyRefused(400, "the body is not of the parts that its header says.") from None
        if isinstance(error, TimeoutError):
            raise BodyRefused(
                408, f"nothing came for {STALL_S:.0f} s, or less than {SLOWEST >> 10} KiB a second."
            ) from None
        if isinstance(error, FileExistsError):
            raise BodyRefused(400, "two files of one name were sent. Send each image on its own.") from None
        if isinstance(error, OSError):
            raise Overloaded("the files could not be written here. Try again later.") from None
        raise
    return writer.parts


def time_left(gone_s: float, seen_bytes: int) -> float:
    """How long a body may still take to send its next bytes, that one who sends a byte a minute holds no place."""
    return max(0.0, min(STALL_S + seen_bytes / SLOWEST, LONGEST_S) - gone_s)


class _Writer:
    """What the parser calls as it meets the pieces of a body."""

    def __init__(self, most_bytes: int, room: Room, new_file: Callable[[int, str], Path]) -> None:
        self.most_bytes, self.room, self.new_file = most_bytes, room, new_file
        self.parts: list[Part] = []
        self.ended = False
        self.seen = 0
        self._taken = 0
        self._file: IO[bytes] | None = None
        self._name, self._value, self._headers = b"", b"", dict[bytes, bytes]()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }

    def count(self, size_bytes: int) -> None:
        self.seen += size_bytes
        if self.seen > self.most_bytes:
            raise BodyRefused(413, f"more than {self.most_bytes >> 20} MiB at once are not taken.")

    def undo(self, lost: Callable[[Path], None]) -> None:
        self._close()
        for part in self.parts:
            lost(part.path)
            part.path.unlink(missing_ok=True)
        self.room.give(self._taken)

    def _begin(self) -> None:
        if len(self.parts) >= MOST_PARTS:
            raise BodyRefused(413, f"more than {MOST_PARTS} files at once are not taken.")
        self._name, self._value, self._headers = b"", b"", {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._bounded()

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bounded()

    def _bounded(self) -> None:
        if sum(len(k) + len(v) for k, v in self._headers.items()) + len(self._name) + len(self._value) > MOST_HEADERS:
            raise BodyRefused(400, "the headers of a part are too long.")

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        filename = options.get(b"filename", b"").decode("utf-8", "replace")
        kind = self._headers.get(b"content-type", b"").decode("latin-1")
        part = Part(self.new_file(len(self.parts) + 1, filename), filename, kind.partition(";")[0].strip().lower())
        self._file = part.path.open("xb")
        self.parts.append(part)

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        size_bytes = end - start
        self.room.take(size_bytes)
        self._taken += size_bytes
        self.parts[-1].size_bytes += size_bytes
        self._file.write(memoryview(data)[start:end])

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _end(self) -> None:
        self.ended = True
