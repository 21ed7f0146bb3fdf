"""Room for the cache: how much it may take up, what goes when it is full, and that a run which cannot fit says so."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared_models.errors import OrderRefused

GIB = 2**30
QUOTA_GIB = 100.0  # unless site.toml says otherwise
REST_S = 7 * 86400.0  # a file of the plan in use that was not used for so long belongs to a case that is gone
TORN_S = 86400.0  # what a killed process left half written
LOOK = 8  # cases from whose size that of all is estimated
DOUBT = 0.75  # a run is not refused on an estimate unless it is too large by so much
SPARE_BYTES = GIB // 4  # of the disk, for others
SHARE, LOOKED_S = 64, 60.0  # of what was free at the last look, a process fills so much, for so long, before the next


@dataclass(frozen=True, slots=True)
class Room:
    """The cache folder, the plan that the present run uses, and what all plans together may take up."""

    cache: Path
    plan: str
    quota_bytes: int = int(QUOTA_GIB * GIB)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size_bytes: int
    used_at: float


@dataclass(slots=True)
class _Look:
    """What this process may still write before it looks at the files again, which takes as long as they are many."""

    left_bytes: int
    until_s: float


_looks: dict[Room, _Look] = {}


def used(path: Path) -> None:
    """Notes that a file is in use; not by its access time, which many disks do not keep."""
    with suppress(FileNotFoundError):
        os.utime(path)


def cache_bytes(cache: Path) -> int:
    """What all plans together take up now."""
    return sum(file.size_bytes for file in _files(Room(cache, "")))


def make_room(room: Room, size_bytes: int) -> None:
    """Lets go of files until `size_bytes` fit in: the least recently used first, and none of the plan in use.

    A file that goes while another process has it mapped stays readable there. So many processes may fill the cache at
    once as `SHARE` says, and none of them writes more than the quota.

    Raises:
        OrderRefused: `CACHE_FULL`: the present run alone fills the quota.
    """
    look = _looks.get(room)
    if look is not None and size_bytes <= look.left_bytes and time.monotonic() < look.until_s:
        look.left_bytes -= size_bytes
        return
    files = _files(room)
    held = sum(file.size_bytes for file in files)
    _looks[room] = _Look((room.quota_bytes - held - size_bytes) // SHARE, time.monotonic() + LOOKED_S)
    for file in _spare(room, files):
        if held + size_bytes <= room.quota_bytes:
            return
        file.path.unlink(missing_ok=True)
        held -= file.size_bytes
        with suppress(OSError):  # the last of its plan
            file.path.parent.rmdir()
    if held + size_bytes > room.quota_bytes:
        raise _full(room, f"{_gib(held)} GiB of this run are in it and the next case needs {_gib(size_bytes)} more")


def expect(room: Room, sizes: Sequence[int], in_all: int) -> None:
    """Looks ahead once the first `LOOK` cases of a run of `in_all` are there, whose `sizes` are in bytes.

    Raises:
        OrderRefused: `CACHE_FULL`: all of them will not fit, by far.
    """
    if len(sizes) != min(LOOK, in_all):
        return
    needed = sum(sizes) / len(sizes) * in_all
    files = _files(room)
    spare = sum(file.size_bytes for file in _spare(room, files))
    kept = sum(file.size_bytes for file in files) - spare
    disk = shutil.disk_usage(room.cache).free + spare + kept - SPARE_BYTES
    if DOUBT * needed > room.quota_bytes:
        raise _full(room, f"{in_all} cases need about {_gib(needed)} GiB, judging by the first {len(sizes)}")
    if DOUBT * needed > disk:
        raise OrderRefused(
            "CACHE_FULL",
            f"{room.cache}: {in_all} cases need about {_gib(needed)} GiB, judging by the first {len(sizes)}; the disk "
            f"has room for {_gib(max(0, disk))} GiB. Free some, or move the site's folder to a larger disk.",
        )


def _full(room: Room, why: str) -> OrderRefused:
    return OrderRefused(
        "CACHE_FULL",
        f"{room.cache}: {why}; `[cache] quota_gib` allows {_gib(room.quota_bytes)} GiB. Raise it in site.toml "
        f"(the disk has {_gib(shutil.disk_usage(room.cache).free)} GiB left).",
    )


def _files(room: Room) -> list[_File]:
    found = []
    for path in room.cache.glob("*/*"):
        with suppress(FileNotFoundError):  # another process makes room as well
            facts = path.stat()
            found.append(_File(path, facts.st_size, facts.st_mtime))
    return found


def _spare(room: Room, files: Sequence[_File]) -> list[_File]:
    """Files that may go, in the order in which they do."""
    now = time.time()
    rest = {True: TORN_S, False: REST_S}
    free = [
        file
        for file in files
        if (file.path.parent.name != room.plan and file.path.suffix != ".part")
        or file.used_at < now - rest[file.path.suffix == ".part"]
    ]
    return sorted(free, key=lambda file: file.used_at)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.3g}"
