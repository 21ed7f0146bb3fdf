"""The audit log as the dashboard tells it: verified as it grows, its latest events, and each site's last word."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shared_models.audit_check import Verifier
from shared_models.audit_files import LAST, LOG
from shared_models.errors import StateInvalid
from shared_models.parse import parse_json

MOST_EVENTS = 40
LOOK_S = 0.5  # of verifying, at one look: a line takes a third of a millisecond, a log may have many thousands
BLOCK = 1 << 20
ROUTINE = (b'{"event":"order"', b'{"event":"witnessed"')  # one for each order and reply; the key sorts first
KINDS = {  # event -> what happened, and how it is marked
    "opened": ("log begun", ""),
    "founded": ("federation founded", ""),
    "invited": ("site invited", ""),
    "enrolled": ("site joined", "good"),
    "renewed": ("certificate renewed", ""),
    "revoked": ("site revoked", "bad"),
    "withdrawn": ("site has left", "look"),
    "run-queued": ("run queued", ""),
    "run-opened": ("run opened", ""),
    "run-paused": ("pause asked for", "look"),
    "run-resumed": ("run resumed", ""),
    "run-stopped": ("run stopped", "look"),
    "run-finished": ("run finished", "good"),
    "run-retrained": ("run trained again", ""),
    "plan-made": ("plan made", ""),
    "round-closed": ("round closed", "good"),
    "sum-aborted": ("secure sum given up", "look"),
    "reply-counted": ("reply counted", "good"),
    "reply-pending": ("not now", "look"),
    "reply-lost": ("node went away", "look"),
    "reply-refused": ("order refused", "bad"),
    "reply-rejected": ("reply not accepted", "bad"),
    "reply-failed": ("order failed", "bad"),
    "reply-duplicate": ("answered twice", "look"),
    "answer-forged": ("not signed for this order", "bad"),
    "release-made": ("release made", "good"),
    "release-approved": ("release approved", "good"),
    "release-retired": ("release retired", "look"),
    "witness-refused": ("log contradicted", "bad"),
    "witness-unsigned": ("log head not signed", "bad"),
    "witness-missing": ("log without a witness", "bad"),
    "refused": ("turned away at the gateway", "look"),
    "authority": ("authority's list signed", ""),
    "backed-up": ("backup made", ""),
    "restored": ("restored from a backup", "look"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """A line of the log for people; `at` is since the epoch, `mark` good, look, bad or nothing."""

    number: int
    at: float
    what: str
    mark: str
    site: str
    run: str
    round: int | None
    words: str


@dataclass(frozen=True, slots=True)
class Chain:
    """How far the log is verified.

    Attributes:
        lines: sound lines before the first bad one.
        known: lines that there are; above `lines` while more are being verified.
        bad: the first bad line (from 1) and what is wrong, or None.
    """

    lines: int
    known: int
    bad: tuple[int, str] | None


@dataclass(slots=True)
class Book:
    """Reads audit.jsonl of a federation on from where it was; from the start where what was read has been changed.

    Attributes:
        key: gives the Ed25519 public key of the coordinator (32 bytes); a renewed key begins a new log.
        latest: the newest last.
        last_words: site -> what was last heard of its work.
    """

    folder: Path
    key: Callable[[], bytes]
    chain: Chain = Chain(0, 0, None)
    latest: deque[Event] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    last_words: dict[str, Event] = field(default_factory=dict)
    _verifier: Verifier = field(init=False)
    _stamp: tuple[int, ...] = ()
    _read: int = 0  # bytes of whole lines that were told
    _known: int = 0
    _verified: int = 0
    _digest: Any = None  # of what was verified
    _again: bool = False

    def __post_init__(self) -> None:
        self._begin()

    def look(self, most_s: float = LOOK_S) -> None:
        """Reads what is new, and verifies for at most `most_s`."""
        head = self._head()  # before the log, which goes on growing
        try:
            with (self.folder / LOG).open("rb") as file:
                facts = os.fstat(file.fileno())
                stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
                if stamp != self._stamp and not self._is_as_it_was(file):
                    self._begin()
                self._stamp = stamp
                self._tell(file)
                self._verify(file, time.monotonic() + most_s)
        except FileNotFoundError:
            gone = self._known or self._again
            self._begin()
            self._again = bool(gone)
            self.chain = Chain(0, 0, (1, "and all others are missing: the log is gone") if gone else None)
            return
        whole = self._verified >= self._read
        bad = self._verifier.verdict(head=head).bad if whole else self._verifier.bad
        self.chain = Chain(self._verifier.tree.size, self._known, bad)

    def _begin(self) -> None:
        self._verifier, self._digest = Verifier(self.key()), hashlib.sha256()
        self._read = self._known = self._verified = 0
        self._stamp, self._again = (), False
        self.latest.clear()
        self.last_words.clear()

    def _head(self) -> bytes | None:
        with suppress(FileNotFoundError):
            return (self.folder / LAST).read_bytes()
        return None

    def _is_as_it_was(self, file: BinaryIO) -> bool:
        """Whether the bytes that were verified are still there."""
        digest, left = hashlib.sha256(), self._verified
        while left and (block := file.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
        return left == 0 and bool(digest.digest() == self._digest.digest())

    def _tell(self, file: BinaryIO) -> None:
        """Every whole line, sound or not: what is wrong with it is the chain's to say."""
        file.seek(self._read)
        rest = b""
        while block := file.read(BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for text in lines:
                self._known += 1
                self._read += len(text) + 1
                self._note(text)

    def _note(self, text: bytes) -> None:
        if text.startswith(ROUTINE):
            return
        with suppress(StateInvalid, KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError):
            event = told(parse_json(dict[str, Any], text, LOG, StateInvalid), self._known)
            self.latest.append(event)
            if event.site and event.what != KINDS["refused"][0]:  # who shows a site's old certificate is not that site
                self.last_words[event.site] = event

    def _verify(self, file: BinaryIO, until: float) -> None:
        file.seek(self._verified)
        while self._verified < self._read and self._verifier.bad is None and time.monotonic() < until:
            text = file.readline()
            self._digest.update(text)
            self._verified += len(text)
            self._verifier.take(text.removesuffix(b"\n"))
        self._verifier.heads.clear()  # one for each reply ever: nobody compares them here


def told(line: Mapping[str, Any], number: int) -> Event:
    """An event in words; whatever a line holds becomes text.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError: it is no event, or none of any day.
    """
    event, facts = str(line["event"]), line["facts"]
    what, mark = KINDS.get(event, (event.replace("-", " "), ""))
    said = facts.get("why") or facts.get("reason") or facts.get("words") or facts.get("problem") or ""
    extra = []
    if counted := facts.get("counted"):
        extra.append(f"{len(counted)} counted")
    if code := facts.get("code"):
        times = facts.get("times", 1)
        extra.append(f"{code}, {times} times" if times != 1 else str(code))
    if facts.get("release") and isinstance(facts["release"], str):
        extra.append(facts["release"])
    if facts.get("by"):
        extra.append(f"by {facts['by']}")
    extra.append(str(said))
    number_of_round = facts.get("round")
    at = float(line["time"])
    time.gmtime(at)  # a page that cannot write a moment of it would show nothing at all
    return Event(
        number,
        at,
        what,
        mark,
        str(facts.get("site") or facts.get("peer") or ""),
        str(facts.get("run") or ""),
        number_of_round if isinstance(number_of_round, int) else None,
        ", ".join(part for part in extra if part)[:300],
    )
