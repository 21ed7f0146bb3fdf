"""Logs that can only grow: chained, signed lines, whose tree heads the other side keeps.

A line is canonical JSON of `seq`, `time`, `event`, `facts`, `prev` (SHA-256 of the line before) and `sign` (Ed25519
over the rest). The chain shows edits; the signed head of the tree (RFC 6962), kept by the other side with proofs that
each head extends the one before, shows what the holder of the key cut off or wrote anew.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from shared_models.alarms import events
from shared_models.audit_files import away, first_line, unnamed
from shared_models.errors import StateInvalid
from shared_models.files import append_json, canonical_json, locked, replacing, sync_folder
from shared_models.identity import identity_public_key, sign
from shared_models.merkle import Tree, grew
from shared_models.parse import STRICT, Count, Sha256, plain

LINE, HEAD = "audit-line", "audit-head"  # purposes of signatures
FIRST = "0" * 64  # `prev` of the first line
CUT = "OWN_LOG_CUT"  # another party keeps a head of lines that one does not have
MOST_PROOF = 64  # hashes; 2 * log2 of more lines than a disk holds


class Seen(NamedTuple):
    """The last head that one party keeps of another's log; its root is None where that is not told."""

    log: str | None = None
    size: int = 0
    root: str | None = None


UNSEEN = Seen()


@dataclass(frozen=True, slots=True)
class Head:
    """A signed tree head, and how it follows from an older one that the other side keeps.

    Attributes:
        log: SHA-256 of the log's first line.
        time: seconds since the epoch.
        certificate: of the signer where the other side knows no key but the authority's (PEM).
        since, proof: consistency proof from the head of that size (RFC 6962 section 2.1.2); 0 proves nothing.
        seen_log, seen_size, seen_root: the last head that the sender keeps of the receiver's log.
    """

    __pydantic_config__ = STRICT
    log: Sha256
    size: Count
    root: Sha256
    time: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    certificate: Annotated[str, Field(max_length=4000)] = ""
    since: Count = 0
    proof: Annotated[tuple[Sha256, ...], Field(max_length=MOST_PROOF, fail_fast=True)] = ()
    seen_log: Sha256 | None = None
    seen_size: Count = 0
    seen_root: Sha256 | None = None

    @property
    def seen(self) -> Seen:
        return Seen(self.seen_log, self.seen_size, self.seen_root)

    @property
    def statement(self) -> bytes:
        return canonical_json({"log": self.log, "size": self.size, "root": self.root, "time": self.time})


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of the heads of another party's log: the newest, and the root of each by its size."""

    log: str
    key: str
    size: int
    time: float
    roots: Mapping[int, str]


@dataclass(slots=True)
class AuditLog:
    """The log of one party; any process of its owner may add to it.

    Attributes:
        party: who writes, in words: `site north`.
        key: its Ed25519 key, PEM.
        certificate: that vouches for the key, or nothing.
        renewed: key and certificate as they stand now, for a process that lives on while they are renewed.
    """

    path: Path
    party: str
    key: bytes = field(repr=False)
    certificate: str = ""
    clock: Callable[[], float] = time.time
    renewed: Callable[[], tuple[bytes, str]] | None = field(default=None, repr=False)
    tree: Tree = field(default_factory=Tree, repr=False)
    offset: int = 0
    last_size: int = 0  # bytes of the last line, without its end
    prev: str = FIRST
    last_time: float = 0.0
    log: str = ""
    kept: dict[str, Kept] = field(default_factory=dict, repr=False)
    complained: set[tuple[str, str]] = field(default_factory=set, repr=False)  # peers and problems

    def add(self, event: str, **facts: Any) -> int:
        """Writes one line, on disk before this returns; its number.

        A clock that was set back does not show as an earlier time: the line then says by how much.
        """
        with self._turn():
            return self._write(event, facts)

    def head(self, seen: Seen = UNSEEN, about: str | None = None) -> Head:
        """The signed head as it stands, for a party who keeps the one that is `seen`.

        Args:
            about: the party whose last head is named in it as seen.
        """
        with self._turn():
            since = seen.size if seen.log == self.log and seen.size <= self.tree.size else 0
            self._look_back(seen, about or "?")
            made = self._head()
            theirs = self.kept.get(about or "")
            return replace(
                made,
                since=since,
                proof=tuple(part.hex() for part in self.tree.consistency(since)),
                seen_log=theirs.log if theirs else None,
                seen_size=theirs.size if theirs else 0,
                seen_root=theirs.roots[theirs.size] if theirs else None,
            )

    def was_cut(self, seen: Seen, about: str) -> bool:
        """Whether another party keeps a head of lines that this log does not have, now or ever since it began."""
        with self._turn():
            self._look_back(seen, about)
            return (about, CUT) in self.complained

    def witness(self, peer: str, head: Head, key: str) -> str | None:
        """Keeps the head of another party's log, whose signature by `key` was verified; or says what is wrong with it.

        `LOG_CUT`, `LOG_FORKED` and `LOG_REPLACED` are written down with the head as evidence. A head that is older
        than the one that is kept, or that proves nothing about it, is passed over: messages overtake each other.
        """
        with self._turn():
            last = self.kept.get(peer)
            facts = {"peer": peer, "key": key, **_lasting(replace(head, certificate=""))}
            wrong = None if last is None else _doubt(last, head, key)
            if wrong == "":
                return None
            if wrong is not None:
                self._complain(peer, wrong, facts)
                return wrong
            self._write("witnessed", facts)
            return None

    def _turn(self) -> "_Turn":
        return _Turn(self)

    def _write(self, event: str, facts: Mapping[str, Any]) -> int:
        line = self._line(event, facts)
        append_json(self.path, line)
        self._take(canonical_json(line), line)
        self._vouch()
        return int(line["seq"])

    def _line(self, event: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        now = round(self.clock(), 3)
        body: dict[str, Any] = {"seq": self.tree.size, "event": event, "facts": dict(facts), "prev": self.prev}
        body["time"] = max(now, self.last_time)
        if now < self.last_time:
            body["facts"]["clock_back_s"] = round(self.last_time - now, 3)
        return {**body, "sign": sign(self.key, LINE, canonical_json(body)).hex()}

    def _vouch(self) -> None:
        with replacing(self.path.with_suffix(".head.json"), synced=False) as file:
            file.write(canonical_json(_lasting(self._head())))

    def _take(self, content: bytes, line: Mapping[str, Any]) -> None:
        if not self.tree.size:
            self.log = hashlib.sha256(content).hexdigest()
        self.tree.append(content)
        self.offset, self.last_size = self.offset + len(content) + 1, len(content)
        self.prev, self.last_time = hashlib.sha256(content).hexdigest(), float(line["time"])
        facts = line["facts"]
        if line["event"] == "witnessed":
            before = self.kept.get(facts["peer"])
            roots = dict(before.roots) if before and before.log == facts["log"] else {}
            roots[facts["size"]] = facts["root"]
            self.kept[facts["peer"]] = Kept(facts["log"], facts["key"], facts["size"], facts["time"], roots)
        elif line["event"] == "witness-refused":
            self.complained.add((facts["peer"], facts["problem"]))

    def _look_back(self, seen: Seen, about: str) -> None:
        """Writes it down if the lines that another party keeps the head of are not, or no longer, those of this log.

        A log that was put back from a backup and written on may be as long as the lost one: only the root tells.
        """
        if seen.log != self.log:
            return
        if seen.size > self.tree.size or seen.root not in (None, self.tree.root(seen.size).hex()):
            self._complain(about, CUT, {"keeps": seen.size, "root": seen.root, "has": self.tree.size})

    def _complain(self, peer: str, problem: str, head: Mapping[str, Any]) -> None:
        """Once for the same problem of the same party: an order comes every few seconds."""
        if (peer, problem) not in self.complained:
            self._write("witness-refused", {"peer": peer, "problem": problem, "head": dict(head)})

    def _head(self) -> Head:
        made = Head(self.log, self.tree.size, self.tree.root().hex(), round(self.clock(), 3), "", self.certificate)
        return replace(made, signature=sign(self.key, HEAD, made.statement).hex())

    def _catch_up(self) -> None:
        """Reads what other processes have added; a line that a killed writer left torn is cut off by the next.

        A log that is no longer the one that was read is read anew, so that no line is ever written that does not
        follow from the one before it; where its key was renewed, on with the new one.
        """
        held = self.tree.size > 0
        if held and self._goes_on():
            return self._read_on()
        if not self.path.exists() and held and not (self._renew() and away(self.path, self.log).exists()):
            raise StateInvalid(f"{self.path}: has gone while in use. Restore it from a backup.")
        if self._is_of_another_key():
            self._renew()
        if held and self._is_of_another_key():
            raise StateInvalid(
                f"{self.path}: another log was begun, with another key, while this process had the one before open. "
                "Start this process again."
            )
        self._forget()
        if self.path.exists() and not self._is_of_another_key():
            self._read_on()
        if not self.tree.size:
            self._begin()

    def _begin(self) -> None:
        """A new log, whole or not at all; it names the one before it, and keeps the heads that that one kept.

        One that a killed process had put away, and nothing names yet, is the one before it.
        """
        if self._is_of_another_key():
            _put_away(self.path)
        before, kept = _ended(self.path.parent)
        facts = {"party": self.party, "key": identity_public_key(self.key).hex(), "before": None, **before}
        try:
            with replacing(self.path) as file:
                for event, what in (("opened", facts), *(("witnessed", head) for head in kept)):
                    line = self._line(event, what)
                    file.write(canonical_json(line) + b"\n")
                    self._take(canonical_json(line), line)
        except BaseException:
            self._forget()
            raise
        self._vouch()

    def _read_on(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        for line in content.split(b"\n")[:-1]:
            number = self.tree.size + 1
            try:
                self._take(line, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise StateInvalid(
                    f"{self.path}: line {number} is damaged. `audit verify` names what is wrong; keep the "
                    "file as evidence, and move it away to begin a new log."
                ) from error

    def _goes_on(self) -> bool:
        """Whether the file still has, at its place, the line that was read last; it vouches for all before it."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.offset - self.last_size - 1)
            last = file.read(self.last_size + 1)
        return last.endswith(b"\n") and hashlib.sha256(last[:-1]).hexdigest() == self.prev

    def _forget(self) -> None:
        self.tree, self.offset, self.last_size = Tree(), 0, 0
        self.prev, self.last_time, self.log = FIRST, 0.0, ""
        self.kept.clear()
        self.complained.clear()

    def _renew(self) -> bool:
        """Whether the key is another one by now; it is taken up."""
        if self.renewed is None:
            return False
        before = self.key
        self.key, self.certificate = self.renewed()
        return self.key != before

    def _is_of_another_key(self) -> bool:
        """A log that is damaged, or torn before its first line was whole, counts as ours: it is read on."""
        if not self.path.exists():
            return False
        try:
            return str(json.loads(first_line(self.path))["facts"]["key"]) != identity_public_key(self.key).hex()
        except (ValueError, KeyError, TypeError):
            return False


@dataclass(slots=True)
class _Turn:
    """The right to write: one process at a time, with all lines of the others read."""

    log: AuditLog
    lock: Any = None

    def __enter__(self) -> None:
        self.lock = locked(self.log.path.with_suffix(".lock"))
        self.lock.__enter__()
        try:
            self.log._catch_up()
        except BaseException:
            self.lock.__exit__(None, None, None)
            raise

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(None, None, None)


def _put_away(path: Path) -> None:
    """Moves a log of an earlier key aside, its head first: as long as the log is there, this is done again."""
    log = hashlib.sha256(first_line(path)).hexdigest()
    for each in (path.with_suffix(".head.json"), path):
        if each.exists():
            each.rename(away(each, log))
    sync_folder(path.parent)


def _ended(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a new log says of the one that was put away before it, and the last head of each party that that one keeps.

    It seals it: whoever took the key that was renewed can add nothing to the log before, nor write it anew.
    """
    path = unnamed(folder)
    if path is None:
        return {}, []
    tree, lines = Tree(), path.read_bytes().split(b"\n")[:-1]
    for line in lines:
        tree.append(line)
    log = hashlib.sha256(first_line(path)).hexdigest()
    kept: dict[str, dict[str, Any]] = {}
    for told in events(path, ("witnessed",)):
        with suppress(KeyError, TypeError, AttributeError):
            head = {name: value for name, value in told["facts"].items() if name != "clock_back_s"}
            kept[head["peer"]] = {**head, "since": 0, "proof": []}
    return {"before": log, "before_size": tree.size, "before_root": tree.root().hex()}, list(kept.values())


def _lasting(head: Head) -> dict[str, Any]:
    """A head as it is kept on disk: without what it says of the receiver's log, which is told for the moment."""
    return {name: value for name, value in plain(head).items() if not name.startswith("seen_")}


def _doubt(last: Kept, head: Head, key: str) -> str | None:
    """What is wrong with `head` after the one that is kept; "" where it says nothing new, None where it follows."""
    if head.log != last.log:
        return "LOG_REPLACED" if key == last.key else None  # a renewed key begins a new log
    if head.size == last.size:
        return "LOG_FORKED" if head.root != last.roots[last.size] else ""
    if head.size < last.size:
        known = last.roots.get(head.size)
        if known is not None and known != head.root:
            return "LOG_FORKED"
        return "LOG_CUT" if head.time > last.time and known is None else ""
    if head.since not in last.roots:
        return ""
    proof = [bytes.fromhex(part) for part in head.proof]
    root = bytes.fromhex(last.roots[head.since])
    return None if grew(head.since, root, head.size, bytes.fromhex(head.root), proof) else "LOG_FORKED"
