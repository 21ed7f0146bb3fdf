"""What a run works with, and what it keeps between its rounds: the words that rounds and their conversations share."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedserver.checkpoint import RunFolder, State, write_progress
from fedserver.cohort import Presence
from fedserver.courier import Courier
from fedserver.records import Records
from shared_models.envelope import Asked
from shared_models.roster import Roster
from shared_models.study import Study
from shared_models.update import Expected
from shared_models.weights import Arrays
from shared_models.wire import Proof, Reply

MOST_REASON = 500  # characters of a reason in files and on screens


def _first_weights(study: Study) -> Arrays:
    from shared_models.nets import initial_weights  # imports torch

    return initial_weights(study)


def _no_roster() -> Roster | None:
    return None


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that varies between a deployment, a simulation and a test.

    Attributes:
        bounded: False in a simulation, whose sites share a machine: how long one of them takes says nothing about a
            hospital, so that it is neither late nor asked again, and results do not follow from the machine's load.
        poll_s, poll_each_s: from a look at what has arrived, where nothing had, to the next; and so much more for each
            order that waits for an answer, for a look asks the SuperLink about each.
        sign: a statement, as the coordinator (purpose, content); None in a simulation, where nobody has a key.
        records: the coordinator's audit log, and whose signature an answer must bear; None in a simulation, where
            answers are bound to their orders and nobody has a key.
        revoked: sites that are shut out, with words for `status`; what they send is not counted.
        roster: the newest, by whose identities the sites of a secure sum know each other; a simulation makes its own.
    """

    grid: Grid
    folder: RunFolder
    presence: Callable[[], Presence]
    courier: Courier
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    poll_s: float = 0.1
    poll_each_s: float = 0.0
    presence_s: float = 1.0
    reask_s: float = 60.0
    bounded: bool = True
    first_weights: Callable[[Study], Arrays] = _first_weights
    sign: Callable[[str, bytes], Proof] | None = None
    records: Records | None = None
    revoked: Callable[[], Mapping[str, str]] = dict
    roster: Callable[[], Roster | None] = _no_roster


@dataclass(slots=True)
class Seat:
    """One site in one phase.

    `state` is away, asked, lost, pending, counted, refused, rejected, failed, late or revoked.

    Attributes:
        put_off: how often it has answered `LATER`.
        forged: what was wrong with the last message in its name that was no answer of it.
        accused: the site whose message it has refused, in a secure sum.
    """

    state: str = "away"
    reason: str = "is not online"
    attempt: int = 0
    asked_at: float = 0.0
    put_off: int = 0
    forged: str | None = None
    accused: str | None = None

    @property
    def open(self) -> bool:
        return self.state in ("asked", "lost")


@dataclass(frozen=True, slots=True)
class Waited:
    """An order whose answer may still come, and what an update for it must be."""

    asked: Asked
    expected: Expected

    @property
    def site(self) -> str:
        return self.asked.site


@dataclass(slots=True)
class Table:
    """What one run keeps between its rounds, in memory: nothing that a restart may not forget.

    Orders are given anew after it, with nonces of their own: an answer to one from before counts no more.

    Attributes:
        late: orders of earlier rounds by the id of their message.
        answers: site, or site and round of a late update -> SHA-256 of the envelope that was counted in this phase.
    """

    study: Study
    text: str  # of study.json, which the study is known by
    plan: str | None = None  # of plan.json
    proof: Proof | None = None  # of the plan
    study_proof: Proof | None = None
    seats: dict[str, Seat] = field(default_factory=dict)
    late: dict[str, Waited] = field(default_factory=dict)
    counted: set[tuple[str, int]] = field(default_factory=set)  # (site, round): an update counts once
    last: Mapping[str, int] = field(default_factory=dict)  # site -> round of its last update that was counted
    answers: dict[str, str] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    since: dict[str, tuple[str, float]] = field(default_factory=dict)  # site -> state, since the epoch
    shown_at: float = float("-inf")


Accept = Callable[[str, Reply, Message, Expected, bool], None]  # site, reply, message, what was asked, late?


def note(setting: Setting, event: str, run: str, **facts: Any) -> None:
    """A line of the coordinator's audit log."""
    if setting.records is not None:
        setting.records.add(event, run=run, **facts)


def signed_in(line: Mapping[str, Any]) -> Mapping[str, str]:
    """Envelopes of the updates that a round has counted, by label; from its line in metrics.jsonl."""
    return line.get("signed") or {label: row["signed"] for label, row in line["sites"].items() if "signed" in row}


def note_closed(setting: Setting, state: State, line: Mapping[str, Any]) -> None:
    """A finished round in the audit log, from the state that it ended with and its line in metrics.jsonl."""
    facts: dict[str, Any] = {"counted": list(state.cohort), "signed": signed_in(line), "weights": state.weights_sha256}
    if (together := line.get("together")) is not None:
        facts["attempt"] = together["attempt"]
    note(setting, "round-closed", state.run, round=state.round, **facts)


def show(setting: Setting, table: Table, phase: str, round_number: int, deadline: float, always: bool = False) -> None:
    """Writes progress.json, at most four times a second."""
    now = setting.clock()
    if not always and now - table.shown_at < 0.25:
        return
    table.shown_at = now
    count = table.study.rounds.count
    mean = sum(table.durations) / len(table.durations) if table.durations else None
    at_s = round(time.time(), 3)
    for site, seat in table.seats.items():
        if table.since.get(site, ("", 0.0))[0] != seat.state:
            table.since[site] = seat.state, at_s
    write_progress(
        setting.folder,
        {
            "phase": phase,
            "round": round_number,
            "rounds": count,
            "quorum": table.study.rounds.quorum,
            "updated_at": at_s,
            "deadline_in_s": round(max(0.0, deadline - now), 1),
            "left_s": None if mean is None else round(mean * (count - round_number + 1), 1),
            "sites": {
                site: {"state": a.state, "reason": a.reason, "attempt": a.attempt, "since": table.since[site][1]}
                for site, a in table.seats.items()
            },
        },
    )
