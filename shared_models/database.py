"""A SQLite file of one owner: there whole or not at all, written ahead, every commit synced before it counts.

Every call opens the file anew, so that any thread or process may make it; write-ahead logging lets them read while one
writes.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from shared_models.errors import StateInvalid
from shared_models.files import private_folder, sync_folder

BUSY_TIMEOUT_S = 20.0


def create(path: Path, schema: str) -> None:
    """Makes `path` with the tables of `schema`; raises StateInvalid if there is a file."""
    private_folder(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.part")
    for left in (part, *(part.with_name(part.name + end) for end in ("-wal", "-shm"))):
        left.unlink(missing_ok=True)  # of a process with our number that was killed here: SQLite would read them
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # its -wal and -shm take over the mode
    try:
        with connected(part) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(schema)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.link(part, path)
    except FileExistsError as error:
        raise StateInvalid(f"{path}: is there already. Use it, or choose another folder.") from error
    finally:
        part.unlink()
    sync_folder(path.parent)


def check(path: Path, version: int, made_by: str) -> None:
    """Raises StateInvalid unless `path` is a sound file of layout `version` that only we can read."""
    if not path.is_file():
        raise StateInvalid(f"{path}: is missing. Point to a folder that {made_by} made, or restore a backup.")
    facts = path.stat()
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise StateInvalid(f"{path}: must be ours alone (mode {facts.st_mode & 0o777:o}). Mend it: `chmod 600 {path}`.")
    with reading(path) as db:
        found_version = db.execute("PRAGMA user_version").fetchone()[0]
        found = db.execute("PRAGMA integrity_check(1)").fetchone()[0].replace("\n", " ")
    if found != "ok":
        raise StateInvalid(f"{path}: is damaged ({found}). Restore it from a backup.")
    if found_version != version:
        raise StateInvalid(
            f"{path}: has layout {found_version}, this package reads {version}. Use the package that made it."
        )


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write: it waits for no writer and none waits for it, not even as it closes."""
    with connected(path, "ro") as db:
        yield db


@contextmanager
def connected(path: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    """A connection for one call; whatever SQLite complains of becomes a StateInvalid that names the file."""
    try:
        uri = f"{path.resolve().as_uri()}?mode={mode}"  # never makes the file
        with closing(sqlite3.connect(uri, timeout=BUSY_TIMEOUT_S, isolation_level=None, uri=True)) as db:
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            yield db
    except sqlite3.Error as error:
        raise StateInvalid(
            f"{path}: {error}. Check the disk and that nobody else uses the folder, or restore a backup."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A transaction that is written whole when the block ends, and not at all when it raises."""
    with connected(path) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")
