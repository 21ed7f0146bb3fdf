"""How a federation stands: what `fedserver status --json` prints, of a layout that is written down and kept.

`fedserver status --schema` prints that layout as JSON Schema. Keys are only ever added.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedserver.checkpoint import RunFolder, read_progress, read_state, read_study
from fedserver.enrol import Federation
from fedserver.lifecycle import revoked_words, warnings
from fedserver.queue import hold_of, waiting
from fedserver.state import (
    ACTIVE,
    Run,
    RunState,
    Site,
    SiteState,
    list_certificates,
    list_rosters,
    list_runs,
    list_sites,
)
from shared_models.alarms import alarm_words, last_turned_down
from shared_models.errors import FederationError
from shared_models.identity import fingerprint_words
from shared_models.parse import STRICT, schema_of
from shared_models.supervise import read_status, troubles

ONLINE_S = 30.0  # a node is heard of every few seconds, and noted every ten


@dataclass(frozen=True, slots=True)
class SeatFacts:
    """A site in the round under way: its state, why, how often it was asked, and since when (since the epoch)."""

    state: str
    reason: str
    attempt: int
    since: float | None = None


@dataclass(frozen=True, slots=True)
class ProgressFacts:
    """The round under way; without any key before the first one.

    Attributes:
        phase: gathering, train, evaluate, paused, statistics or finished.
        deadline_in_s: as of `updated_at`, until the phase no longer waits for anybody; paused, until the run gives up.
        left_s: as of `updated_at`, of the whole run, once a round has shown how long.
    """

    phase: str | None = None
    round: int | None = None
    rounds: int | None = None
    quorum: int | None = None
    updated_at: float | None = None
    deadline_in_s: float | None = None
    left_s: float | None = None
    sites: Mapping[str, SeatFacts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run.

    Attributes:
        message: why it is not running, or what is wrong with its folder.
        finished_rounds, rounds: null where the folder cannot be read.
        queue: place among the runs that wait for their turn, from 1; null for one that does not.
        pausing: after this round it will pause, as a person has asked; null where nobody has.
    """

    __pydantic_config__ = STRICT
    id: str
    study: str
    study_sha256: str
    state: RunState
    message: str
    finished_rounds: int | None
    rounds: int | None
    queue: int | None
    pausing: int | None
    progress: ProgressFacts


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """A site; times are seconds since the epoch, null where there is none.

    Attributes:
        reason: why it is not online.
        seen_at: when it was last heard of, to about ten seconds.
        certificate_words: eight words, to be compared over a telephone.
    """

    __pydantic_config__ = STRICT
    name: str
    state: SiteState
    online: bool
    reason: str
    seen_at: float | None
    joined_at: float | None
    certificate_words: str | None
    certificate_expires_at: float | None
    revoked_at: float | None
    revoked_reason: str | None


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """A supervised process; `last_exit` is negative for a signal."""

    __pydantic_config__ = STRICT
    pid: int | None
    state: Literal["running", "waiting", "stopped"]
    restarts: int
    last_exit: int | None
    since: float
    last_words: str


@dataclass(frozen=True, slots=True)
class TurnedDownFacts:
    """An order that a site refused, or a reply that was not counted: when (since the epoch), whose, and why."""

    __pydantic_config__ = STRICT
    time: float
    site: str | None
    run: str | None
    round: int | None
    why: str | None


@dataclass(frozen=True, slots=True)
class Overview:
    """A federation as it stands.

    Attributes:
        served: whether `fedserver serve` runs.
        troubles: sentences for a person: processes that died lately, certificates that end soon.
        last_refused: the last order that was refused, or reply that was not counted, of any run.
        alarms: sentences on audit logs of sites that contradict what was vouched for.
    """

    __pydantic_config__ = STRICT
    federation: str
    address: str
    served: bool
    processes: Mapping[str, ProcessFacts]
    troubles: tuple[str, ...]
    alarms: tuple[str, ...]
    last_refused: TurnedDownFacts | None
    roster_epoch: int
    sites: tuple[SiteFacts, ...]
    runs: tuple[RunFacts, ...]


def schema() -> dict[str, Any]:
    """The layout of `overview` as JSON Schema (draft 2020-12)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(Overview)}


def overview(federation: Federation) -> dict[str, Any]:
    """Sites, runs and processes, as `fedserver status --json` prints them."""
    status = read_status(federation.folder)
    runs = list_runs(federation.state)
    places = {run_id: number for number, run_id in enumerate(waiting(runs), start=1)}
    return {
        "federation": federation.name,
        "address": federation.address,
        "served": status["supervisor"] is not None,
        "processes": status["children"],
        "troubles": [*troubles(status), *warnings(federation)],
        "alarms": alarm_words(federation.folder / "audit.jsonl"),
        "last_refused": last_turned_down(federation.folder / "audit.jsonl"),
        "roster_epoch": list_rosters(federation.state, 0, 0)[0],
        "sites": [_site(federation.state, site, time.time()) for site in list_sites(federation.state)],
        "runs": [_run(federation, run, places.get(run.id)) for run in runs],
    }


def _site(state: Path, site: Site, now: float) -> dict[str, Any]:
    online = site.state == "active" and site.seen_at is not None and abs(now - site.seen_at) < ONLINE_S
    if site.state == "revoked":
        reason = f"{revoked_words(site)}: {site.revoked_reason}"
    elif site.state != "active" or online:
        reason = ""
    elif site.seen_at is None:
        reason = "has joined and never connected; is `fedclient start` running there?"
    elif site.seen_at > now:
        reason = "not heard of since this machine's clock was set back"
    else:
        reason = f"last heard of {now - site.seen_at:.0f} s ago"
    fingerprint = site.certificate_fingerprint
    certificates = list_certificates(state, site.name)
    return {
        "name": site.name,
        "state": site.state,
        "online": online,
        "reason": reason,
        "seen_at": site.seen_at,
        "joined_at": site.joined_at,
        "certificate_words": fingerprint_words(fingerprint) if fingerprint else None,
        "certificate_expires_at": certificates[-1].expires_at if certificates else None,
        "revoked_at": site.revoked_at,
        "revoked_reason": site.revoked_reason or None,
    }


def _run(federation: Federation, run: Run, place: int | None) -> dict[str, Any]:
    folder, told = RunFolder(federation.runs / run.id), run.message
    finished_rounds, rounds = None, None
    try:
        finished_rounds, rounds = read_state(folder).round, read_study(folder).rounds.count
    except FederationError as e:  # one damaged folder hides no other run
        told = str(e)
    hold = hold_of(folder) if run.state in ACTIVE else None
    return {
        "id": run.id,
        "study": run.study_name,
        "study_sha256": run.study_sha256,
        "state": run.state,
        "message": told,
        "finished_rounds": finished_rounds,
        "rounds": rounds,
        "queue": place,
        "pausing": None if hold is None else hold.after,
        "progress": read_progress(folder),
    }
