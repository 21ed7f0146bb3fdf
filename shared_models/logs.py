"""Logs of the processes: JSON lines without identifiers, bounded in size, and read back for people.

A line holds `time`, `level`, `from` and `words`; of an error that is not one of ours only its type and the places in
the code are kept, for its text may name a file of the hospital. Whatever begins with a folder of images is replaced.
A process writes to its standard error, which its supervisor appends to logs/NAME.log; a full one becomes NAME.log.1.
"""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared_models.errors import FederationError, StateInvalid

MOST_WORDS = 4000  # characters of one message
MOST_RUN_LOGS = 50  # a process for each run has a log of its own
POLL_S = 0.5
TABLE = r"manifest\.csv"  # in a folder of images
SECRETS = re.compile(r"fl1\.[A-Za-z0-9_.=-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|$)", re.DOTALL)


@dataclass(slots=True)
class JsonLines(logging.Formatter):
    """Each record as one line of JSON.

    Attributes:
        hidden: folders whose names, and whatever follows them in a message, are not written.
    """

    hidden: Sequence[str] = ()

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "from": _origin(record),
            "words": scrubbed(record.getMessage(), self.hidden)[:MOST_WORDS],
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _error(record.exc_info[1], self.hidden)
        return json.dumps(line, ensure_ascii=False)


def _origin(record: logging.LogRecord) -> str:
    """The logger's name; of the module that a process was started with, its own instead of `__main__`."""
    if record.name != "__main__":
        return record.name
    return f"{Path(record.pathname).parent.name}.{record.module}"


def scrubbed(text: str, hidden: Iterable[str]) -> str:
    """`text` without invites and keys, nor what lies in the folders of `hidden`.

    What follows such a folder goes to the end of the line, for a name may hold any sign that could end it; only what is
    said of the folder itself, or of its table, stays.
    """
    for folder in hidden:
        inside = re.escape(folder.rstrip("/"))
        text = re.sub(rf"{inside}((/{TABLE})?(?=: )|.*)", "[data]", text)
    return SECRETS.sub("[secret]", text)


def _error(error: BaseException, hidden: Iterable[str]) -> dict[str, Any]:
    """The type of an error and where it was raised; its text only where it is one of ours, which name nobody."""
    frames = traceback.extract_tb(error.__traceback__)
    told: dict[str, Any] = {"type": type(error).__name__, "at": [f"{Path(f.filename).name}:{f.lineno}" for f in frames]}
    if isinstance(error, FederationError):
        told["words"] = scrubbed(str(error), hidden)[:MOST_WORDS]
    if isinstance(error, OSError) and error.errno is not None:
        told["errno"] = error.errno
    return told


def start(hidden: Sequence[str] = ()) -> None:
    """Sends the logs of this process to its standard error as JSON lines; an error that ends it too."""
    handler = logging.StreamHandler()
    formatter = JsonLines(hidden)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)

    def last(kind: type[BaseException], error: BaseException, _: object) -> None:
        record = logging.LogRecord("process", logging.CRITICAL, "", 0, "ended by an error", None, (kind, error, None))
        print(formatter.format(record), file=sys.stderr, flush=True)

    sys.excepthook = last


# Reading them


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a log.

    Attributes:
        process: the file's name without its ending: node, gateway, run-lung-ct-1.
        time: ISO 8601 in UTC; "" for what a library printed without asking.
    """

    process: str
    time: str
    level: str
    words: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def parsed(process: str, text: str) -> Entry | None:
    """A line as it stands in a file; None for one that says nothing."""
    with suppress(ValueError, TypeError, AttributeError, KeyError):
        line = json.loads(text)
        words = str(line["words"])
        if "error" in line:
            error = line["error"]
            words += f" [{error['type']}{': ' + error['words'] if 'words' in error else ''} at {error['at'][-1:]}]"
        return Entry(process, str(line["time"]), str(line["level"]), words, line) if words else None
    clean = "".join(c for c in text if c.isprintable())
    return Entry(process, "", "", clean, {"words": clean}) if clean else None


def files_of(logs: Path, process: str | None) -> list[Path]:
    """The logs of a folder, or of one process; the older part first.

    Raises:
        StateInvalid: a process that has no log.
    """
    found = sorted(path for path in logs.glob("*.log") if process is None or path.stem == process)
    if process is not None and not found:
        known = ", ".join(sorted(path.stem for path in logs.glob("*.log"))) or "none yet"
        raise StateInvalid(f"{process!r}: has no log in {logs}. There are: {known}.")
    return found


def read(logs: Path, process: str | None = None, last: int = 0) -> list[Entry]:
    """All lines in order of time, or the `last` of them; a line without a time stays behind the one before it."""
    entries = []
    for path in files_of(logs, process):
        when = ""
        for part in (path.with_name(f"{path.name}.1"), path):
            for text in part.read_text(errors="replace").split("\n") if part.exists() else ():
                entry = parsed(path.stem, text)
                if entry is not None:
                    when = entry.time or when
                    entries.append((when, entry))
    ordered = [entry for _, entry in sorted(entries, key=lambda pair: pair[0])]
    return ordered[-last:] if last else ordered


def follow(
    logs: Path, process: str | None, ended: Callable[[], bool], pause: Callable[[float], None] = time.sleep
) -> Iterator[Entry]:
    """Lines as they are written, from now on, until `ended`; a log that was cut, or is new, is read from its start."""
    places = {path: path.stat().st_size for path in logs.glob("*.log")}
    while True:
        stop = ended()
        for path in sorted(logs.glob("*.log")):
            if process is not None and path.stem != process:
                continue
            size, place = path.stat().st_size, places.get(path, 0)
            place = 0 if size < place else place
            with path.open("rb") as file:
                file.seek(place)
                whole, newline, _ = file.read(size - place).rpartition(b"\n")
            places[path] = place + len(whole) + len(newline)
            for text in whole.decode(errors="replace").split("\n"):
                entry = parsed(path.stem, text)
                if entry is not None:
                    yield entry
        if stop:
            return
        pause(POLL_S)


def in_words(entry: Entry) -> str:
    """One line for people."""
    when = entry.time.replace("T", " ")[:19]
    head = f"{when} {entry.level:7} " if entry.time else " " * 28
    return f"{head}{entry.process}: {entry.words}"


def prune(logs: Path, most: int = MOST_RUN_LOGS) -> None:
    """Removes the oldest logs of runs beyond `most`, so that all logs together stay bounded."""
    found = sorted(logs.glob("run-*.log"), key=lambda path: path.stat().st_mtime)
    for path in found[: max(0, len(found) - most)]:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.1").unlink(missing_ok=True)


def show(logs: Path, process: str | None, last: int, on: bool, as_json: bool) -> None:
    """Prints the last lines, and with `on` those that come until Ctrl-C; JSON lines with the process, or words."""

    def put(entry: Entry) -> None:
        print(json.dumps({"process": entry.process, **entry.facts}, ensure_ascii=False) if as_json else in_words(entry),
              flush=True)  # fmt: skip

    told = read(logs, process, last)
    for entry in told:
        put(entry)
    if not told and not as_json:
        print(f"Nothing has been said in {logs} yet.")
    if on:
        for entry in follow(logs, process, lambda: False):
            put(entry)
