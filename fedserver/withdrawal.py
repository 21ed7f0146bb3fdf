"""A site leaves: which releases hold what it sent, and how a run is trained again without it."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.checkpoint import WITHOUT, RunFolder, State, excluded, read_progress, read_state, read_study
from fedserver.enrol import Federation, open_log
from fedserver.holding import SITE_LEFT, contents
from fedserver.lifecycle import revoke
from fedserver.publish.lineage import BEGAN, RETRAINED, UNREADABLE, held, planners
from fedserver.registry import Entry, list_releases, retire_release
from fedserver.state import UNFINISHED, Run, add_run, find_run, find_site, list_runs
from fedserver.submit import checked_name
from shared_models.errors import StateInvalid
from shared_models.files import canonical_json, file_sha256, read_lines, sync_folder, write_atomic, write_json
from shared_models.parse import plain
from shared_models.strategy import remembers
from shared_models.weights import NO_WEIGHTS


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
    """What a site's leaving touches.

    Attributes:
        releases: those that hold something of it.
        runs: likewise; run -> the first round in which it was counted, 0 where the plan or the first weights hold it.
        begun: run -> the run whose weights brought it in.
        unread: runs and releases that cannot be read, or whose plan is of nobody knows whom: they may hold it too.
        under_way: run -> the round of it that may count the site as it closes, see `under_way`.
    """

    releases: tuple[Entry, ...]
    runs: Mapping[str, int]
    begun: Mapping[str, str]
    unread: tuple[str, ...]
    under_way: Mapping[str, int]


def withdraw(federation: Federation, site: str, reason: str, retire: bool) -> Withdrawn:
    """Shuts a site out and names what holds something of it; with `retire` those releases are retired.

    Raises:
        StateInvalid: a site that is not known, or a reason that is none.
    """
    revoke(federation, site, reason)
    still = under_way(federation, site)  # before what is closed is read: a round that closes meanwhile is in that
    known = list_releases(federation)
    within, planned_by = contents(federation, known), planners(federation.folder)
    found = [
        retire_release(federation, entry.digest, f"{site} has withdrawn: {reason}"[:500], SITE_LEFT)
        if retire and entry.stage != "retired"
        else entry
        for entry in known
        if site in within[entry.digest].sites
    ]
    runs, begun, unread = dict[str, int](), dict[str, str](), set[str]()
    for run in list_runs(federation.state):
        try:
            inside = held(RunFolder(federation.runs / run.id), planned_by)
        except UNREADABLE:  # one damaged folder hides no other run
            unread.add(run.id)
            continue
        unread.update(inside.unread, [run.id] if inside.planned is None else [])
        if site in inside.sites:
            runs[run.id] = inside.first(site)
        if site in inside.before:
            begun[run.id] = inside.before[site]
    unread.update(*(content.unread for content in within.values()))
    open_log(federation).add(
        "withdrawn", site=site, releases=[entry.digest for entry in found], runs=runs, unread=sorted(unread),
        under_way=still,
    )  # fmt: skip
    return Withdrawn(tuple(found), runs, begun, tuple(sorted(unread)), still)


def under_way(federation: Federation, site: str) -> dict[str, int]:
    """Run -> its round, of those that are in the middle of one in which the site has a seat.

    Nothing more is taken of a site that is shut out, but what it had sent before may be in the sum, a late update of an
    earlier round too, and a sum cannot be undone: only when the round has closed is it known whom it has counted. A
    secure sum that waits for sites is kept, and may hold the site also while nobody carries out its run.
    """
    found = dict[str, int]()
    for run in list_runs(federation.state):
        folder = RunFolder(federation.runs / run.id)
        progress, kept = read_progress(folder), run.state in UNFINISHED and folder.sum.exists()
        moving = run.state == "running" and progress.get("phase") != "finished"
        if kept or (moving and site in progress.get("sites", {})):
            found[run.id] = int(progress.get("round", 0))
    return found


def retrain(federation: Federation, run_id: str, sites: Sequence[str], name: str | None = None) -> Retrained:
    """Queues a run of the same study without `sites`, from the last round before any of them was counted.

    Where its sites remember things of their own between rounds, or the plan came from counts of one of these sites, it
    begins from the start.

    Raises:
        StateInvalid: a run or site that is not known, one that was never counted in it, or one that came in with the
            weights that the run began with.
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
    number, why = begin_from(old, sites, planners(federation.folder))
    made = copy_until(old, number, federation.runs / new_id, sites)
    open_log(federation).add(
        "run-retrained", run=new_id, before=run_id, round=number, without=sorted(sites), study=run.study_sha256
    )
    now = time.time()
    add_run(federation.state, Run(new_id, run.study_name, run.study_sha256, "queued", None, now, now, ""))
    return Retrained(new_id, made, number, why)


def begin_from(run: RunFolder, sites: Sequence[str], planned_by: Mapping[str, Sequence[str]]) -> tuple[int, str]:
    """The round to go on from, and why.

    Args:
        planned_by: run -> sites whose counts made its plan, where somebody wrote that down.

    Raises:
        StateInvalid: none of the sites was ever counted, so that nothing of them is in the run; its first weights hold
            one of them, or nobody can tell; or its sites would refuse to do its rounds again.
    """
    read_state(run)  # that it is whole
    study = read_study(run)
    if study.protect.secure_aggregation is not None:
        raise StateInvalid(
            f"run {run.id!r}: its updates were summed securely, and no site adds its update to a second sum of the "
            f"same round, for the two would differ by the update of the site that went. Withdraw the site, then submit "
            f"the study with another seed."
        )
    inside = held(run, planned_by)
    if inside.unread:
        raise StateInvalid(
            f"run {run.id!r}: it began with weights that go back to {', '.join(inside.unread)}, and whom that holds "
            f"cannot be read. Restore its folder from a backup."
        )
    for site in sites:
        if site in inside.before:
            other = inside.before[site]
            raise StateInvalid(
                f"run {run.id!r}: the weights that it began with hold what {site} sent in run {other}. First "
                f"`fedserver retrain {other} --without {site}`; then submit the study anew with the weights of that, "
                f"their digest under [transfer]. Runs in between come before it, in the same way."
            )
    counted = {site: inside.counted[site] for site in sites if site in inside.counted}
    planned = inside.planned is None or bool(inside.planned & set(sites))
    if not counted and not planned:
        raise StateInvalid(
            f"run {run.id!r}: {', '.join(sites)} was never counted in it. There is nothing to train again."
        )
    if planned:
        return 0, "the plan of the run came from counts of it too, so a new plan is made, from the start"
    site, first = min(counted.items(), key=lambda item: item[1])
    if first == 1:
        return 0, f"{site} was counted from round 1 on, so it begins from the start"
    if remembers(study) or study.protect.compression != "none":  # which leaves something over for the next round
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


def _numbered(federation: Federation, run_id: str) -> str:
    """`lung-ct-1-without`, `lung-ct-1-without-2`, ...: the first that is free."""
    taken, number, name = {run.id for run in list_runs(federation.state)}, 1, f"{run_id}-without"
    while name in taken or (federation.runs / name).exists():
        number += 1
        name = f"{run_id}-without-{number}"
    return name
