"""What a run and its sites say to each other: orders go out, replies are doubted as they come, no wait is without end.

Own loop on Flower's `Grid`: `Strategy.start` of Flower 1.41 begins at round 1 whatever was there, holds all replies in
a list, waits for missing nodes without bound, and ends the run on one malformed reply.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedserver.checkpoint import RunFolder, State, write_progress
from fedserver.cohort import Presence
from fedserver.courier import Courier, Parcel
from fedserver.records import Records
from shared_models.errors import FederationError, RoundPaused, UpdateRejected, WeightsInvalid
from shared_models.roster import Roster
from shared_models.study import Study
from shared_models.update import Expected
from shared_models.weights import Arrays
from shared_models.wire import MessageInvalid, Order, Proof, Reply, read_reply, write_order

log = logging.getLogger("fedserver")
MOST_REASON = 500  # characters of a reason in files and on screens
MOST_ATTEMPTS = 6  # orders to one site in one round
LONGEST_S = 30 * 86400.0  # the longest deadline that a study may give
LATER = {  # refusals that are no last word: the round does without the site, and asks it again
    "APPROVAL_PENDING": "awaits approval at the site",
    "OUTSIDE_HOURS": "its hospital computes at other hours",
}
LATER_S, LONGEST_LATER_S = 15.0, 120.0  # from such a refusal to the next question; it doubles
LOST = frozenset({3, 4, 5, 8})  # Flower's error codes of a node or app that went away, not of one that said no


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
        sign: a statement, as the coordinator (purpose, content); None in a simulation, where nobody has a key.
        records: the coordinator's audit log; None in a simulation.
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
    presence_s: float = 1.0
    reask_s: float = 60.0
    bounded: bool = True
    first_weights: Callable[[Study], Arrays] = _first_weights
    sign: Callable[[str, bytes], Proof] | None = None
    records: Records | None = None
    revoked: Callable[[], Mapping[str, str]] = dict
    roster: Callable[[], Roster | None] = _no_roster


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a phase waits, and whom for.

    Attributes:
        span_s: from its orders to its end; who has not answered by then is late.
        pause_s: longest pause after that for want of a quorum.
        grows: a site that comes meanwhile is asked too.
        reask_s: from an order that got no answer to the next; None as the setting says.
    """

    span_s: float
    pause_s: float
    grows: bool = True
    reask_s: float | None = None


@dataclass(slots=True)
class Seat:
    """One site in one phase.

    `state` is away, asked, lost, pending, counted, refused, rejected, failed, late or revoked.

    Attributes:
        put_off: how often it has answered `LATER`.
        accused: the site whose message it has refused, in a secure sum.
    """

    state: str = "away"
    reason: str = "is not online"
    attempt: int = 0
    asked_at: float = 0.0
    put_off: int = 0
    accused: str | None = None

    @property
    def open(self) -> bool:
        return self.state in ("asked", "lost")


@dataclass(slots=True)
class Table:
    """What one run keeps between its rounds, in memory: nothing that a restart may not forget."""

    study: Study
    text: str  # of study.json, which the study is known by
    plan: str | None = None  # of plan.json
    proof: Proof | None = None  # of the plan
    study_proof: Proof | None = None
    seats: dict[str, Seat] = field(default_factory=dict)
    late: dict[str, tuple[str, Expected]] = field(default_factory=dict)  # message id -> site, what it was asked
    counted: set[tuple[str, int]] = field(default_factory=set)  # (site, round): an update counts once
    last: Mapping[str, int] = field(default_factory=dict)  # site -> round of its last update that was counted
    durations: list[float] = field(default_factory=list)
    since: dict[str, tuple[str, float]] = field(default_factory=dict)  # site -> state, since the epoch
    shown_at: float = float("-inf")


Accept = Callable[[str, Reply, Message, Expected, bool], None]  # site, reply, message, what was asked, late?


def note(setting: Setting, event: str, run: str, **facts: Any) -> None:
    """A line of the coordinator's audit log."""
    if setting.records is not None:
        setting.records.add(event, run=run, **facts)


def order_of(kind: Any, table: Table, state: State, round_number: int, evaluate: Any = None) -> Order:
    digests = (state.study_sha256, state.weights_sha256)
    order = Order(kind, state.run, round_number, 1, table.text, *digests, evaluate)
    return replace(
        order, plan=table.plan, plan_sha256=state.plan_sha256, plan_proof=table.proof, study_proof=table.study_proof
    )


def gather(setting: Setting, table: Table, state: State) -> Presence:
    """Waits, at most `rounds.gather_s`, for the sites of the last round (in the first: for all that are enrolled)."""
    until = setting.clock() + table.study.rounds.gather_s
    while True:
        presence = setting.presence()
        wanted = [site for site in state.cohort or presence.sites if site in presence.sites]
        missing = [site for site in wanted if site not in presence.nodes]
        if (not missing and presence.nodes) or setting.clock() >= until:
            return presence
        table.seats = {s: Seat("away", presence.away.get(s, "is not online")) for s in missing}
        show(setting, table, "gathering", state.round + 1, until)
        setting.sleep(setting.poll_s)


def converse(
    setting: Setting,
    table: Table,
    order: Order,
    parcel: Parcel,
    cohort: tuple[str, ...],
    expected: Expected,
    accept: Accept,
    quorum: int,
    patience: Patience | None = None,
    tailored: Callable[[str, Order], Order] = lambda site, order: order,
) -> None:
    """Asks every site of `cohort` and takes replies as they arrive, until all have settled or the deadline has passed.

    A site that is online as the phase opens, or is asked since, is waited for until the deadline; one that is away, or
    joins the federation meanwhile (unless the cohort is a part of it), is asked as soon as it appears. With fewer
    accepted replies than `quorum` the phase stays open, shown as paused, for `rounds.pause_s` more.

    Args:
        patience: as the study's `[rounds]` says, unless given.
        tailored: the order as one site gets it.

    Raises:
        RoundPaused: the quorum is still missing then, or everybody has settled and it cannot be reached.
    """
    rounds = table.study.rounds
    how = patience or Patience(rounds.deadline_s, rounds.pause_s, rounds.cohort == 1.0)
    began, span_s = setting.clock(), how.span_s if setting.bounded else LONGEST_S
    deadline, give_up = began + span_s, began + span_s + how.pause_s
    reask_s = how.reask_s or max(setting.reask_s, span_s / 4)
    seats = table.seats = {site: Seat() for site in cohort}
    table.since = {site: was for site, was in table.since.items() if was[0] != "asked"}  # for something else
    asked: dict[str, str] = {}  # message id -> site
    presence, looked_at = setting.presence(), setting.clock()
    while True:
        now = setting.clock()
        if now - looked_at >= setting.presence_s:
            presence, looked_at = setting.presence(), now
            _shut_out(setting, seats)
        if how.grows:
            for newcomer in presence.sites:
                seats.setdefault(newcomer, Seat())
        for site, seat in seats.items():
            if site in presence.nodes and _is_due(seat, now, reask_s):
                mine = replace(tailored(site, order), counted=table.last.get(site, 0))
                asked |= _ask(setting, mine, parcel, site, presence.nodes[site], seat, now, span_s)
            elif seat.state == "lost" and seat.attempt >= MOST_ATTEMPTS:
                seat.state, seat.reason = "failed", f"its node went away {MOST_ATTEMPTS} times while working"
            elif seat.state == "away":
                seat.reason = presence.away.get(site, "is not online")
        arrived = _take(setting, table, asked, seats, accept, expected)
        answered = sum(seat.state == "counted" for seat in seats.values())
        now, waiting = setting.clock(), [s for s, seat in seats.items() if seat.open]
        if answered >= quorum and (not waiting or now >= deadline):
            break
        idle = not waiting and all(seat.state not in ("away", "pending") for seat in seats.values())
        if arrived and now >= deadline:
            continue  # a pull may have taken long: look once more before anybody is called late
        if now >= give_up or (idle and len(seats) >= quorum):
            raise RoundPaused(
                f"round {order.round}: {answered} of {quorum} sites needed have answered after "
                f"{now - began:.0f} s. {_reasons(seats)} Mend that, or wait for them, and run the study again."
            )
        paused = now >= deadline or idle
        show(setting, table, "paused" if paused else order.kind, order.round, give_up if paused else deadline)
        if not arrived:
            setting.sleep(setting.poll_s)
    for message_id, site in asked.items():
        if seats[site].open:
            seats[site].state, seats[site].reason = "late", f"did not answer within {how.span_s:.0f} s"
        table.late[message_id] = (site, expected)  # also second answers of a site that was counted: their blobs go
    show(setting, table, order.kind, order.round, deadline, always=True)


def _shut_out(setting: Setting, seats: Mapping[str, Seat]) -> Mapping[str, str]:
    """Takes their seats from the sites that are revoked: they are not waited for, nor is what they send counted."""
    revoked = setting.revoked()
    for site, words in revoked.items():
        if site in seats and seats[site].state != "counted":
            seats[site].state, seats[site].reason = "revoked", words
    return revoked


def _is_due(seat: Seat, now: float, reask_s: float) -> bool:
    """An order is due to a new site, to one that was lost, and again after a silence: a site that has the answer
    sends the same one, and only one is counted (Flower delivers at most once and loses replies with a process)."""
    if seat.attempt >= MOST_ATTEMPTS:
        return False
    if seat.state == "asked":
        return now - seat.asked_at >= reask_s * seat.attempt
    if seat.state == "pending":
        return now - seat.asked_at >= min(LONGEST_LATER_S, LATER_S * 2.0 ** (seat.put_off - 1))
    return seat.state in ("away", "lost")


def _ask(
    setting: Setting, order: Order, parcel: Parcel, site: str, node: int, seat: Seat, now: float, ttl_s: float
) -> dict[str, str]:
    order = replace(order, attempt=seat.attempt + 1, blob=parcel.blob)
    if setting.records is not None:
        order = setting.records.ordered(site, order)
    message = write_order(order, node, parcel.tensors, ttl_s=max(600.0, 2 * ttl_s))
    ids = [i for i in setting.grid.push_messages([message]) if i]
    if not ids:
        seat.state, seat.reason = "lost", "the order could not be handed to its node"
        return {}
    seat.state, seat.reason, seat.attempt, seat.asked_at = "asked", "is working on it", seat.attempt + 1, now
    return {ids[0]: site}


def _take(
    setting: Setting,
    table: Table,
    asked: dict[str, str],
    seats: dict[str, Seat],
    accept: Accept,
    expected: Expected,
) -> bool:
    """Pulls what has arrived and settles its seats; true when there was anything."""
    pending = [*asked, *table.late]
    arrived = False
    for ids in [[i] for i in pending] if setting.courier.one_by_one else [pending] if pending else []:
        messages, unreadable = _pull(setting, ids)
        arrived = arrived or bool(messages or unreadable)
        revoked = _shut_out(setting, seats) if messages else {}
        for message_id in unreadable:
            table.late.pop(message_id, None)
            if message_id in asked:
                seat = seats[asked.pop(message_id)]
                if seat.open:
                    seat.state, seat.reason = "rejected", "MESSAGE_UNREADABLE: its reply is no message of Flower"
        for message in messages:
            message_id = message.metadata.reply_to_message_id
            if message_id in table.late:
                site, was_asked = table.late.pop(message_id)
                if site in revoked:
                    _forget(setting, site, message)
                    continue
                _take_late(setting, table, site, message, was_asked, accept)
            elif message_id in asked:
                site = asked.pop(message_id)
                _settle(setting, site, seats[site], message, accept, expected)
                if seats[site].state == "counted":
                    table.counted.add((site, expected.round))
    return arrived


def _pull(setting: Setting, ids: list[str]) -> tuple[list[Message], list[str]]:
    """Replies that are there, and the orders whose reply cannot even be read: Flower raises what its parser raises."""
    try:
        return list(setting.grid.pull_messages(ids)), []
    except (httpx.HTTPError, OSError, MemoryError):
        raise  # not the doing of one site
    except Exception:
        log.exception("a reply could not be read")
        if len(ids) == 1:
            return [], ids
        parts = [_pull(setting, [i]) for i in ids]
        return [m for part, _ in parts for m in part], [i for _, part in parts for i in part]


def _settle(setting: Setting, site: str, seat: Seat, message: Message, accept: Accept, expected: Expected) -> None:
    """One reply: counted, or left out with its reason; nothing that a site sends ends the run."""
    if seat.state in ("counted", "revoked"):  # an answer to an order that was given twice, or of a site shut out
        _forget(setting, site, message)
        return
    if message.has_error():
        if message.error.code in LOST:
            seat.state, seat.reason = "lost", "its node went away while working"
        else:
            seat.state, seat.reason = "failed", _code(message.error.reason)
        return
    where, reply = f"site {site!r}", None
    try:
        reply = read_reply(message, where)
        if reply.site != site:
            raise UpdateRejected("OTHER_SITE", f"{where}: the reply calls itself {reply.site!r}. It was left out.")
        if setting.records is not None:
            setting.records.heard(site, reply)
        if reply.kind == "refusal":
            _put_off(seat, reply) if reply.refusal in LATER else _refused(seat, reply)
            return
        accept(site, reply, message, expected, False)
        seat.state, seat.reason = "counted", ""
    except (UpdateRejected, WeightsInvalid, MessageInvalid) as e:
        seat.state, seat.reason = "rejected", f"{getattr(e, 'code', 'MESSAGE_INVALID')}: {e}"[:MOST_REASON]
    except (FederationError, OSError, MemoryError):
        raise  # ours to mend, not the site's
    except Exception:  # a gap in our doubt: this site is left out, and the log says where the gap is
        log.exception("%s: its reply could not be used", where)
        seat.state, seat.reason = "rejected", "MESSAGE_INVALID: its reply could not be used"
    finally:
        if reply is not None:
            setting.courier.drop(site, reply)
        if seat.state != "lost":
            note(setting, f"reply-{seat.state}", expected.run, round=expected.round, site=site, why=seat.reason[:200])


def _put_off(seat: Seat, reply: Reply) -> None:
    """Asked again in a while, as if for the first time: a hospital may take days to decide."""
    seat.state, seat.reason = "pending", LATER[reply.refusal or ""]
    seat.attempt, seat.put_off = 0, seat.put_off + 1


def _refused(seat: Seat, reply: Reply) -> None:
    keys = f" ({', '.join(reply.refusal_keys)})" if reply.refusal_keys else ""
    about = f" (from {reply.accused})" if reply.accused else ""
    seat.state, seat.reason, seat.accused = "refused", f"{reply.refusal or 'REFUSED'}{keys}{about}", reply.accused


def _forget(setting: Setting, site: str, message: Message) -> None:
    """Lets go of what a reply that is not looked at has sent: a site may have few uploads waiting."""
    with suppress(MessageInvalid):
        if not message.has_error():
            setting.courier.drop(site, read_reply(message, f"site {site!r}"))


def _take_late(
    setting: Setting, table: Table, site: str, message: Message, was_asked: Expected, accept: Accept
) -> None:
    """A reply to an order of an earlier round: counted at its staleness weight, or dropped, as the study says."""
    if message.has_error():
        return
    reply = None
    try:
        reply = read_reply(message, f"site {site!r}")
        if setting.records is not None and reply.site == site:
            setting.records.heard(site, reply)
        fresh = (site, was_asked.round) not in table.counted
        if table.study.rounds.late == "next" and fresh and reply.site == site and reply.kind == "update":
            accept(site, reply, message, was_asked, True)
            table.counted.add((site, was_asked.round))
            note(setting, "reply-counted", was_asked.run, round=was_asked.round, site=site, why="late")
    except FederationError as e:
        seat = table.seats.setdefault(site, Seat())
        seat.reason = f"{seat.reason}; its late update was left out: {e}"
    finally:
        if reply is not None:
            setting.courier.drop(site, reply)


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


def _code(reason: str | None) -> str:
    """The upper-case code of an error that our client sent; other words stay out of status files."""
    first = (reason or "").split(" ", 1)[0]
    return first if first.isupper() and len(first) <= 40 else "CLIENT_ERROR"


def _reasons(seats: Mapping[str, Seat]) -> str:
    return " ".join(f"{s}: {a.reason}." for s, a in sorted(seats.items()) if a.state != "counted")
