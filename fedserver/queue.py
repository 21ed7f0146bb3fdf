"""Which of the queued runs are carried out now, and which are held back: one after the other unless told otherwise.

runs/ID/hold.json    a person wants the run to pause: after which round, and when that was said
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedserver.checkpoint import RunFolder, read_study
from fedserver.enrol import Federation, open_log
from fedserver.state import ACTIVE, Run, change_run, find_run
from shared_models.errors import StateInvalid
from shared_models.files import read_json, write_json

AT_ONCE = 1  # runs that are carried out side by side: their sites would share one GPU


@dataclass(frozen=True, slots=True)
class Hold:
    """What a person has asked for: the run pauses once `after` is finished; 0 is at once."""

    after: int
    at_s: float


def due(runs: Sequence[Run], busy: Collection[str], at_once: int) -> list[str]:
    """The runs to take up now: those that had begun first, then the queued ones in the order in which they came.

    Args:
        busy: runs that are being carried out, or that are still ending.
    """
    begun = [run.id for run in runs if run.state == "running" and run.id not in busy]
    return [*begun, *(run_id for run_id in waiting(runs) if run_id not in busy)][: max(0, at_once - len(busy))]


def waiting(runs: Sequence[Run]) -> list[str]:
    """The queued runs in their order; one that goes on after a pause stands at the end."""
    queued = [run for run in runs if run.state == "queued"]
    return [run.id for run in sorted(queued, key=lambda run: (run.updated_at, run.id))]


def pause(federation: Federation, run_id: str, at_once: bool) -> str:
    """Lets a run rest: after the round that it is in, or at once; what it has finished stays. Returns what happens.

    Raises:
        StateInvalid: a run that is not known, that is not under way, or that has no round left to pause after.
    """
    run = known(federation.state, run_id)
    if run.state not in ACTIVE:
        raise StateInvalid(f"run {run_id!r}: is {run.state}. Only a run that is queued or running can be paused.")
    folder = RunFolder(federation.runs / run_id)
    done = finished_round(folder)
    if run.state == "running" and not at_once and done >= read_study(folder).rounds.count:
        raise StateInvalid(
            f"run {run_id!r}: has finished its rounds and is being scored. `--now` pauses it before that."
        )
    open_log(federation).add("run-paused", run=run_id, round=done, at_once=at_once)
    resting = change_run(federation.state, run_id, time.time(), "paused", words(run_id, done), among=("queued",))
    if resting.state == "paused":
        return "is paused"
    write_json(hold_file(folder), {"after": 0 if at_once else done + 1, "at": time.time()})
    return "pauses at once" if at_once else f"pauses when round {done + 1} is finished"


def resume(federation: Federation, run_id: str) -> str:
    """Queues a run that was paused, stopped or has failed; it goes on after its last finished round. Returns what
    happens.

    Raises:
        StateInvalid: a run that is not known, or that is finished.
    """
    run = known(federation.state, run_id)
    if run.state == "finished":
        raise StateInvalid(f"run {run_id!r}: is finished. `fedserver run --new` begins another one of its study.")
    unhold(RunFolder(federation.runs / run_id))
    open_log(federation).add("run-resumed", run=run_id)
    if run.state == "running":
        return "goes on without a pause"
    if run.state != "queued":
        change_run(federation.state, run_id, time.time(), "queued")
    return "is queued again; `fedserver status` shows its place"


def words(run_id: str, done: int) -> str:
    """Of a run that a person has paused, for `fedserver status`."""
    after = f"after round {done}" if done else "before its first round was finished"
    return f"paused by the coordinator {after}; `fedserver resume {run_id}` goes on."


def known(state: Path, run_id: str) -> Run:
    run = find_run(state, run_id)
    if run is None:
        raise StateInvalid(f"run {run_id!r}: is not known here. `fedserver status` lists the runs.")
    return run


def hold_of(folder: RunFolder) -> Hold | None:
    """What a person has asked of a run; None where nobody has."""
    try:
        found = read_json(hold_file(folder))
        return Hold(int(found["after"]), float(found["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unhold(folder: RunFolder) -> None:
    hold_file(folder).unlink(missing_ok=True)


def hold_file(folder: RunFolder) -> Path:
    return folder.path / "hold.json"


def finished_round(folder: RunFolder) -> int:
    """Last finished round of a run; 0 before the first, or when nobody can tell: its process will say why."""
    try:
        return int(read_json(folder.path / "state.json")["round"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
