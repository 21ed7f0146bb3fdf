"""A hospital's word on each study, by the study's digest: asked for, given, refused, withdrawn, run out.

    site/studies/<sha256>/study.json      the study as it came
    site/studies/<sha256>/decision.json   the last decision on it; none while nobody has decided

Any change of a study is another digest, and asks anew. A decision is read before each step of work under way. On a
study that reads the same as another one, where one of them has secure sums, no policy decides, only a person.
"""

import getpass
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedclient.alike import Alike, alike
from fedclient.own_log import log_of
from fedclient.policy import MOST_A_DAY, objections
from fedclient.records import check_own_log
from fedclient.site import Site
from fedclient.work import check_signed, study_of
from shared_models.dates import date_text
from shared_models.errors import OrderRefused, StateInvalid, StudyInvalid
from shared_models.files import canonical_json, locked, write_atomic
from shared_models.parse import STRICT, parse_json, plain
from shared_models.study import SIGNED, Study, from_json, statement
from shared_models.wire import Order

Verdict = Literal["approved", "refused", "withdrawn"]
MOST_PENDING = 200  # studies that nobody has decided on; a coordinator that sends more fills no disk
DAY_S = 86400.0  # in which the policy decides on MOST_A_DAY new studies
POLICY = "policy"  # who decided, where nobody was asked
MOST_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided on a study, by whom (a login of this machine, or `policy`), and until when it holds."""

    __pydantic_config__ = STRICT
    verdict: Verdict
    by: Annotated[str, Field(max_length=200)]
    at_s: float
    until_s: float | None = None
    reason: Annotated[str, Field(max_length=MOST_REASON)] = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A study that has come to this site.

    Attributes:
        state: pending, expired (pending anew), approved, refused or withdrawn.
    """

    sha256: str
    study: Study
    text: str
    asked_at_s: float
    decision: Decision | None
    state: str


def admitted(order: Order, site: Site, now: Callable[[], float] = time.time) -> Site:
    """The site as it may work on `order`: it looks, between steps, whether it still may.

    Raises:
        OrderRefused: `STUDY_UNSIGNED`, `STUDY_SIGNATURE`, `STUDY_MISMATCH`, `OUTSIDE_POLICY` (with the keys),
            `OWN_LOG_CUT`, `APPROVAL_PENDING`, `STUDY_REFUSED`, `STUDY_WITHDRAWN`, `OUTSIDE_HOURS` or
            `TOO_MANY_STUDIES`.
        StudyInvalid: a study that is none.
    """
    check_signed(order.study_proof, site, SIGNED, statement(order.run, order.study_sha256), order.run)
    study = study_of(order)
    if study.protect.privacy is not None or study.protect.secure_aggregation is not None:
        check_own_log(order, site)  # both rest on what this site remembers
    found = list(objections(site.policy, study))
    if found:
        raise OrderRefused(
            "OUTSIDE_POLICY",
            f"study {study.name!r} is outside [policy] of site.toml. {'. '.join(map(str, found))}.",
            tuple(objection.key for objection in found),
        )
    _ask(order, study, site, now())

    def go_on() -> None:
        check_decision(site, order.study_sha256, now())

    go_on()
    log_of(site.folder, site.name).add(
        "order", run=order.run, round=order.round, kind=order.kind, attempt=order.attempt, study=order.study_sha256
    )
    return replace(site, go_on=go_on)


def check_decision(site: Site, digest: str, now_s: float) -> None:
    """Raises OrderRefused unless this site takes part in the study of `digest`, now."""
    decision = read_decision(site.folder, digest)
    if decision is not None and decision.verdict != "approved":
        raise OrderRefused(
            f"STUDY_{decision.verdict.upper()}", f"study {digest[:12]} was {decision.verdict} by {decision.by} here."
        )
    by_policy = decision is not None and decision.by == POLICY
    if decision is None or _is_over(decision, now_s) or (by_policy and site.policy.approval == "ask"):
        raise OrderRefused(
            "APPROVAL_PENDING",
            f"study {digest[:12]} awaits a decision here: `fedclient show {digest[:12]}`, then approve or refuse.",
        )
    if not site.policy.is_open(now_s):
        raise OrderRefused("OUTSIDE_HOURS", f"hours in [policy] of site.toml are {', '.join(site.policy.hours)}.")


def _is_over(decision: Decision, now_s: float) -> bool:
    return decision.until_s is not None and now_s >= decision.until_s


def _ask(order: Order, study: Study, site: Site, now_s: float) -> None:
    """Keeps a study that is new here, and decides on it where the policy does."""
    folder = _folder(site.folder, order.study_sha256)
    log = log_of(site.folder, site.name)
    with locked(site.folder / "studies" / ".lock"):
        if not (folder / "study.json").exists():
            if len(undecided(site.folder)) >= MOST_PENDING:
                raise OrderRefused(
                    "TOO_MANY_STUDIES", f"{MOST_PENDING} studies await a decision here. Decide: `fedclient studies`."
                )
            log.add("study-asked", study=order.study_sha256, name=study.name, run=order.run)
            write_atomic(folder / "study.json", order.study.encode())
        decision = read_decision(site.folder, order.study_sha256)
        over = decision is not None and decision.by == POLICY and _is_over(decision, now_s)
        decides = site.policy.approval == "inside-policy" and (decision is None or over)
        if decides and not alike_here(site, order.study_sha256, study) and not unread_alike(site, study):
            if decision is None and _decided_by_policy(site.folder, now_s - DAY_S) >= MOST_A_DAY:
                raise OrderRefused(
                    "APPROVAL_PENDING",
                    f"study {order.study_sha256[:12]}: the policy has approved {MOST_A_DAY} studies within a day, "
                    f"which is the most. A person can decide now (`fedclient studies`), the policy does a day later.",
                )
            until = now_s + site.policy.approval_days * DAY_S
            first = now_s if decision is None else decision.at_s
            _write(site, order.study_sha256, Decision("approved", POLICY, first, until))


def _decided_by_policy(folder: Path, since_s: float) -> int:
    """How many studies nobody but the policy has decided on since then; one that it goes on with is no new one."""
    decisions = (read_decision(folder, path.parent.name) for path in (folder / "studies").glob("*/decision.json"))
    return sum(d is not None and d.by == POLICY and d.at_s > since_s for d in decisions)


def alike_here(site: Site, digest: str, study: Study) -> list[Alike]:
    """The other studies at this site that may tell what secure sums of `study` hide, or the other way about."""
    return alike(site, study, [other for other in list_asked(site) if other.sha256 != digest])


def decide(
    site: Site, digest: str, verdict: Verdict, reason: str = "", days: int | None = None, also_alike: bool = False
) -> Decision:
    """A person's decision; work under way on a study that is not approved ends at its next step.

    A study that was approved once is withdrawn and never refused: what it has told stays told (`fedclient.alike`).

    Args:
        also_alike: approves a study although it reads the same as another one, and secure sums hide less for that.

    Raises:
        StateInvalid: a study outside the policy cannot be approved, nor one that is like another unless `also_alike`;
            a reason that is too long to be read back.
    """
    if len(reason) > MOST_REASON:
        raise StateInvalid(f"a reason of {len(reason)} characters: give at most {MOST_REASON}.")
    study = read_asked(site, digest).study if verdict == "approved" else None
    if study is not None and (found := list(objections(site.policy, study))):
        raise StateInvalid(
            f"study {study.name!r} is outside the policy and would be refused all the same. "
            f"{'. '.join(map(str, found))}. Change [policy] in {site.folder / 'site.toml'} first, or refuse the study."
        )
    now_s = time.time()
    until = now_s + (days or site.policy.approval_days) * DAY_S if verdict == "approved" else None
    with locked(site.folder / "studies" / ".lock"):
        before = read_decision(site.folder, digest)
        if verdict == "refused" and before is not None and before.verdict != "refused":
            verdict = "withdrawn"
        decision = Decision(verdict, _person(), round(now_s, 3), until, reason)
        if study is not None and not also_alike:
            whys = [other.why for other in alike_here(site, digest, study)]
            whys += [
                f"This site took part in {other[:12]}, which this version does not read; it may read the same here."
                for other in unread_alike(site, study)
            ]
            if whys:
                raise StateInvalid(
                    f"study {study.name!r} needs one more word. {' '.join(whys)} Where the same sites take part in "
                    f"both, or you accept it: `fedclient approve {digest[:12]} --also-alike`."
                )
        _write(site, digest, decision)
    if verdict != "approved":
        for kept in (site.folder / "runs").glob(f"*/*-{digest[:16]}*"):  # so ended an older version's names
            kept.unlink(missing_ok=True)
    return decision


def _person() -> str:
    """The login of who decides, or the number of one without a name; never the word that stands for the policy."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # the latter until Python 3.12
        name = str(os.getuid())
    return f"login {name}" if name == POLICY else name


def _write(site: Site, digest: str, decision: Decision) -> None:
    log_of(site.folder, site.name).add(f"study-{decision.verdict}", study=digest, **plain(decision))
    write_atomic(_folder(site.folder, digest) / "decision.json", canonical_json(plain(decision)))


def read_decision(folder: Path, digest: str) -> Decision | None:
    path = _folder(folder, digest) / "decision.json"
    try:
        return parse_json(Decision, path.read_bytes(), str(path), StateInvalid)
    except FileNotFoundError:
        return None


def read_asked(site: Site, digest: str) -> Asked:
    folder = _folder(site.folder, digest)
    text = (folder / "study.json").read_text(encoding="utf-8")
    decision, state, now_s = read_decision(site.folder, digest), "pending", time.time()
    if decision is not None:
        by_policy = decision.by == POLICY and site.policy.approval == "ask"
        state = "expired" if _is_over(decision, now_s) else "pending" if by_policy else decision.verdict
    asked_at = (folder / "study.json").stat().st_mtime
    return Asked(digest, from_json(text, str(folder)), text, asked_at, decision, state)


def list_asked(site: Site) -> list[Asked]:
    """Every study that has come to this site and that this version reads, the oldest first."""
    return all_asked(site)[0]


def all_asked(site: Site) -> tuple[list[Asked], list[str]]:
    """As `list_asked`, and the digests of those that an earlier version took and this one does not read."""
    found, unread = list[Asked](), list[str]()
    for path in (site.folder / "studies").glob("*/study.json"):
        try:
            found.append(read_asked(site, path.parent.name))
        except StudyInvalid:  # it hides no other
            unread.append(path.parent.name)
    return sorted(found, key=lambda asked: (asked.asked_at_s, asked.sha256)), sorted(unread)


def unread_alike(site: Site, study: Study) -> list[str]:
    """Digests that are not read, were approved once and, for all that is known, are like `study`: see `alike`."""
    if study.protect.privacy is not None:
        return []
    found = []
    for digest in all_asked(site)[1]:
        decision = read_decision(site.folder, digest)
        told = decision is not None and decision.verdict != "refused"
        text = (_folder(site.folder, digest) / "study.json").read_text(encoding="utf-8")
        if told and (study.protect.secure_aggregation is not None or '"secure_aggregation":{' in text):
            found.append(digest)
    return found


def find_digest(site: Site, words: str) -> tuple[str, str]:
    """Digest and name of the study that `words` means (see `find_asked`), or the digest of one that is not read."""
    read, unread = all_asked(site)
    fit = [digest for digest in unread if len(words) >= 4 and digest.startswith(words)]
    if len(fit) == 1 and not any(asked.sha256.startswith(words) for asked in read):
        return fit[0], "a study that this version does not read"
    asked = find_asked(site, words)
    return asked.sha256, asked.study.name


def find_asked(site: Site, words: str) -> Asked:
    """The study that `words` (a name, a digest or the beginning of one) means.

    A name that several have means none of them, not the last: another one of that name may have come since a person
    read what it says.

    Raises:
        StateInvalid: none, or several.
    """
    listed = list_asked(site)
    found = [asked for asked in listed if asked.sha256 == words] or [
        asked for asked in listed if asked.study.name == words or (len(words) >= 4 and asked.sha256.startswith(words))
    ]
    if not found:
        known = ", ".join(f"{a.study.name} ({a.sha256[:12]})" for a in listed) or "none has come yet"
        raise StateInvalid(f"study {words!r}: is no study here. Known: {known}.")
    if len(found) > 1:
        told = ", ".join(f"{a.sha256[:16]} ({a.study.name}, {a.state}, came {date_text(a.asked_at_s)})" for a in found)
        raise StateInvalid(f"study {words!r}: means several here: {told}. Name it by its digest.")
    return found[0]


def undecided(folder: Path) -> list[Path]:
    """Files of the studies on which there is no decision yet."""
    return [p for p in (folder / "studies").glob("*/study.json") if not (p.parent / "decision.json").exists()]


def _folder(folder: Path, digest: str) -> Path:
    return folder / "studies" / digest
