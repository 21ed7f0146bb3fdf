"""Files that are there whole or not at all, and readable by their owner alone."""

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """In this block an OSError that names no file, as of a write to a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, synced: bool = True) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` that takes its place, fsynced, when the block ends without an error.

    Without `synced` a killed process still leaves the file whole or not at all, but a power cut may spoil it.
    """
    private_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    try:
        with naming(path), os.fdopen(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if synced:
        sync_folder(path.parent)


def private_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for their owner alone; `mkdir` does so for the last only."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True, mode=0o700)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> bytes:
    """UTF-8, sorted keys, no blanks, no NaN: equal values have equal bytes, so that a digest names the value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")


def write_named(folder: Path, name: str, value: object) -> Path:
    """FOLDER/NAME-HASH.json, called by its content, so that another one never takes the place of one in use."""
    path = folder / f"{name}-{hashlib.sha256(canonical_json(value)).hexdigest()[:12]}.json"
    write_json(path, value)
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one thread of one process at a time into blocks over the same `path`, a file of no content."""
    private_folder(path.parent)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # lets go of the lock, as the end of the process does


def append_json(path: Path, line: Mapping[str, object]) -> None:
    """Adds one JSON line, whole and fsynced; a torn last line of a killed writer is cut off first."""
    content = canonical_json(dict(line)) + b"\n"
    private_folder(path.parent)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with naming(path):
            size = os.lseek(handle, 0, os.SEEK_END)
            while size and os.pread(handle, 1, size - 1) != b"\n":
                size -= 1
            os.ftruncate(handle, size)
            if os.pwrite(handle, content, size) < len(content):  # a disk that fills up takes a part, without a word
                os.ftruncate(handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`; a missing file has none, a torn last line is left out."""
    if not path.exists():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in whole]
