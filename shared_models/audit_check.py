"""Whether an audit log is whole, in order and signed, and agrees with the heads that others keep of it.

What a line says beyond that is taken strictly: whoever holds the key of a log can sign any facts.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from shared_models.audit import FIRST, HEAD, LINE, Head
from shared_models.errors import StateInvalid
from shared_models.files import canonical_json
from shared_models.identity import verify
from shared_models.merkle import Tree
from shared_models.parse import STRICT, Count, Sha256, parse, parse_json

NO_HEAD = (
    "is followed by a head (audit.head.json) that is none, as a power cut may leave it: the next line that is written "
    "makes it anew; beside a log that was put away, delete it. Whether the end of the log was cut off meanwhile, only "
    "the evidence of the other side tells (`audit verify --pack`)"
)
LATEST_S = 1e12  # seconds since the epoch that a line can be of, as of a head


@dataclass(frozen=True, slots=True)
class Witness:
    """A `witnessed` line: the head of another party's log, and the key (hexadecimal) that has signed it."""

    __pydantic_config__ = STRICT
    line: Count  # from 1
    peer: Annotated[str, Field(max_length=64)]
    key: Sha256
    log: Sha256
    size: Count
    root: Sha256
    time: Annotated[float, Field(ge=0, le=LATEST_S, allow_inf_nan=False)]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    since: Count = 0

    @property
    def head(self) -> Head:
        return Head(self.log, self.size, self.root, self.time, self.signature)


@dataclass(frozen=True, slots=True)
class Sealed:
    """The log before, as the first line of the next one tells how it ended.

    Attributes:
        log: SHA-256 of its first line, which names its key.
        size, root: of its tree; no root where the next was begun before logs were sealed.
    """

    __pydantic_config__ = STRICT
    log: Sha256
    size: Count = 0
    root: Sha256 | None = None


def sealed(opened: Mapping[str, Any]) -> Sealed | None:
    """The log before the one that begins with these facts; raises StateInvalid where they are of another form."""
    if opened.get("before") is None:
        return None
    names = {"log": "before", "size": "before_size", "root": "before_root"}
    found = {name: opened[key] for name, key in names.items() if key in opened}
    return parse(Sealed, found, "the log's first line", StateInvalid)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in a log.

    Attributes:
        lines: sound lines before the first bad one.
        bad: number of the first bad line (from 1) and what is wrong, or None.
        heads: of other parties' logs.
        refused: what was found wrong with other parties' logs while it was written, in words.
        before: the log that it goes on from, of an earlier key.
    """

    lines: int
    bad: tuple[int, str] | None
    tree: Tree = field(repr=False)
    log: str = ""
    party: str = ""
    key: str = ""
    heads: tuple[Witness, ...] = field(default=(), repr=False)
    refused: tuple[str, ...] = ()
    before: Sealed | None = None


@dataclass(slots=True)
class Verifier:
    """Verifies a log line by line, so that one that grows need not be read anew; takes nothing after a bad line.

    Attributes:
        key: Ed25519 public key of the log's owner (32 bytes); None takes the one of the first line on trust.
        bad, heads, refused, before: as of a Verdict.
    """

    key: bytes | None
    tree: Tree = field(default_factory=Tree, repr=False)
    bad: tuple[int, str] | None = None
    log: str = ""
    party: str = ""
    heads: list[Witness] = field(default_factory=list, repr=False)
    refused: list[str] = field(default_factory=list)
    before: Sealed | None = None
    _prev: str = FIRST
    _last: float = 0.0

    def take(self, text: bytes) -> None:
        """The next line, without its end."""
        if self.bad is not None:
            return
        number, line = self.tree.size + 1, _line(text)
        if line is None:
            self.bad = number, "is no line of a log: it was edited, or its writer died in the middle of it"
            return
        if self.key is None and number == 1:
            self.key = key_in(line["facts"])
        if wrong := _wrong(line, number, self._prev, self._last, self.key or b""):
            self.bad = number, wrong
            return
        try:
            self._note(line, number)
        except StateInvalid:
            self.bad = number, f"is signed, and yet says what no line of its kind ({line['event'][:40]!r}) can say"
            return
        self._prev, self._last = hashlib.sha256(text).hexdigest(), float(line["time"])
        if number == 1:
            self.log, self.party = self._prev, str(line["facts"].get("party", ""))
        self.tree.append(text)

    def _note(self, line: Mapping[str, Any], number: int) -> None:
        """Raises StateInvalid for facts that no line of its kind has."""
        event, facts = line["event"], line["facts"]
        if number == 1:
            self.before = sealed(facts)
        if event == "witnessed":
            found = {name: facts[name] for name in Witness.__slots__ if name in facts}
            self.heads.append(parse(Witness, {**found, "line": number}, f"line {number}", StateInvalid))
        elif event == "witness-refused":
            problem, peer = facts.get("problem"), facts.get("peer")
            if not isinstance(problem, str) or not isinstance(peer, str):
                raise StateInvalid(f"line {number}: names no problem, or nobody.")
            self.refused.append(f"line {number}: {problem} of {peer}")

    def verdict(self, torn: bytes = b"", head: bytes | None = None) -> Verdict:
        """What was found in the lines so far.

        Args:
            torn: what stands after the last line end.
            head: of audit.head.json, the last head that was signed; read before the log was, which goes on growing.
        """
        bad, key = self.bad, self.key or b""
        if bad is None and torn:
            words = "is torn: its writer died in the middle of it. The next entry cuts it off"
            bad = self.tree.size + 1, words
        if bad is None and head is not None:
            try:
                last = parse_json(Head, head, "audit.head.json", StateInvalid)
                bad = _against_head(self.tree, self.log, key, last)
            except StateInvalid:
                bad = self.tree.size, NO_HEAD
        return Verdict(
            self.tree.size, bad, self.tree, self.log, self.party, key.hex(), tuple(self.heads), tuple(self.refused),
            self.before,
        )  # fmt: skip


def verify_log(content: bytes, key: bytes | None, head: bytes | None = None) -> Verdict:
    """Reads a whole log and names the first bad line; arguments as of `Verifier` and its `verdict`."""
    verifier, lines = Verifier(key), content.split(b"\n")
    torn = lines.pop()
    for text in lines:
        verifier.take(text)
    return verifier.verdict(torn, head)


def _line(text: bytes) -> dict[str, Any] | None:
    """A line with the fields that it must have, in the one form that has these bytes; or None."""
    try:
        line = json.loads(text)
        sound = canonical_json(line) == text and set(line) == {"seq", "time", "event", "facts", "prev", "sign"}
        kinds = {"seq": int, "event": str, "prev": str, "time": int | float, "facts": dict}
        sound = sound and all(isinstance(line[name], kind) for name, kind in kinds.items())
        sound = sound and 0 <= line["time"] <= LATEST_S
        return line if sound and len(bytes.fromhex(line["sign"])) == 64 else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _wrong(line: Mapping[str, Any], number: int, prev: str, last: float, key: bytes) -> str | None:
    body = {name: value for name, value in line.items() if name != "sign"}
    if not verify(key, bytes.fromhex(line["sign"]), LINE, canonical_json(body)):
        return "is not signed by the key of this log: it was edited, or written with another key"
    if line["seq"] != number - 1:
        return f"has number {line['seq'] + 1}: lines before it were deleted, added or changed places"
    if line["prev"] != prev:
        return "does not follow from the line before: the log was forked here"
    if line["time"] < last:
        return f"is {last - line['time']:.0f} s earlier than the line before: the clock was set back while it was made"
    return None


def _against_head(tree: Tree, log: str, key: bytes, head: Head) -> tuple[int, str] | None:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(head.time))
    if not verify(key, bytes.fromhex(head.signature), HEAD, head.statement):
        return tree.size, "is followed by a head (audit.head.json) that is not signed by the key of this log"
    if head.log != log:
        return 1, f"begins another log than the head of {when} was signed for"
    if head.size > tree.size:
        return tree.size + 1, f"is missing: a head of {when} was signed over {head.size} lines, the end was cut off"
    if tree.root(head.size).hex() != head.root:
        return 1, f"or one up to {head.size} was written anew: a head of {when} was signed over other lines"
    return None


def compare(mine: Verdict, theirs: Verdict) -> tuple[int, str] | None:
    """The first line of `mine` that contradicts a head of it that it has signed, and the other party has kept."""
    for kept in _heads_of(mine, theirs):
        if _is_signed(kept, mine) and (wrong := _against_head(mine.tree, mine.log, bytes.fromhex(mine.key), kept.head)):
            return wrong
    return None


def made_up(mine: Verdict, theirs: Verdict) -> tuple[int, str] | None:
    """The first line of `mine` that keeps a head of the other party's log which that party never signed."""
    for kept in _heads_of(theirs, mine):
        if not _is_signed(kept, theirs):
            return kept.line, "keeps a head of the other log that the key of that log has not signed: it was made up"
    return None


def as_it_ended(found: Verdict, before: Sealed) -> Verdict:
    """What was found in a log that was put away, held against what the next one says of its end."""
    if found.bad is not None:
        return found
    size, bad = found.tree.size, None
    if found.log != before.log:
        bad = 1, "begins another log than the one that the next log was begun after"
    elif before.root is not None and size < before.size:
        bad = size + 1, f"is missing: it had {before.size} lines when the next log was begun, the end was cut off"
    elif before.root is not None and found.tree.root(before.size).hex() != before.root:
        bad = 1, f"or one up to {before.size} was written anew after the next log was begun"
    elif before.root is not None and size > before.size:
        bad = before.size + 1, "was added after the next log was begun"
    return replace(found, bad=bad)


def _heads_of(one: Verdict, other: Verdict) -> list[Witness]:
    """The heads of a log that the other party keeps."""
    return [kept for kept in other.heads if kept.log == one.log or kept.key == one.key]


def _is_signed(kept: Witness, by: Verdict) -> bool:
    return verify(bytes.fromhex(by.key), bytes.fromhex(kept.signature), HEAD, kept.head.statement)


def key_in(facts: Mapping[str, Any]) -> bytes | None:
    """The Ed25519 public key that the first line of a log names."""
    try:
        key = bytes.fromhex(facts["key"])
    except (KeyError, TypeError, ValueError):
        return None
    return key if len(key) == 32 else None
