"""What an audit log says that a person should hear unasked: the other log contradicted, orders refused."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_models.dates import date_text

ALARMS = ("witness-refused", "witness-unsigned", "witness-missing")
REFUSAL = ("code", "run", "round")  # what is told of an order that was not carried out
PROBLEMS = {
    "LOG_CUT": "its end was cut off",
    "LOG_FORKED": "lines that were vouched for have been written anew",
    "LOG_REPLACED": "another log was begun in its place",
    "OWN_LOG_CUT": "has lines of ours that we do not have: ours was cut, or put back from a backup",
    "witness-unsigned": "what vouches for it is not signed by its key",
    "witness-missing": "nothing vouches for it any more",
}


def events(path: Path, of: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """The lines of an audit log of some kinds, in order; a line that is none is the verifier's to name."""
    return events_in(path.read_bytes() if path.exists() else b"", of)


def events_in(content: bytes, of: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """As `events`, of the whole lines of a piece of a log."""
    marks = [f'"event":"{name}"'.encode() for name in of]  # as canonical JSON has it
    for text in content.split(b"\n")[:-1]:
        if any(mark in text for mark in marks):  # a log has many lines, and few of them are asked for
            with suppress(ValueError, AttributeError):
                line = json.loads(text)
                if line.get("event") in of:
                    yield line


def alarm_words(path: Path) -> list[str]:
    """A sentence for each problem that was noticed with the log of another party, once for each kind and party."""
    return alarms_in(events(path, ALARMS))


def alarms_in(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    for line in lines:
        problem = str(line["facts"].get("problem", line["event"]))
        last[str(line["facts"]["peer"]), problem] = line
    return [
        f"The log of {peer}: {PROBLEMS.get(problem, problem)} (noticed on {date_text(line['time'])})."
        for (peer, problem), line in sorted(last.items())
    ]


def last_turned_down(path: Path) -> dict[str, Any] | None:
    """The last order that a site did not carry out, or reply that was not counted, at the coordinator; None before."""
    found = None
    for line in events(path, ("reply-refused", "reply-rejected", "reply-failed", "answer-forged")):
        found = line
    return None if found is None else told_of(found, ("site", "run", "round", "why"))


def told_of(line: Mapping[str, Any], facts: Collection[str] = REFUSAL) -> dict[str, Any]:
    """When a line was written, and some of its facts; None for one that it does not have."""
    return {"time": line["time"], **{key: line["facts"].get(key) for key in facts}}
