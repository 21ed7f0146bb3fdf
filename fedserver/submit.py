"""From a study to a queued run, and how a run that is watched has ended; no Flower in here."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedserver.checkpoint import RunFolder, create_run, read_state, read_study
from fedserver.enrol import Federation, open_log
from fedserver.publish.lineage import BEGAN, run_with
from fedserver.queue import unhold
from fedserver.registry import list_releases, manifest_of
from fedserver.state import (
    ACTIVE,
    UNFINISHED,
    Run,
    add_run,
    change_run,
    find_run,
    list_runs,
)
from shared_models.errors import StateInvalid
from shared_models.files import write_json
from shared_models.release import WEIGHTS
from shared_models.size import size_in_words
from shared_models.study import Study, sha256
from shared_models.supervise import read_status
from shared_models.weights import schema_of

UNSERVED_S = 30.0  # a supervisor that was killed is started again by systemd, or by hand


@dataclass(frozen=True, slots=True)
class Submitted:
    id: str
    folder: RunFolder
    rounds: int
    told: tuple[str, ...] = field(default=(), compare=False)  # what a person should know before it starts


def submit(
    federation: Federation,
    study: Study,
    name: str | None,
    new: bool,
    weights: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Submitted:
    """Queues a run of `study`: an unfinished one of the same study goes on, unless `new`. `weights` is the file
    that the study begins from, where it names one. `say` hears of a run that is new before it is made.

    Raises:
        StateInvalid: a name that is taken by a finished run or by another study.
    """
    digest, now = sha256(study), time.time()
    same = [r for r in list_runs(federation.state) if r.study_sha256 == digest and r.state in UNFINISHED]
    if name is not None:
        taken = find_run(federation.state, name)
        if taken is not None and (taken.study_sha256 != digest or taken.state == "finished" or new):
            raise StateInvalid(f"run {name!r}: the name is taken ({taken.study_name}, {taken.state}). Choose another.")
        same = [taken] if taken else []
    if same and not new:
        going_on = same[-1]
        unhold(RunFolder(federation.runs / going_on.id))
        if going_on.state not in ACTIVE:
            change_run(federation.state, going_on.id, now, "queued")
        return Submitted(going_on.id, RunFolder(federation.runs / going_on.id), study.rounds.count)
    run_id = checked_name(name) if name else _numbered(federation, study)
    say(f"Run {run_id} of {study.name} is made, which takes some seconds.")
    from shared_models.pretrained import first_weights  # imports torch

    folder, told = RunFolder(federation.runs / run_id), tuple[str, ...]()
    if not (folder.path / "state.json").exists():
        initial, came = (None, "") if study.plan == "federated" else first_weights(study, weights)
        told = tuple(filter(None, [came, size_in_words(schema_of(initial)) if initial is not None else ""]))
        create_run(federation.runs, run_id, study, initial)
    elif read_state(folder).study_sha256 != digest:  # left there by a command that was killed before it was queued
        raise StateInvalid(f"{folder.path}: holds a run of another study. Move that folder away, or choose a name.")
    if study.transfer.sha256:
        told = (*told, note_origin(federation, folder, study))
    open_log(federation).add("run-queued", run=run_id, name=study.name, study=digest)
    add_run(federation.state, Run(run_id, study.name, digest, "queued", None, now, now, ""))
    return Submitted(run_id, RunFolder(federation.runs / run_id), study.rounds.count, told)


def note_origin(federation: Federation, folder: RunFolder, study: Study) -> str:
    """Writes down of which run of this federation the weights are that a run begins with; a sentence on it."""
    digest = study.transfer.sha256
    released = [e for e in list_releases(federation) if manifest_of(federation, e).files[WEIGHTS].sha256 == digest]
    origin = (released[0].run, released[0].round) if released else run_with(federation.runs, digest)
    if origin is None:
        return "it is not known here what the first weights were trained on"
    run, number = origin
    write_json(folder.path / BEGAN, {"run": run, "round": number, "sha256": digest})
    private = read_study(RunFolder(federation.runs / run)).protect.privacy is not None
    return f"the first weights are those of round {number} of run {run}" + (
        "; the report adds up what both have spent of a patient's privacy"
        if private
        else ", which was not differentially private: nothing bounds what they hold of its patients"
    )


def outcome(federation: Federation, run_id: str) -> str | None:
    """How a run ended, or None while it is under way."""
    found = find_run(federation.state, run_id)
    return found.state if found is not None and found.state in ("finished", "paused", "failed", "stopped") else None


def watched(
    federation: Federation, run_id: str, patience_s: float = UNSERVED_S, clock: Callable[[], float] = time.monotonic
) -> Callable[[], str | None]:
    """`outcome`, or `unserved` once nobody has served the federation for `patience_s`."""
    since: float | None = None

    def look() -> str | None:
        nonlocal since
        if word := outcome(federation, run_id):
            return word
        if read_status(federation.folder)["supervisor"] is not None:
            since = None
            return None
        since = clock() if since is None else since
        return "unserved" if clock() - since >= patience_s else None

    return look


def checked_name(name: str) -> str:
    """The name of a run, as it stands in orders; raises StateInvalid for one that no site would understand."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        raise StateInvalid(f"run {name!r}: a name is lower-case letters, digits and -, at most 64.")
    return name


def _numbered(federation: Federation, study: Study) -> str:
    """`lung-ct-1`, `lung-ct-2`, ...: the first that is free."""
    taken = {run.id for run in list_runs(federation.state)}
    number = 1
    while f"{study.name}-{number}" in taken:
        number += 1
    return f"{study.name}-{number}"
