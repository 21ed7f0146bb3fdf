"""A site's own audit log as people are told of it: read on from where it was, so that a long log is read once.

It tells; whether the log is whole is for others to say. A log that is another one now is read from its start.
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shared_models.alarms import ALARMS, events_in, told_of
from shared_models.audit_files import earlier_logs

WORK = ("order", "sent", "order-refused")
UPDATES = ("tensors", "masked vector")  # what goes before the reply that tells of it
MOST_SENT = 20
MOST_RUNS = 20
MOST_ALARMS = 1000


@dataclass(slots=True)
class RunHere:
    """What was last heard of a run at this site.

    Attributes:
        study: digest of its study.
        kind: of the last order.
        state: `work`, `sent` or `refused`, with the `code` of a refusal.
        rounds: in how many of its rounds an update has left here.
    """

    run: str
    study: str
    round: int
    kind: str
    state: str
    code: str
    at: float
    rounds: int = 0
    last_sent: int | None = None


@dataclass(slots=True)
class Book:
    """Of the site in `folder`.

    Attributes:
        kinds: what has left, by kind: messages and bytes.
        rounds_done: of all runs, in which an update has left.
        latest: the last lines of what has left, the newest last.
        runs: by name, the one of the last event last.
        work: the order that was taken last and not answered yet.
        refused: orders that were not carried out, in the log of the identity key of now.
    """

    folder: Path
    messages: int = 0
    size_bytes: int = 0
    rounds_done: int = 0
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    latest: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_SENT))
    runs: dict[str, RunHere] = field(default_factory=dict)
    work: dict[str, Any] | None = None
    refused: int = 0
    last_refused: dict[str, Any] | None = None
    alarms: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_ALARMS))
    _earlier: list[str] = field(default_factory=list)
    _read: int = 0  # bytes of whole lines
    _inode: int = 0
    _last: bytes = b""

    def look(self) -> None:
        """Reads what is new."""
        earlier = sorted(path.name for path in self.folder.glob("audit-*.jsonl"))
        try:
            with (self.folder / "audit.jsonl").open("rb") as file:
                if earlier != self._earlier or not self._goes_on(file):
                    self._begin(earlier)
                self._inode = os.fstat(file.fileno()).st_ino
                file.seek(self._read)
                self._take(file.read())
        except FileNotFoundError:
            self._begin(earlier)

    def _goes_on(self, file: BinaryIO) -> bool:
        """Whether the file still has, at its place, the line that was read last."""
        if os.fstat(file.fileno()).st_ino != self._inode:
            return False
        file.seek(self._read - len(self._last))
        return file.read(len(self._last)) == self._last

    def _begin(self, earlier: list[str]) -> None:
        self.messages = self.size_bytes = self.rounds_done = self._read = self._inode = 0
        self._last, self._earlier = b"", earlier
        self.kinds.clear()
        self.latest.clear()
        self.runs.clear()
        for path in earlier_logs(self.folder):
            for line in events_in(path.read_bytes(), WORK):
                self._note(line)
        self.work, self.refused, self.last_refused = None, 0, None
        self.alarms.clear()

    def _take(self, content: bytes) -> None:
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return
        for line in events_in(whole, (*WORK, *ALARMS)):
            self._note(line)
        self._read += len(whole)
        self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]

    def _note(self, line: Mapping[str, Any]) -> None:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # a line that is none is the verifier's to name
            if line["event"] in ALARMS:
                self.alarms.append(line)
                return
            line = self._told_whose(line)
            if line["event"] == "sent":
                self._sent({"time": float(line["time"]), **line["facts"]})
            elif line["event"] == "order-refused":
                self.refused, self.last_refused = self.refused + 1, told_of(line)
            self.work = worked(self.work, line)
            self._run(line)

    def _told_whose(self, line: Mapping[str, Any]) -> Mapping[str, Any]:
        """A bare error code, whose line names no run, ends the order under way: it failed before there was a reply."""
        if line["event"] != "sent" or line["facts"].get("kind") != "code":
            return line
        whose = {key: self.work[key] for key in ("run", "round")} if self.work is not None else {}
        line = {**line, "facts": {**line["facts"], **whose}}
        self.refused, self.last_refused = self.refused + 1, told_of(line)
        return line

    def _sent(self, line: dict[str, Any]) -> None:
        size, kind = int(line["bytes"]), str(line["kind"])
        messages, size_bytes = self.kinds.get(kind, (0, 0))
        self.kinds[kind] = messages + 1, size_bytes + size
        self.messages += 1
        self.size_bytes += size
        self.latest.append({**line, "number": self.messages})

    def _run(self, line: Mapping[str, Any]) -> None:
        facts, event = line["facts"], line["event"]
        if not isinstance(facts.get("run"), str) or not isinstance(facts.get("round"), int):
            return
        name, number = facts["run"], facts["round"]
        run = self.runs.pop(name, None) or RunHere(name, "", 0, "", "", "", 0.0)
        run.study, run.round, run.at = str(facts.get("study") or run.study), number, float(line["time"])
        if event == "order":
            run.state, run.kind, run.code = "work", str(facts["kind"]), ""
        elif event == "order-refused" or facts.get("code"):
            run.state, run.code = "refused", str(facts.get("code") or "")
        elif facts["kind"] in UPDATES:
            new = run.last_sent != number
            run.rounds, run.last_sent = run.rounds + new, number
            self.rounds_done += new
        else:
            run.state = "sent"
        self.runs[name] = run
        while len(self.runs) > MOST_RUNS:
            self.runs.pop(next(iter(self.runs)))


def worked(last: dict[str, Any] | None, line: Mapping[str, Any]) -> dict[str, Any] | None:
    """The order under way after a line of one of the kinds in `WORK`: run, round, kind, since; None after its end."""
    facts = line["facts"]
    about = (facts.get("run"), facts.get("round"))
    if line["event"] == "order":
        return {"run": about[0], "round": about[1], "kind": facts.get("kind"), "since": line["time"]}
    if last is not None and about == (last["run"], last["round"]) and facts.get("kind") not in UPDATES:
        return None
    return last


def newest(book: Book) -> Iterator[RunHere]:
    """The runs, that of the last event first."""
    yield from reversed(book.runs.values())
