"""From a study to a queued run, and from the state on disk to what `fedserver status` tells; no Flower in here."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedserver.checkpoint import RunFolder, create_run, read_progress, read_state, read_study
from fedserver.enrol import Federation, open_log
from fedserver.lifecycle import revoked_words, warnings
from fedserver.state import (
    Run,
    Site,
    add_run,
    change_run,
    find_run,
    list_certificates,
    list_rosters,
    list_runs,
    list_sites,
)
from shared_models.errors import FederationError, StateInvalid
from shared_models.identity import fingerprint_words
from shared_models.size import size_in_words
from shared_models.study import Study, sha256
from shared_models.supervise import read_status, troubles
from shared_models.weights import schema_of

ONLINE_S = 30.0  # a node is heard of every few seconds, and noted every ten
UNSERVED_S = 30.0  # a supervisor that was killed is started again by systemd, or by hand
UNFINISHED = ("queued", "running", "paused", "failed", "stopped")


@dataclass(frozen=True, slots=True)
class Submitted:
    id: str
    folder: RunFolder
    rounds: int
    told: tuple[str, ...] = field(default=(), compare=False)  # what a person should know before it starts


def submit(federation: Federation, study: Study, name: str | None, new: bool, weights: Path | None = None) -> Submitted:
    """Queues a run of `study`: an unfinished one of the same study goes on, unless `new`. `weights` is the file
    that the study begins from, where it names one.

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
        if going_on.state not in ("queued", "running"):
            change_run(federation.state, going_on.id, now, "queued")
        return Submitted(going_on.id, RunFolder(federation.runs / going_on.id), study.rounds.count)
    run_id = _checked(name) if name else _numbered(federation, study)
    from shared_models.pretrained import first_weights  # imports torch

    folder, told = RunFolder(federation.runs / run_id), tuple[str, ...]()
    if not (folder.path / "state.json").exists():
        initial, came = (None, "") if study.plan == "federated" else first_weights(study, weights)
        told = tuple(filter(None, [came, size_in_words(schema_of(initial)) if initial is not None else ""]))
        create_run(federation.runs, run_id, study, initial)
    elif read_state(folder).study_sha256 != digest:  # left there by a command that was killed before it was queued
        raise StateInvalid(f"{folder.path}: holds a run of another study. Move that folder away, or choose a name.")
    open_log(federation).add("run-queued", run=run_id, name=study.name, study=digest)
    add_run(federation.state, Run(run_id, study.name, digest, "queued", None, now, now, ""))
    return Submitted(run_id, RunFolder(federation.runs / run_id), study.rounds.count, told)


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


def overview(federation: Federation) -> dict[str, Any]:
    """Sites, runs and processes, as `fedserver status --json` prints them."""
    status = read_status(federation.folder)
    return {
        "federation": federation.name,
        "address": federation.address,
        "served": status["supervisor"] is not None,
        "processes": status["children"],
        "troubles": [*troubles(status), *warnings(federation)],
        "roster_epoch": list_rosters(federation.state, 0, 0)[0],
        "sites": [_site(federation, site, time.time()) for site in list_sites(federation.state)],
        "runs": [_run(federation, run) for run in list_runs(federation.state)],
    }


def _site(federation: Federation, site: Site, now: float) -> dict[str, Any]:
    online = site.state == "active" and site.seen_at is not None and now - site.seen_at < ONLINE_S
    if site.state == "revoked":
        reason = f"{revoked_words(site)}: {site.revoked_reason}"
    elif site.state != "active" or online:
        reason = ""
    elif site.seen_at is None:
        reason = "has joined and never connected; is `fedclient start` running there?"
    else:
        reason = f"last heard of {now - site.seen_at:.0f} s ago"
    fingerprint = site.certificate_fingerprint
    certificates = list_certificates(federation.state, site.name)
    return {
        "name": site.name,
        "state": site.state,
        "online": online,
        "reason": reason,
        "joined_at": site.joined_at,
        "certificate_words": fingerprint_words(fingerprint) if fingerprint else None,
        "certificate_expires_at": certificates[-1].expires_at if certificates else None,
        "revoked_at": site.revoked_at,
        "revoked_reason": site.revoked_reason or None,
    }


def _run(federation: Federation, run: Run) -> dict[str, Any]:
    folder, told = RunFolder(federation.runs / run.id), run.message
    finished_rounds, rounds = None, None
    try:
        finished_rounds, rounds = read_state(folder).round, read_study(folder).rounds.count
    except FederationError as e:  # one damaged folder hides no other run
        told = str(e)
    return {
        "id": run.id,
        "study": run.study_name,
        "study_sha256": run.study_sha256,
        "state": run.state,
        "message": told,
        "finished_rounds": finished_rounds,
        "rounds": rounds,
        "progress": read_progress(folder),
    }


def _checked(name: str) -> str:
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
