"""What a data steward has decided about findings, by name and with a reason; every decision and its use is logged.

site/gate/waivers.json    what holds now
site/gate/log.jsonl       what was decided, checked, used and refused, one line each, never rewritten
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedclient.data.findings import CATALOGUE, Finding
from shared_models.errors import StateInvalid
from shared_models.files import append_json, canonical_json, locked, write_atomic
from shared_models.parse import STRICT, parse_json, plain

LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Waiver:
    """One decision.

    Attributes:
        case: key of one case; empty for all that have the finding.
        exclude: the case takes no part, rather than taking part in spite of the finding.
        reason: in the steward's words; stays on site.
        at: when, UTC.
    """

    __pydantic_config__ = STRICT
    code: str
    case: str
    reason: str
    at: str
    exclude: bool = False


@dataclass(frozen=True, slots=True)
class _Waivers:
    __pydantic_config__ = STRICT
    waivers: tuple[Waiver, ...] = ()


def read_waivers(site: Path) -> tuple[Waiver, ...]:
    path = site / "gate" / "waivers.json"
    if not path.exists():
        return ()
    return parse_json(_Waivers, path.read_bytes(), str(path), StateInvalid).waivers


def waive(site: Path, code: str, case: str, reason: str, exclude: bool) -> Waiver:
    """Adds a decision, in place of one about the same.

    Raises:
        StateInvalid: a code that is not in the catalogue, no reason, or an exclusion that names no case.
    """
    _check(code, case)
    reason = " ".join(reason.split())
    if not 10 <= len(reason) <= LONGEST_REASON:
        raise StateInvalid(
            f"a waiver needs a reason of 10 to {LONGEST_REASON} letters, for those who audit it later. Give --reason."
        )
    if exclude and not case:
        raise StateInvalid("--exclude takes single cases out. Name one with --case, as `fedclient check` shows it.")
    made = Waiver(code, case, reason, now(), exclude)
    with locked(site / "gate" / ".waivers.lock"):
        kept = [each for each in read_waivers(site) if (each.code, each.case) != (code, case)]
        _write(site, [*kept, made])
    note(site, "waived", **plain(made))
    return made


def withdraw(site: Path, code: str, case: str) -> None:
    """Takes a decision back.

    Raises:
        StateInvalid: there is none.
    """
    _check(code, case)
    with locked(site / "gate" / ".waivers.lock"):
        held = read_waivers(site)
        kept = [each for each in held if (each.code, each.case) != (code, case)]
        if len(kept) == len(held):
            about = f" for case {case}" if case else ""
            raise StateInvalid(f"there is no waiver of {code}{about}. `fedclient waive --list` shows those that hold.")
        _write(site, kept)
    note(site, "withdrawn", code=code, case=case)


def excluded(waivers: Iterable[Waiver]) -> frozenset[str]:
    """Keys of the cases that take no part."""
    return frozenset(each.case for each in waivers if each.exclude)


def sorted_out(findings: Sequence[Finding], waivers: Sequence[Waiver]) -> tuple[list[Finding], list[Waiver]]:
    """The findings that stop training, and the waivers without which there would be more."""
    blocking: list[Finding] = []
    used: list[Waiver] = []
    for found in findings:
        if found.severity != "block":
            continue
        let = next((w for w in waivers if w.code == found.code and w.case in ("", found.case) and not w.exclude), None)
        if let is None:
            blocking.append(found)
        elif let not in used:
            used.append(let)
    return blocking, used


def note(site: Path, event: str, **facts: object) -> None:
    with locked(site / "gate" / ".log.lock"):  # a steward and the node may both have something to say
        append_json(site / "gate" / "log.jsonl", {"at": now(), "event": event, "by": os.getuid(), **facts})


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _check(code: str, case: str) -> None:
    if code not in CATALOGUE:
        raise StateInvalid(f"{code!r} is no code of a finding. Known: {', '.join(sorted(CATALOGUE))}.")
    if case and (len(case) != 16 or set(case) - set("0123456789abcdef")):
        raise StateInvalid(
            f"--case {case!r}: a case is named by its 16 hexadecimal digits, as `fedclient check` shows."
        )


def _write(site: Path, waivers: Sequence[Waiver]) -> None:
    ordered = sorted(waivers, key=lambda each: (each.code, each.case))
    write_atomic(site / "gate" / "waivers.json", canonical_json(plain(replace(_Waivers(), waivers=tuple(ordered)))))
