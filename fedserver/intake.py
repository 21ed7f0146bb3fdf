"""Blobs at the gateway: weights out to the sites, uploads in from them, streamed between disk and TLS.

At the coordinator `blobs/out/SHA256` is what every site may read, `blobs/in/SITE/SHA256` what one site has sent, whole
and checked, and `blobs/in/SITE/SHA256.part` what it is sending.

Nothing here is fsynced: eight sites with 124 MB each cost 4 s of disk a round that way (measured at 264 MB/s). A
process that is killed loses nothing by it, and after a power cut `sweep` compares every upload with its name.
"""

import asyncio
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedserver.listener import Gone, Refused, Request, as_count
from fedserver.room import SPARE_BYTES
from shared_models.files import file_sha256
from shared_models.transfer import LENGTH_HEADER, OFFSET_HEADER, digest_start

BLOB_PATH = re.compile(r"/blobs/([0-9a-f]{64})")
BLOCK_BYTES = 1 << 20  # written, read and hashed at once, in a thread: 250 hand-overs a second at 250 MB/s
MOST_UNCLAIMED = 4  # files of one site, whole or not, that nobody has taken away
ABANDONED_S = 3600.0  # a whole upload is taken away seconds after its reply; by then its round is long over


@dataclass(frozen=True, slots=True)
class Intake:
    """Where blobs lie and how much of them is taken.

    Attributes:
        folder: `blobs` of the federation.
        busy: part files that a request is writing at this moment.
        promised: of those that were let in, how large each will be.
        lock: held while one is let in, so that two together never take the room of one.
    """

    folder: Path
    max_blob_bytes: int
    busy: set[Path] = field(default_factory=set)
    promised: dict[Path, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def published(self, digest: str) -> Path:
        return self.folder / "out" / digest

    def upload(self, site: str, digest: str) -> Path:
        return self.folder / "in" / site / digest

    def part(self, site: str, digest: str) -> Path:
        return self.folder / "in" / site / f"{digest}.part"


def sweep(intake: Intake) -> list[Path]:
    """Removes the uploads whose content is not what their name says, as a power cut may leave them; returns them."""
    whole = [path for path in (intake.folder / "in").glob("*/*") if re.fullmatch("[0-9a-f]{64}", path.name)]
    torn = [path for path in whole if file_sha256(path) != path.name]
    for path in torn:
        path.unlink()
    return torn


async def give_blob(intake: Intake, request: Request, digest: str) -> None:
    """GET: a published blob, or the range `bytes=FIRST-` or `bytes=FIRST-LAST` of it."""
    try:
        file = intake.published(digest).open("rb", buffering=0)
    except FileNotFoundError:
        raise Refused(404, f"blob {digest[:12]}: is not published here (any more).") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        first, last = _range(request.headers.get("range"), size)
        partial = "range" in request.headers
        headers = [("content-type", "application/octet-stream"), ("accept-ranges", "bytes")]
        if partial:
            headers.append(("content-range", f"bytes {first}-{last}/{size}"))
        await request.respond(206 if partial else 200, headers=headers, size=last - first + 1)
        offset = first
        coming = _read_ahead(file, offset, last)
        try:
            while offset <= last:
                block = await coming
                if not block:
                    raise Gone  # somebody cut the file
                offset += len(block)
                coming = _read_ahead(file, offset, last)
                await request.send_block(block, more=offset <= last)
        finally:
            await asyncio.wait([coming])  # it still reads from the file that is closed next


async def tell_blob(intake: Intake, request: Request, site: str, digest: str) -> None:
    """HEAD: whether the blob is published, and in `upload-offset` how much of it this site has sent already.

    An uploader announces its size in `upload-length` and hears here, before it sends, whether there is room.
    """
    announced = as_count(request.headers.get(LENGTH_HEADER, ""))
    if announced is not None and intake.part(site, digest) in intake.busy:
        raise _busy(digest)
    offset = await asyncio.to_thread(_held, intake, site, digest, announced)
    headers = [(OFFSET_HEADER, str(offset))]
    try:
        size = intake.published(digest).stat().st_size
    except FileNotFoundError:
        return await request.respond(404, headers=headers)
    await request.respond(200, headers=[*headers, ("accept-ranges", "bytes")], size=size)


async def take_blob(
    intake: Intake, request: Request, site: str, digest: str, still_welcome: Callable[[], Awaitable[object]]
) -> None:
    """PUT: the whole blob, or with `content-range` the rest of it; it appears under its digest once that is right.

    Args:
        still_welcome: called when all has come; raises Refused for a site that was revoked meanwhile.
    """
    first, total = _span(request)
    part = intake.part(site, digest)
    if part in intake.busy:
        raise _busy(digest)
    intake.busy.add(part)
    try:
        held = await asyncio.to_thread(_held, intake, site, digest, total)
        if held == total:
            return await _received(request, 200, total)
        if first != held:
            raise Refused(
                409, f"blob {digest[:12]}: {held} bytes are here, go on from there.", [(OFFSET_HEADER, str(held))]
            )
        sha = await asyncio.to_thread(digest_start, part, held) if held else hashlib.sha256()
        with await asyncio.to_thread(_open_part, part) as file:
            await _store_body(request, file, sha)
            if sha.hexdigest() != digest:
                part.unlink()
                raise Refused(422, f"blob {digest[:12]}: what came has another digest. Send it anew.")
            await still_welcome()
            file.flush()
            part.replace(intake.upload(site, digest))
    except OSError as error:
        raise Refused(507, f"blob {digest[:12]}: the coordinator's disk is full or broken. Try again.") from error
    finally:
        intake.promised.pop(part, None)
        intake.busy.discard(part)
    await _received(request, 201, total)


def _busy(digest: str) -> Refused:
    return Refused(503, f"blob {digest[:12]}: is being sent on another connection. Try again.")


async def _received(request: Request, status: int, size_bytes: int) -> None:
    await request.body.drain()
    await request.respond_json(status, {"size_bytes": size_bytes}, [(OFFSET_HEADER, str(size_bytes))])


async def _store_body(request: Request, file: IO[bytes], sha: "hashlib._Hash") -> None:
    """Appends the body to `file` and to `sha`; when the client hangs up, what came before is kept."""
    waiting: list[bytes] = []
    try:
        async for block in request.body.blocks():
            waiting.append(block)
            if sum(map(len, waiting)) >= BLOCK_BYTES:
                full, waiting = waiting, []
                await asyncio.to_thread(_append, file, sha, full)
    finally:
        await asyncio.to_thread(_append, file, sha, waiting)


def _append(file: IO[bytes], sha: "hashlib._Hash", blocks: Sequence[bytes]) -> None:
    for block in blocks:
        file.write(block)
        sha.update(block)


def _held(intake: Intake, site: str, digest: str, announced: int | None) -> int:
    """Bytes of the blob that this site has sent already; raises Refused if there is no room for all `announced`.

    With `announced`, the caller has seen to it that nobody else is writing the part.
    """
    try:
        return intake.upload(site, digest).stat().st_size
    except FileNotFoundError:
        pass
    part = intake.part(site, digest)
    held = part.stat().st_size if part.exists() else 0
    if announced is None:
        return held
    if announced > intake.max_blob_bytes:
        raise Refused(413, f"blob of {announced} bytes: max_blob_bytes of the coordinator is {intake.max_blob_bytes}.")
    if held >= announced:  # a crash came between the last byte and the check
        part.unlink()
        held = 0
    with intake.lock:
        _make_room(intake, part)
        coming = sum(max(0, size - _size_of(path)) for path, size in intake.promised.copy().items() if path != part)
        if shutil.disk_usage(intake.folder).free < announced - held + coming + SPARE_BYTES:
            raise Refused(507, "the coordinator's disk is nearly full. Try again later.")
        if part in intake.busy:
            intake.promised[part] = announced
    return held


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _make_room(intake: Intake, part: Path) -> None:
    """Raises Refused when the site's folder is full of uploads; abandoned ones give way, the oldest first.

    A part that nobody is sending is abandoned; a whole one is after `ABANDONED_S`: the run that it was for was killed.
    """
    part.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    let_in = [path for path in intake.promised.copy() if path.parent == part.parent]  # perhaps without a file so far
    others = {*part.parent.iterdir(), *let_in} - {part}
    old = time.time() - ABANDONED_S
    idle = [p for p in others if p not in intake.busy and (p.suffix == ".part" or p.stat().st_mtime < old)]
    surplus = len(others) - (MOST_UNCLAIMED - 1)
    if surplus > len(idle):
        raise Refused(507, f"{MOST_UNCLAIMED} uploads of this site are not taken away yet. Try again later.")
    for path in sorted(idle, key=lambda path: path.stat().st_mtime)[: max(0, surplus)]:
        path.unlink()


def _open_part(part: Path) -> IO[bytes]:
    return os.fdopen(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "ab")


def _read_ahead(file: IO[bytes], offset: int, last: int) -> "asyncio.Future[bytes]":
    count = min(BLOCK_BYTES, last + 1 - offset)
    return asyncio.get_running_loop().run_in_executor(None, os.pread, file.fileno(), count, offset)


def _span(request: Request) -> tuple[int, int]:
    """Where the body begins in the blob, and the blob's size."""
    size, asked = request.body.size_bytes, request.headers.get("content-range")
    if size == 0:
        raise Refused(411, "an upload needs a content-length above 0.")
    if asked is None:
        return 0, size
    found = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", asked)
    if found is None or int(found[2]) - int(found[1]) + 1 != size or int(found[2]) + 1 != int(found[3]):
        raise Refused(400, f"content-range {asked[:60]!r}: expected 'bytes FIRST-LAST/SIZE', up to the blob's end.")
    return int(found[1]), int(found[3])


def _range(asked: str | None, size: int) -> tuple[int, int]:
    """First and last byte to send."""
    if asked is None:
        return 0, size - 1
    found = re.fullmatch(r"bytes=(\d{1,15})-(\d{0,15})", asked)
    if found is None or int(found[1]) >= size or (found[2] and int(found[2]) < int(found[1])):
        message = f"range {asked[:60]!r}: expected 'bytes=FIRST-' or 'bytes=FIRST-LAST' of {size} bytes."
        raise Refused(416, message, [("content-range", f"bytes */{size}")])
    return int(found[1]), min(int(found[2]), size - 1) if found[2] else size - 1
