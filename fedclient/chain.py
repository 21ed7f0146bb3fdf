"""A table that only grows, so that a file which was cut, changed or put back from a backup is refused.

Each entry carries the digest of the one before it. How far the file had come stands in a second file, the witness,
which is written after each commit: a process that dies in between leaves a file that is ahead of it, never behind. Of
two that commit side by side the slower takes nothing back from it.
"""

import hashlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from shared_models.database import connected
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import canonical_json, locked, write_atomic
from shared_models.parse import STRICT, Count, Sha256, parse_json, plain

NOTHING = "0" * 64
SCHEMA = """
CREATE TABLE entries (
    number INTEGER PRIMARY KEY,
    sha256 TEXT NOT NULL,
    content TEXT NOT NULL
) STRICT;
CREATE TRIGGER kept_as_written BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'an entry is never changed'); END;
CREATE TRIGGER kept_for_good BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'an entry is never removed'); END;
"""


@dataclass(frozen=True, slots=True)
class Head:
    """How far a file has come: a receipt for whoever wants to know later that nothing was taken back."""

    __pydantic_config__ = STRICT
    entries: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Chain:
    """The entries of the SQLite file `path`, and their `witness`.

    Attributes:
        code: of the refusal of a file that is not the one that it was.
        until: what is not done before it is mended, and how it is.
    """

    path: Path
    witness: Path
    code: str
    until: str

    def begin(self) -> None:
        """Makes the witness of a file without entries; OrderRefused where an older file has lost its own."""
        if not self.witness.exists():
            if self.rows():
                raise OrderRefused(self.code, f"{self.witness}: is missing. Restore it from a backup.")
            self.seen(Head(0, NOTHING))

    def rows(self) -> list[tuple[str, str]]:
        """Digest and content of every entry."""
        with connected(self.path) as db:
            return db.execute("SELECT sha256, content FROM entries ORDER BY number").fetchall()

    def read(self) -> tuple[list[str], Head]:
        """All entries, once their chain holds and reaches at least as far as it had come before."""
        self.check_receipt(self._witnessed())
        last, rows = NOTHING, self.rows()
        for number, (digest, content) in enumerate(rows, start=1):
            if digest != _digest(last, number, content):
                raise OrderRefused(
                    self.code, f"{self.path}: entry {number} is not the one that was written. Restore it."
                )
            last = digest
        return [content for _, content in rows], Head(len(rows), last)

    def check_receipt(self, receipt: Head) -> None:
        """Raises OrderRefused unless the file still begins with what `receipt` was given for."""
        digests = [NOTHING, *(digest for digest, _ in self.rows())]
        if receipt.entries >= len(digests) or digests[receipt.entries] != receipt.sha256:
            raise OrderRefused(
                self.code,
                f"{self.path}: had {receipt.entries} entries and has others now, {len(digests) - 1} in number. "
                f"It was cut, changed or put back from a backup: bring the newest one back. {self.until}",
            )

    def add(self, db: sqlite3.Connection, content: str) -> Head:
        """Adds an entry inside a transaction; `seen` tells the witness of it once that is committed."""
        found = db.execute("SELECT number, sha256 FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        number, last = found or (0, NOTHING)
        head = Head(number + 1, _digest(last, number + 1, content))
        db.execute("INSERT INTO entries VALUES (?, ?, ?)", [head.entries, head.sha256, content])
        return head

    def seen(self, head: Head) -> None:
        """Moves the witness on to `head`, unless another process has moved it further meanwhile."""
        with locked(self.witness.with_suffix(".lock")):
            if not self.witness.exists() or self._witnessed().entries < head.entries:
                write_atomic(self.witness, canonical_json(plain(head)))

    def _witnessed(self) -> Head:
        return parse_json(Head, self.witness.read_bytes(), str(self.witness), StateInvalid)


def _digest(last: str, number: int, content: str) -> str:
    return hashlib.sha256(f"{last} {number} {content}".encode()).hexdigest()
