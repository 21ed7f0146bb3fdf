"""Whether this site's data may be trained on, asked before every order that touches them.

A deployed node makes the whole check itself when its result is missing or outdated, so that a hospital that never
typed `fedclient check` is protected as well; what did not change since the last check is not looked at again. A
simulation checks what a listing tells (patients of two splits), because its researcher has the data in hand.

    site/gate/runs/RUN.json    the state of each case's files when the run first used them
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as field_of
from pathlib import Path

from fedclient.data.findings import Finding, finding
from fedclient.gate.facts import needs_of
from fedclient.gate.run import cheap_findings, check
from fedclient.gate.waivers import note, read_waivers, sorted_out
from fedclient.site import Site
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.parse import STRICT, parse_json, plain
from shared_models.study import Study
from shared_models.wire import Order

CODE = "DATA_NOT_READY"
SHOWN = 5  # findings of a simulation in one message
CORES = os.cpu_count() or 2


@dataclass(frozen=True, slots=True)
class _Used:
    """Case key -> state of its files."""

    __pydantic_config__ = STRICT
    states: Mapping[str, str] = field_of(default_factory=dict)


def ready(order: Order, site: Site, study: Study, processes: int | None = None) -> None:
    """Returns if the order may touch this site's data.

    Args:
        processes: that look at cases; half of the cores if not given.

    Raises:
        OrderRefused: DATA_NOT_READY, with the codes of what stands against it.
    """
    if not site.deployed:
        stop(site, [found for found in cheap_findings(site) if found.severity == "block"], order)
        return
    found = check(site, needs_of(study), processes=max(1, CORES // 2) if processes is None else processes)
    stop(site, found.blocking, order)  # a run begins with the files that it may use
    changed, used_before = list(changes(site, order.run, found.states)), len(found.used)
    moved, used = sorted_out(changed, read_waivers(site.folder))
    used = [*found.used, *used]
    if used:
        shown = [{"code": waiver.code, "case": waiver.case, "at": waiver.at} for waiver in used]
        note(site.folder, "used", run=order.run, round=order.round, order=order.kind, waivers=shown)
    if len(used) > used_before and not moved:  # from here on the run uses the files as they are now
        _remember(site, order.run, found.states)
    stop(site, moved, order)


def stop(site: Site, blocking: Sequence[Finding], order: Order) -> None:
    """Refuses the order for findings that nobody has waived."""
    if not blocking:
        return
    codes = dict(sorted(Counter(each.code for each in blocking).items()))
    if site.deployed:
        note(site.folder, "refused", run=order.run, round=order.round, order=order.kind, codes=codes)
    counted = ", ".join(f"{code} ({times})" for code, times in codes.items())
    if site.deployed:
        mend = "Run `fedclient check` with the study: it says which cases, how to mend them, and what may be waived."
    else:
        told = " ".join(f"{each.code}: {each.what}" for each in blocking[:SHOWN])
        mend = f"{told} Mend these cases in {site.data}, or take them out of it."
    raise OrderRefused(CODE, f"run {order.run}: the data of site {site.name} are not ready: {counted}. {mend}")


def changes(site: Site, run: str, states: Mapping[str, str]) -> Iterator[Finding]:
    """What differs from the files that the run began with; the first order of a run finds nothing."""
    path = _path(site, run)
    if not path.exists():
        _remember(site, run, states)
        return
    before = parse_json(_Used, path.read_bytes(), str(path), StateInvalid).states
    for key in sorted(before.keys() | states.keys()):
        if key not in states:
            yield finding("DATASET_CHANGED", "it is gone since the run began.", case=key)
        elif key not in before:
            what = "it has come to the data since the run began, and takes part from now on."
            yield finding("DATASET_CHANGED", what, case=key, severity="warn")
        elif before[key] != states[key]:
            yield finding("DATASET_CHANGED", "its files are others than when the run began.", case=key)


def _remember(site: Site, run: str, states: Mapping[str, str]) -> None:
    write_atomic(_path(site, run), canonical_json(plain(_Used(dict(states)))))


def _path(site: Site, run: str) -> Path:
    return site.folder / "gate" / "runs" / f"{run}.json"
