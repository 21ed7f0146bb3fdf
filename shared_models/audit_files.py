"""The files of an audit log: audit.jsonl, and of the keys before, each put away as audit-1234abcd.jsonl."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_models.alarms import events

LOG, LAST = "audit.jsonl", "audit.head.json"
EARLIER = "audit-*.jsonl"


def first_line(path: Path) -> bytes:
    """The first line of a log without its end; its SHA-256 is the log's name."""
    with path.open("rb") as file:
        return file.readline().removesuffix(b"\n")


def away(path: Path, log: str) -> Path:
    """Where a file of the log of this name is kept once another was begun: audit.jsonl as audit-1234abcd.jsonl."""
    return path.with_name(path.name.replace("audit", f"audit-{log[:8]}", 1))


def earlier_logs(folder: Path) -> list[Path]:
    """The logs of the keys before, the oldest first: none before the one that it names, else by their time.

    One whose first line is damaged comes before all.
    """
    begun = {path: _begun(path) for path in folder.glob(EARLIER)}
    by_name = {name: (before, time) for name, before, time in begun.values()}

    def place(name: str) -> tuple[float, int]:
        before, time = by_name[name]
        at, depth = place(before) if before in by_name else (0.0, 0)
        return max(at, time), depth + 1

    return sorted(begun, key=lambda path: (place(begun[path][0]), path))


def _begun(path: Path) -> tuple[str, str, float]:
    """Name of a log, of the one before it, and time of its first line; "" and 0 where it does not say so."""
    first, before, time = first_line(path), "", 0.0
    with suppress(ValueError, KeyError, TypeError, OverflowError):
        line = json.loads(first)
        time, before = float(line["time"]), str(line["facts"]["before"] or "")
    return hashlib.sha256(first).hexdigest(), before, time


def logs_of(folder: Path) -> list[Path]:
    """All logs of a party, the oldest first, the one that is written on last."""
    return [*earlier_logs(folder), folder / LOG]


def every_event(folder: Path, of: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """The lines of some kinds of all logs of a party, in order, whatever key they were signed with."""
    for path in logs_of(folder):
        yield from events(path, of)


def closings(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """(run, round) -> what the log says of how it closed: of a round that was done again, after its run's folder was
    restored from a backup, as it ended last."""
    closed = (line["facts"] for line in lines if line["event"] == "round-closed")
    return {(facts["run"], facts["round"]): facts for facts in closed}


def unnamed(folder: Path) -> Path | None:
    """The log that was put away last, and that no other names as the one before it; None where there is none."""
    begun = {path: _begun(path)[:2] for path in earlier_logs(folder)}
    named = {before for _, before in begun.values()}
    left = [path for path, (log, _) in begun.items() if log not in named and path.stem == f"audit-{log[:8]}"]
    return left[-1] if left else None
