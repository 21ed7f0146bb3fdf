"""A site leaves: which releases hold what it sent, and how a run is trained again without it."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.checkpoint import WITHOUT, RunFolder, State, excluded, read_state, read_study
from fedserver.enrol import Federation, open_log
from fedserver.lifecycle import revoke
from fedserver.publish.lineage import BEGAN, RETRAINED, first_counted
from fedserver.registry import SITE_LEFT, Entry, containing, retire_release
from fedserver.report import facts
from fedserver.state import Run, add_run, find_run, find_site, list_runs
from fedserver.submit import checked_name
from shared_models.audit_files import LOG
from shared_models.errors import FederationError, StateInvalid
from shared_models.files import canonical_json, read_lines, sync_folder, write_atomic, write_json
from shared_models.parse import plain
from shared_models.strategy import remembers
from shared_models.weights import NO_WEIGHTS, file_sha256


@dataclass(frozen=True, slots=True)
class Retrained:
    """A run without a site.

    Attributes:
        round: the finished round of the old run that it goes on from; 0 is from the start.
        why: in words, why from there.
    """

    id: str
    folder: RunFolder
    round: int
    why: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What a site's leaving touches: releases that hold something of it, and runs in which it was counted."""

    releases: tuple[Entry, ...]
    runs: Mapping[str, int]  # run -> first round in which it was counted


def withdraw(federation: Federation, site: str, reason: str, retire: bool) -> Withdrawn:
    """Shuts a site out and names what holds something of it; with `retire` those releases are retired.

    Raises:
        StateInvalid: a site that is not known, or a reason that is none.
    """
    revoke(federation, site, reason)
    found = containing(federation, site)
    if retire:
        found = [
            retire_release(federation, entry.digest, f"{site} has withdrawn: {reason}"[:500], SITE_LEFT)
            if entry.stage != "retired"
            else entry
            for entry in found
        ]
    runs: dict[str, int] = {}
    for run in list_runs(federation.state):
        first = _first(RunFolder(federation.runs / run.id), site)
        if first is not None:
            runs[run.id] = first
    open_log(federation).add("withdrawn", site=site, releases=[entry.digest for entry in found], runs=runs)
    return Withdrawn(tuple(found), runs)


def _first(run: RunFolder, site: str) -> int | None:
    """One damaged folder hides no other run."""
    try:
        return first_counted(facts(run)["rounds"], site)
    except (FederationError, OSError):
        return None


def retrain(federation: Federation, run_id: str, sites: Sequence[str], name: str | None = None) -> Retrained:
    """Queues a run of the same study without `sites`, from the last round before any of them was counted.

    Where its sites remember things of their own between rounds, or the plan came from counts of one of these sites, it
    begins from the start.

    Raises:
        StateInvalid: a run or site that is not known, or one that was never counted in it.
    """
    run = find_run(federation.state, run_id)
    if run is None:
        raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
    for site in sites:
        if find_site(federation.state, site) is None:
            raise StateInvalid(f"site {site!r}: is not of this federation. `fedserver status` lists the sites.")
    old, new_id = RunFolder(federation.runs / run_id), checked_name(name or _numbered(federation, run_id))
    if find_run(federation.state, new_id) is not None or (federation.runs / new_id).exists():
        raise StateInvalid(f"run {new_id!r}: the name is taken. Choose another with --name.")
    number, why = begin_from(old, sites, _planners(federation, run_id))
    made = copy_until(old, number, federation.runs / new_id, sites)
    open_log(federation).add(
        "run-retrained", run=new_id, before=run_id, round=number, without=sorted(sites), study=run.study_sha256
    )
    now = time.time()
    add_run(federation.state, Run(new_id, run.study_name, run.study_sha256, "queued", None, now, now, ""))
    return Retrained(new_id, made, number, why)


def begin_from(run: RunFolder, sites: Sequence[str], planners: Sequence[str] | None) -> tuple[int, str]:
    """The round to go on from, and why.

    Args:
        planners: sites whose counts made the plan; None where nobody wrote that down.

    Raises:
        StateInvalid: none of the sites was ever counted, so that nothing of them is in the run; or its sites would
            refuse to do its rounds again.
    """
    state, study, rounds = read_state(run), read_study(run), facts(run)["rounds"]
    if study.protect.secure_aggregation is not None:
        raise StateInvalid(
            f"run {run.id!r}: its updates were summed securely, and no site adds its update to a second sum of the "
            f"same round, for the two would differ by the update of the site that went. Withdraw the site, then submit "
            f"the study with another seed."
        )
    counted = {site: first for site in sites if (first := first_counted(rounds, site)) is not None}
    planned = state.plan_sha256 is not None
    if not counted and not (planned and (planners is None or set(planners) & set(sites))):
        raise StateInvalid(
            f"run {run.id!r}: {', '.join(sites)} was never counted in it. There is nothing to train again."
        )
    if planned and (planners is None or set(planners) & set(sites)):
        return 0, "the plan of the run came from counts of it too, so a new plan is made, from the start"
    site, first = min(counted.items(), key=lambda item: item[1])
    if first == 1:
        return 0, f"{site} was counted from round 1 on, so it begins from the start"
    if remembers(study):
        return (
            0,
            f"{site} was first counted in round {first}, but sites remember what they did in this run: from the start",
        )
    return first - 1, f"{site} was first counted in round {first}, so it goes on from round {first - 1}"


def copy_until(old: RunFolder, number: int, to: Path, sites: Sequence[str]) -> RunFolder:
    """A run folder like `old` as it stood after round `number`, whole or not at all."""
    study, before, lines = read_study(old), read_state(old), read_lines(old.metrics)
    kept = [line for line in lines if not line.get("final") and line["round"] <= number]
    part = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
    made = RunFolder(part)
    try:
        shutil.copyfile(old.path / "study.json", part / "study.json")
        anew = number == 0 and study.plan == "federated"
        digest = NO_WEIGHTS
        if not anew:
            shutil.copyfile(old.weights(number), made.weights(number))
            digest = file_sha256(made.weights(number))
            known = kept[-1]["weights_sha256"] if kept else None
            if known is not None and digest != known:
                raise StateInvalid(f"{old.weights(number)}: is not as it was written. Restore it from a backup.")
            for name in ("plan.json", "fingerprint.json", BEGAN):
                if (old.path / name).exists():
                    shutil.copyfile(old.path / name, part / name)
        if number and old.server_state(number).exists():
            shutil.copyfile(old.server_state(number), made.server_state(number))
        if kept:
            write_atomic(made.metrics, b"".join(canonical_json(line) + b"\n" for line in kept))
        parent = {"run": old.id, "round": number, "without": sorted(sites), "weights_sha256": digest}
        write_json(part / RETRAINED, parent)
        write_json(part / WITHOUT, {"sites": sorted({*sites, *excluded(old)})})
        state = State(
            to.name, before.study_sha256, number, digest, _cohort(kept), None if anew else before.plan_sha256,
            _counted(kept),
        )  # fmt: skip
        write_json(part / "state.json", plain(state))
        part.replace(to)
        sync_folder(to.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return RunFolder(to)


def _cohort(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Who was counted in the last of these rounds."""
    return tuple(sorted(site for site in lines[-1]["sites"] if " (round " not in site)) if lines else ()


def _counted(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Site -> round of its last update that was counted, as the state of the run had it after these rounds."""
    counted: dict[str, int] = {}
    for line in lines:
        for key in line["sites"]:
            site, _, late = key.partition(" (round ")
            number = int(late.rstrip(")")) if late else int(line["round"])
            counted[site] = max(number, counted.get(site, 0))
    return counted


def _planners(federation: Federation, run_id: str) -> list[str] | None:
    """Sites whose counts made the plan of a run, as the log has it."""
    made = [
        line["facts"]["sites"]
        for line in read_lines(federation.folder / LOG)
        if line["event"] == "plan-made" and line["facts"]["run"] == run_id
    ]
    return list(made[-1]) if made else None


def _numbered(federation: Federation, run_id: str) -> str:
    """`lung-ct-1-without`, `lung-ct-1-without-2`, ...: the first that is free."""
    taken, number, name = {run.id for run in list_runs(federation.state)}, 1, f"{run_id}-without"
    while name in taken or (federation.runs / name).exists():
        number += 1
        name = f"{run_id}-without-{number}"
    return name
