"""Everything that a coordinator gets to see, kept while it runs: a curious one that throws nothing away."""

import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S = 0.01
EVERY = 100  # polls between two copies of databases and files that change


@contextmanager
def recorded(federation: Path, into: Path, sites: Mapping[str, Path], kept: Path) -> Iterator[None]:
    """Keeps in `into` what lies in `federation` while the block runs: uploads as they come (by a link), the rest as
    copies; and in `kept` the finished work of each site, for a test that knows what to look for.

    Uploads are named by their digest and never change; databases are copied with their journals, as they are.
    """
    into.mkdir(parents=True)
    stop = threading.Event()

    def look() -> None:
        turn = 0
        while not stop.is_set():
            for upload in (federation / "blobs" / "in").glob("*/*"):
                if re.fullmatch("[0-9a-f]{64}", upload.name):  # whole; a part may be cut short by its end
                    link(upload, into / "blobs" / upload.parent.name / upload.name)
            for site, folder in sites.items():
                for work in (folder / "runs").glob("*/[rs]*"):
                    link(work, kept / site / work.name)
            if turn % EVERY == 0:
                copy(federation, into / f"turn-{turn // EVERY:05}")
            turn += 1
            stop.wait(POLL_S)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        copy(federation, into / "end")


def link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError, FileNotFoundError):
        os.link(path, to)


def copy(federation: Path, into: Path) -> None:
    """Files that are not as they were in the last copy, but for uploads, which are linked, and weights."""
    seen: dict[Path, tuple[int, int]] = _SEEN.setdefault(into.parent, {})
    for path in federation.rglob("*"):
        with suppress(FileNotFoundError, OSError):
            if not path.is_file() or path.is_relative_to(federation / "blobs") or path.is_socket():
                continue
            state = path.stat().st_mtime_ns, path.stat().st_size
            if seen.get(path) != state:
                target = into / path.relative_to(federation)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                seen[path] = state


_SEEN: dict[Path, dict[Path, tuple[int, int]]] = {}


def holding(record: Path, secrets: dict[str, bytes]) -> dict[str, str]:
    """Secret -> a file of the record that holds its bytes, for those that are held somewhere."""
    found: dict[str, str] = {}
    for path in sorted(p for p in record.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for name, secret in secrets.items():
            if name not in found and secret in content:
                found[name] = str(path.relative_to(record))
    return found
