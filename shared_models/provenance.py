"""What a release's evidence proves: that the coordinator's audit log holds what the manifest says of its making.

    evidence/audit.json        lines of the log about the run, each with its place in the tree, and the signed tree
                               head; likewise of the logs of keys before, where the run was begun under one
    evidence/answers.json      what each hospital has signed of the updates that were counted
    evidence/roster.json       the signed roster as the release was made
    evidence/rosters.json      rosters before it, each named by the next, back to those under whose keys was signed
    evidence/study.json        the study as the hospitals approved it
    evidence/plan.json         the plan that its sites' counts gave, where the study asks for one
    evidence/environment.json  every installed package with its version
    evidence/cards/SITE.json   data cards that were handed in

A hospital that keeps heads of the coordinator's log (`fedclient audit verify`) can tell whether it is the same log, and
by the newest roster that it keeps, whether it is the same history of keys. A roster itself is the coordinator's word.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from shared_models.answers import SignedAnswer, envelope_of
from shared_models.audit import HEAD, LINE
from shared_models.audit_check import Sealed, key_in, sealed
from shared_models.audit_files import closings
from shared_models.errors import FederationError, ReleaseInvalid, StateInvalid
from shared_models.files import canonical_json
from shared_models.identity import verify, vouched
from shared_models.merkle import holds
from shared_models.parse import STRICT, Count, Sha256, parse_json
from shared_models.plan import Plan
from shared_models.planned import planned
from shared_models.release import MOST_JSON, SIGNATURE, STUDY, WEIGHTS, Release
from shared_models.release_facts import Signature64, Signed
from shared_models.roster import Roster, SignedRoster, checked, read_signed
from shared_models.study import canonical, from_json
from shared_models.study import sha256 as study_sha256

ANSWERS, ROSTERS = "evidence/answers.json", "evidence/rosters.json"
AUDIT, ROSTER, APPROVED = "evidence/audit.json", "evidence/roster.json", "evidence/study.json"
PLAN, ENVIRONMENT, CARDS = "evidence/plan.json", "evidence/environment.json", "evidence/cards"
EVENTS = ("run-queued", "run-retrained", "run-opened", "plan-made", "round-closed", "run-finished")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One line of a log, and the way from it to the root (hexadecimal)."""

    __pydantic_config__ = STRICT
    index: Count
    line: Annotated[str, Field(max_length=1 << 20)]
    path: Annotated[tuple[Sha256, ...], Field(max_length=64)]


@dataclass(frozen=True, slots=True)
class Extract:
    """evidence/audit.json: the head of a log, signed by the coordinator, and some of its lines.

    Attributes:
        earlier: lines of the logs of keys before, the newest first, as far back as the runs of the release go. The
            first line of each log is among them: it names its key, and the log before with its size and root.
    """

    __pydantic_config__ = STRICT
    log: Sha256
    size: Count
    root: Sha256
    time: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
    signature: Signature64
    leaves: Annotated[tuple[Leaf, ...], Field(max_length=100_000)]
    earlier: Annotated[tuple[tuple[Leaf, ...], ...], Field(max_length=1000)] = ()

    @property
    def statement(self) -> bytes:
        return canonical_json({"log": self.log, "size": self.size, "root": self.root, "time": self.time})


@dataclass(frozen=True, slots=True)
class Answers:
    """evidence/answers.json."""

    __pydantic_config__ = STRICT
    answers: Annotated[tuple[SignedAnswer, ...], Field(max_length=100_000)]


@dataclass(frozen=True, slots=True)
class Earlier:
    """evidence/rosters.json: the newest first."""

    __pydantic_config__ = STRICT
    rosters: Annotated[tuple[Roster, ...], Field(max_length=100_000)]


def wanted(line: Mapping[str, Any], runs: Mapping[str, int | None]) -> bool:
    """Whether a line of the log belongs into the evidence of a release of these runs (run -> last round taken)."""
    facts, event = line["facts"], line["event"]
    run = facts.get("run")
    if run not in runs or event not in EVENTS:
        return False
    most = runs[run]
    return most is None or (event != "run-finished" and int(facts.get("round", 0)) <= most)


def check_provenance(release: Release, authorities: tuple[bytes, ...]) -> list[str]:
    """What the evidence of an opened release shows, a sentence for each thing.

    Raises:
        ReleaseInvalid: naming the file that contradicts the manifest.
    """
    origin, shown = release.manifest.origin, list[str]()
    shown += _check_study(release)
    if not release.study.train.scaffold and release.manifest.files[WEIGHTS].sha256 != origin.weights_sha256:
        raise ReleaseInvalid(f"{WEIGHTS}: is not what round {origin.round} of {origin.run} ended with.", WEIGHTS)
    _check_digest(release, ENVIRONMENT, origin.environment_sha256)
    for site, digest in origin.data_cards.items():
        _check_digest(release, f"{CARDS}/{site}.json", digest)
    if origin.data_cards:
        shown.append(f"data cards of {len(origin.data_cards)} sites are those that the manifest names")
    if origin.kind == "simulation":
        return [*shown, "it was made in a simulation: no log, no roster and no hospital stands behind it"]
    certificate, authority = _signer(release, authorities)
    shown.append(_check_roster(release, authority))
    try:
        return [*shown, *_check_audit(release, vouched(authority, certificate) or b"")]
    except (KeyError, TypeError, AttributeError) as error:  # signed, and yet not what our log writes
        raise ReleaseInvalid(f"{AUDIT}: a line of the log lacks {error}. Update the package.", AUDIT) from None


def against_kept(release: Release, heads: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the release's log is to a site that keeps heads of its coordinator's (`witnessed` lines).

    Raises:
        ReleaseInvalid: two logs are told, of the same coordinator.
    """
    if AUDIT not in release.manifest.files:
        return []
    extract = parse_json(Extract, _bytes(release, AUDIT), AUDIT, ReleaseInvalid)
    ends = {before.log: before for before in _before(extract)}
    known = {extract.log: (extract.size, extract.root), **{log: (end.size, end.root) for log, end in ends.items()}}
    same = [head for head in heads if head["log"] in known]
    for head in same:
        size, root = known[head["log"]]
        if (head["size"] == size and head["root"] != root) or (head["size"] > size and head["log"] in ends):
            raise ReleaseInvalid(
                f"{AUDIT}: the coordinator's log had another root over {head['size']} lines when this site saw it: two "
                "histories are told. Ask the coordinator by telephone.",
                AUDIT,
            )
    return [f"the log is the one of which this site keeps {len(same)} heads"] if same else []


def against_roster(release: Release, authorities: tuple[bytes, ...], seen: SignedRoster | None) -> list[str]:
    """What the release's rosters are to a site that keeps the newest that it has seen.

    Raises:
        ReleaseInvalid: another of the same epoch, of the same coordinator.
    """
    if seen is None or ROSTER not in release.manifest.files:
        return []
    try:
        known = checked(seen, _signer(release, authorities)[1])
    except StateInvalid:  # of another federation
        return []
    for roster in _rosters(release):
        if (roster.federation, roster.epoch) == (known.federation, known.epoch):
            if roster.sha256 != known.sha256:
                raise ReleaseInvalid(
                    f"{ROSTER}: epoch {known.epoch} of the coordinator's roster was another when this site saw it: two "
                    "histories are told. Ask the coordinator by telephone.",
                    ROSTER,
                )
            return [f"the roster of epoch {known.epoch} is the one that this site has seen"]
    return []


def untied(release: Release) -> list[str]:
    """What to doubt of the hospitals' signatures, a sentence: keys that no roster of an opened release has for them."""
    if ANSWERS not in release.manifest.files:
        return []
    keys = _keys(release)
    answers = parse_json(Answers, _bytes(release, ANSWERS), ANSWERS, ReleaseInvalid).answers
    strange = [answer.site for answer in answers if (answer.site, answer.key) not in keys]
    if not strange:
        return []
    return [
        f"{len(strange)} of {len(answers)} signatures of hospitals ({', '.join(sorted(set(strange)))}) are under keys "
        f"that no roster in the release has for them. Whoever made the release can have made these keys too: such "
        f"signatures prove nothing about who signed. Ask the coordinator to release the run again: `fedserver release` "
        f"of this version adds the rosters of its time."
    ]


def _keys(release: Release) -> set[tuple[str, str]]:
    """Every site with each identity key that a roster of the release has for it."""
    return {known for roster in _rosters(release) for known in roster.sites.items()}


def _rosters(release: Release) -> list[Roster]:
    """The roster of a release and those before it that it carries, each the one that the next names: so the signature
    of the newest holds for all."""
    try:
        found = [read_signed(_bytes(release, ROSTER), ROSTER).roster]
    except StateInvalid as error:
        raise ReleaseInvalid(f"{ROSTER}: {error}", ROSTER) from None
    if ROSTERS in release.manifest.files:
        for before in parse_json(Earlier, _bytes(release, ROSTERS), ROSTERS, ReleaseInvalid).rosters:
            if (before.epoch, before.sha256) != (found[-1].epoch - 1, found[-1].previous_sha256):
                raise ReleaseInvalid(f"{ROSTERS}: epoch {before.epoch} is not what the next one names.", ROSTERS)
            found.append(before)
    return found


def _signer(release: Release, authorities: tuple[bytes, ...]) -> tuple[bytes, bytes]:
    """The certificate of who signed the release, and that of the authority that vouches for it."""
    signed = parse_json(Signed, _bytes(release, SIGNATURE), SIGNATURE, ReleaseInvalid)
    certificate = signed.signer.encode()
    by = [ca for ca in authorities if vouched(ca, certificate) is not None]
    if not by:
        raise ReleaseInvalid(f"{SIGNATURE}: nobody who is trusted here vouches for it.", SIGNATURE)
    return certificate, by[0]


def _check_study(release: Release) -> list[str]:
    """study.json follows from what the hospitals approved, and from the plan where there is one."""
    origin = release.manifest.origin
    _check_digest(release, APPROVED, origin.study_sha256)
    if origin.plan_sha256 is not None:
        _check_digest(release, PLAN, origin.plan_sha256)
    try:
        approved = from_json(_bytes(release, APPROVED), APPROVED)
        if origin.plan_sha256 is not None:
            approved = planned(approved, parse_json(Plan, _bytes(release, PLAN), PLAN, ReleaseInvalid))
    except ReleaseInvalid:
        raise
    except FederationError as error:
        raise ReleaseInvalid(f"{APPROVED}: {error}", APPROVED) from None
    if canonical(approved) != canonical(release.study):
        raise ReleaseInvalid(f"{STUDY}: does not follow from the study that the hospitals approved.", STUDY)
    plan = " and the plan of its sites' counts" if origin.plan_sha256 else ""
    done = "run" if origin.kind == "simulation" else "approved"
    return [f"the study is the one that was {done} ({study_sha256(approved)[:12]}){plan}"]


def _check_roster(release: Release, authority: bytes) -> str:
    origin = release.manifest.origin
    try:
        roster = checked(read_signed(_bytes(release, ROSTER), ROSTER), authority)
    except ReleaseInvalid:
        raise
    except FederationError as error:
        raise ReleaseInvalid(f"{ROSTER}: {error}", ROSTER) from None
    if (roster.epoch, roster.sha256) != (origin.roster_epoch, origin.roster_sha256):
        raise ReleaseInvalid(f"{ROSTER}: is another epoch than the manifest names.", ROSTER)
    left = sorted(origin.sites.keys() - roster.sites.keys())
    gone = f"; no longer in it: {', '.join(left)}" if left else ""
    return f"the roster of epoch {roster.epoch} is signed and has {len(roster.sites)} sites{gone}"


def _check_audit(release: Release, key: bytes) -> list[str]:
    """Every line is signed and in the tree of the signed head, and none contradicts the manifest."""
    origin = release.manifest.origin
    extract = parse_json(Extract, _bytes(release, AUDIT), AUDIT, ReleaseInvalid)
    if not verify(key, bytes.fromhex(extract.signature), HEAD, extract.statement):
        raise ReleaseInvalid(f"{AUDIT}: its head is not signed by who signed the release.", AUDIT)
    lines = _lines(extract, key)
    own = [line for line in lines if line["facts"]["run"] == origin.run]
    opened = [line["facts"]["study"] for line in lines if line["event"] == "run-opened"]
    plans = [line["facts"]["plan"] for line in own if line["event"] == "plan-made"]
    rounds, closed = closings(lines), sum(line["event"] == "round-closed" for line in lines)
    ended = [line["facts"]["weights"] for line in own if line["event"] == "run-finished"]
    if set(opened) - {origin.study_sha256} or not opened:
        raise ReleaseInvalid(f"{AUDIT}: the log knows the run by another study than the manifest.", AUDIT)
    if plans and plans[-1] != origin.plan_sha256:
        raise ReleaseInvalid(f"{AUDIT}: the log knows another plan than the manifest.", AUDIT)
    if (origin.run, origin.round) in rounds:
        last = rounds[origin.run, origin.round]["weights"]
    else:
        last = ended[-1] if ended else None
    if last != origin.weights_sha256:
        raise ReleaseInvalid(f"{AUDIT}: the log knows other weights of round {origin.round}.", AUDIT)
    counted: Counter[str] = Counter()
    for facts in rounds.values():
        counted.update(facts["counted"])
        counted.update(site for site, _, late in map(_labelled, facts.get("signed", {})) if late)
    if more := sorted(site for site, rounds in counted.items() if rounds > origin.sites.get(site, 0)):
        raise ReleaseInvalid(f"{AUDIT}: the log counts {more[0]!r} more often than the manifest does.", AUDIT)
    signed = _check_answers(release, rounds.values())
    again = f" (in {closed} lines, for some were done again)" if closed > len(rounds) else ""
    logs = f"; they go back to {len(extract.earlier)} logs of keys before, each sealed by the next"
    return [
        f"{len(lines)} lines of the coordinator's log are signed and in its tree of {extract.size} lines "
        f"(root {extract.root[:16]}); {len(rounds)} rounds closed{again}, the last with the weights of this release"
        f"{logs if extract.earlier else ''}",
        *signed,
    ]


def _check_answers(release: Release, rounds: Collection[Mapping[str, Any]]) -> list[str]:
    """Every update that the log says a hospital signed was signed by it, for that round of that run; how many were
    counted without that is told."""
    unsigned = sum(len({*facts["counted"]} - _on_time(facts.get("signed", {}))) for facts in rounds)
    named = [(digest, label, facts) for facts in rounds for label, digest in facts.get("signed", {}).items()]
    if not named:
        return [f"{unsigned} updates were counted, and none of them is signed by its hospital"] if unsigned else []
    found = parse_json(Answers, _bytes(release, ANSWERS), ANSWERS, ReleaseInvalid).answers
    known = {answer.sha256: answer for answer in found}
    keys, strange = _keys(release), 0
    for digest, label, facts in named:
        site, _, late = _labelled(label)
        answer = known.get(digest)
        if answer is None or answer.site != site:
            raise ReleaseInvalid(f"{ANSWERS}: lacks what {site!r} signed in round {facts['round']}.", ANSWERS)
        try:
            asked = envelope_of(answer, ANSWERS, ReleaseInvalid).asked
        except ReleaseInvalid as error:
            raise ReleaseInvalid(str(error), ANSWERS) from None
        about = (asked.run, asked.study_sha256, f"(round {asked.round})")
        if about != (facts["run"], release.manifest.origin.study_sha256, late or f"(round {facts['round']})"):
            raise ReleaseInvalid(f"{ANSWERS}: {site!r} signed round {facts['round']} of another run or study.", ANSWERS)
        strange += (site, answer.key) not in keys
    gone = f"; {strange} of them under keys that no roster here has, which prove nothing about who signed" * (
        strange > 0
    )
    bare = f"; {unsigned} more were counted that no hospital has signed" if unsigned else ""
    return [
        f"{len(named)} updates that were counted are signed by their hospitals, each for its round of its run"
        f"{gone}{bare}"
    ]


def _on_time(signed: Iterable[str]) -> set[str]:
    """The sites of labels of `round-closed` that are not of late answers."""
    return {site for site, _, late in map(_labelled, signed) if not late}


def _labelled(label: str) -> tuple[str, str, str]:
    """The site of an answer in `round-closed`, and behind a blank, of a late one, which round it was for."""
    return label.partition(" ")


def _lines(extract: Extract, key: bytes) -> list[dict[str, Any]]:
    """The lines about the runs, the oldest first, of all logs, each in the tree of its log."""
    parts = [list(_proved(extract.leaves, extract.size, extract.root, key))]
    for leaves, before in zip(extract.earlier, _before(extract), strict=True):  # what says so was proved just before
        if not leaves or sha256_of(leaves[0].line.encode()) != before.log:
            raise ReleaseInvalid(f"{AUDIT}: lacks the first line of a log before, so nobody knows its key.", AUDIT)
        opened = parse_json(dict[str, Any], leaves[0].line, AUDIT, ReleaseInvalid)
        by = key_in(opened["facts"]) or b""
        parts.append(list(_proved(leaves, before.size, before.root or "", by)))
    return [line for part in reversed(parts) for line in part if line["event"] in EVENTS]


def _before(extract: Extract) -> Iterator[Sealed]:
    """How each of the logs before ended, as the first line of the one after it says."""
    for leaves in (extract.leaves, *extract.earlier)[: len(extract.earlier)]:
        first = parse_json(dict[str, Any], leaves[0].line, AUDIT, ReleaseInvalid) if leaves else {}
        try:
            before = sealed(first["facts"]) if leaves[0].index == 0 else None
        except (StateInvalid, KeyError, IndexError, TypeError, AttributeError):
            before = None
        if before is None or before.root is None:
            raise ReleaseInvalid(f"{AUDIT}: lacks the line that says how the log before ended.", AUDIT)
        yield before


def _proved(leaves: Iterable[Leaf], size: int, root_hex: str, key: bytes) -> Iterator[dict[str, Any]]:
    root = bytes.fromhex(root_hex)
    for leaf in leaves:
        text = leaf.line.encode()
        line = parse_json(dict[str, Any], text, AUDIT, ReleaseInvalid)
        body = {name: value for name, value in line.items() if name != "sign"}
        try:
            signature = bytes.fromhex(line["sign"])
            sound = isinstance(line["facts"], dict) and isinstance(line["event"], str) and canonical_json(line) == text
        except (KeyError, ValueError, TypeError):
            sound, signature = False, b""
        if not sound or not verify(key, signature, LINE, canonical_json(body)):
            raise ReleaseInvalid(f"{AUDIT}: line {leaf.index + 1} of the log is not as it was signed.", AUDIT)
        if not holds(text, leaf.index, size, root, [bytes.fromhex(part) for part in leaf.path]):
            raise ReleaseInvalid(f"{AUDIT}: line {leaf.index + 1} is not in the tree of the signed head.", AUDIT)
        yield line


def _check_digest(release: Release, name: str, wanted_sha256: str | None) -> None:
    if wanted_sha256 is None:
        return
    entry = release.manifest.files.get(name)
    if entry is None or entry.sha256 != wanted_sha256:
        raise ReleaseInvalid(f"{name}: is not the one that the manifest names.", name)


def _bytes(release: Release, name: str) -> bytes:
    """A file of the release, compared once more: time has passed since it was opened."""
    if name == SIGNATURE:
        return (release.folder / name).read_bytes()
    entry = release.manifest.files.get(name)
    if entry is None or entry.bytes > MOST_JSON:
        raise ReleaseInvalid(f"{name}: is missing, or was changed. Get the release again.", name)
    return release.content(name)


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
