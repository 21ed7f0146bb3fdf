"""The rounds of a run: who is asked, what is counted, when a round ends, and what is told meanwhile.

Own loop on Flower's `Grid`: `Strategy.start` of Flower 1.41 begins at round 1 whatever was there, holds all replies in
a list, waits for missing nodes without bound, and ends the run on one malformed reply.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedserver.aggregation import fold
from fedserver.checkpoint import (
    RunFolder,
    State,
    adopt_plan,
    check_weights,
    finish_round,
    forget_unfinished,
    read_plan,
    read_state,
    read_study,
    schema_on_disk,
    write_progress,
)
from fedserver.cohort import Presence, choose
from fedserver.courier import Courier, Parcel
from fedserver.optimizers import optimizer_of
from fedserver.records import Records
from shared_models import study as study_file
from shared_models.drift import Profile, reference
from shared_models.drift import doubted as doubted_profile
from shared_models.errors import FederationError, RoundPaused, StateInvalid, UpdateRejected, WeightsInvalid
from shared_models.files import append_json, canonical_json, read_lines, write_atomic, write_json
from shared_models.parse import parse_json, plain
from shared_models.plan import Fingerprint, Plan, derive, doubted
from shared_models.plan import total as merged
from shared_models.planned import PURPOSE, constraints, planned, statement
from shared_models.scores import Score, doubted_scores, row_of
from shared_models.scores import total as scored_together
from shared_models.study import Study
from shared_models.update import Expected, Update, admit
from shared_models.weights import Arrays, Schema, size_bytes
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


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that varies between a deployment, a simulation and a test.

    Attributes:
        bounded: False in a simulation, whose sites share a machine: how long one of them takes says nothing about a
            hospital, so that it is neither late nor asked again, and results do not follow from the machine's load.
        sign: a statement, as the coordinator (purpose, content); None in a simulation, where nobody has a key.
        records: the coordinator's audit log; None in a simulation.
        revoked: sites that are shut out, with words for `status`; what they send is not counted.
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


@dataclass(slots=True)
class Seat:
    """One site in one phase.

    `state` is away, asked, lost, pending, counted, refused, rejected, failed, late or revoked.
    """

    state: str = "away"
    reason: str = "is not online"
    attempt: int = 0
    asked_at: float = 0.0
    put_off: int = 0  # times that it answered `LATER`

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
    shown_at: float = float("-inf")


Accept = Callable[[str, Reply, Message, Expected, bool], None]  # site, reply, message, what was asked, late?


def carry_out(setting: Setting) -> State:
    """Runs every round that is still to do, then the final evaluation; returns the last state.

    Raises:
        RoundPaused: the quorum was missing for longer than `rounds.pause_s`; the same run can be carried on later.
    """
    folder = setting.folder
    state = read_state(folder)
    study = read_study(folder)
    forget_unfinished(folder, state)
    table = Table(study, (folder.path / "study.json").read_text(), last=state.counted)
    if setting.sign is not None:
        table.study_proof = setting.sign(study_file.SIGNED, study_file.statement(state.run, state.study_sha256))
        write_json(folder.path / "study-proof.json", plain(table.study_proof))
    _note(setting, "run-opened", state.run, round=state.round, study=state.study_sha256)
    if study.plan == "federated" and state.plan_sha256 is None:
        state = statistics(setting, table, state)
    check_weights(folder, state)
    table.plan = read_plan(folder, state)
    if state.plan_sha256 is not None and setting.sign is not None:
        table.proof = setting.sign(PURPOSE, statement(state.run, state.study_sha256, state.plan_sha256))
        write_json(folder.path / "plan-proof.json", plain(table.proof))
    schema = schema_on_disk(folder, state.round)
    while state.round < study.rounds.count:
        began = setting.clock()
        state = one_round(setting, table, state, schema)
        table.durations.append(setting.clock() - began)
    final_evaluation(setting, table, state, schema)
    show(setting, table, "finished", state.round, 0.0, always=True)
    _note(setting, "run-finished", state.run, round=state.round, weights=state.weights_sha256)
    return state


def _note(setting: Setting, event: str, run: str, **facts: Any) -> None:
    """A line of the coordinator's audit log."""
    if setting.records is not None:
        setting.records.add(event, run=run, **facts)


def statistics(setting: Setting, table: Table, state: State) -> State:
    """Asks every site for its fingerprint and derives the plan of the run from their sum; a quorum of sites decides.

    Counted once, whoever answers late or joins later trains by the same plan.

    Raises:
        StudyInvalid: the memory that the study allows is too small for any plan.
    """
    study, parts = table.study, dict[str, Fingerprint]()

    def add(site: str, reply: Reply, message: Message, asked: Expected, late: bool) -> None:
        if reply.kind != "statistics" or reply.fingerprint is None:
            raise UpdateRejected("MESSAGE_INVALID", f"site {site!r}: answered statistics with {reply.kind!r}.")
        if (reply.run, reply.study_sha256) != (asked.run, asked.study_sha256):
            raise UpdateRejected("OTHER_STUDY", f"site {site!r}: counted for another study or run. Ask it again.")
        parts[site] = doubted(reply.fingerprint, site, study.modality == "ct", len(study.task.labels))

    expected = Expected(state.run, 0, state.study_sha256, state.weights_sha256, {})
    order, cohort = _order("statistics", table, state, 0), gather(setting, table, state).sites
    converse(setting, table, order, Parcel(None, None), cohort, expected, add, study.rounds.quorum)
    whole = merged(parts.values())
    plan = derive(whole, constraints(study))
    adopted = adopt_plan(setting.folder, state, plan, whole, tuple(sorted(parts)), setting.first_weights)
    _note(setting, "plan-made", state.run, plan=adopted.plan_sha256, sites=sorted(parts))
    return adopted


def one_round(setting: Setting, table: Table, state: State, schema: Schema) -> State:
    """Opens, collects and closes round `state.round + 1`."""
    study, number = table.study, state.round + 1
    updates, lines, late_rounds = fold(study, number, schema, setting.folder.spool), dict[str, Any](), dict[str, int]()
    score = bool(study.evaluate.every) and state.round > 0 and state.round % study.evaluate.every == 0
    order = _order("train", table, state, number, "val" if score else None)
    digests = (state.study_sha256, state.weights_sha256)
    private = study.protect.privacy is not None
    expected = Expected(state.run, number, *digests, schema, plan_sha256=state.plan_sha256, private=private)
    cohort = choose(study, number, gather(setting, table, state))
    parcel = setting.courier.publish(setting.folder.weights(state.round), state.weights_sha256)

    def count(site: str, reply: Reply, message: Message, asked: Expected, late: bool) -> None:
        if reply.kind != "update":
            raise UpdateRejected("MESSAGE_INVALID", f"round {number}, site {site!r}: answered with {reply.kind!r}.")
        _check_scores(study, site, reply)
        delta = setting.courier.collect(site, reply, message)
        admit(_update(site, reply, delta), asked)
        try:
            if not updates.add(site, asked.round, delta, reply):
                return
        except (WeightsInvalid, ValueError) as e:  # half of it may be in the sum: the round begins again
            raise StateInvalid(
                f"round {number}: the sum was spoilt ({e}). It begins again from the last weights."
            ) from e
        if updates.one_vote:
            lines.pop(f"{site} (round {late_rounds.pop(site, 0)})", None)
        if late:
            late_rounds[site] = max(asked.round, late_rounds.get(site, 0))
        lines[site if not late else f"{site} (round {asked.round})"] = _line(reply)

    began = setting.clock()
    converse(setting, table, order, parcel, cohort, expected, count, study.rounds.quorum)
    scores = {site: line["scores"] for site, line in lines.items() if line["scores"]}
    line = {
        "seconds": round(setting.clock() - began, 3),
        "sites": lines,
        "left_out": {s: {"state": a.state, "reason": a.reason} for s, a in table.seats.items() if a.state != "counted"},
        "scored_round": state.round if scores else None,
        "bytes_down": size_bytes(schema) * len(cohort),
        "bytes_up": size_bytes(schema) * len(lines),
    }
    counted = tuple(sorted(s for s, a in table.seats.items() if a.state == "counted"))
    if (used := updates.used()) is not None:
        line["used"] = used
    done = finish_round(setting.folder, state, updates, optimizer_of(study.strategy), counted, line, late_rounds)
    table.last = done.counted
    setting.courier.retire(state.weights_sha256)
    _note(setting, "round-closed", state.run, round=number, counted=list(counted), weights=done.weights_sha256)
    return done


def final_evaluation(setting: Setting, table: Table, state: State, schema: Schema) -> None:
    """Scores the last weights at every site, on its own test patients, and adds the line to metrics.jsonl, once."""
    study = table.study
    if not study.evaluate.every or any(line.get("final") for line in read_lines(setting.folder.metrics)):
        return
    replies: dict[str, Reply] = {}
    profiles: dict[str, Profile] = {}

    def keep(site: str, reply: Reply, message: Message, asked: Expected, late: bool) -> None:
        if reply.kind != "evaluation" or late:
            raise UpdateRejected("MESSAGE_INVALID", f"site {site!r}: answered an evaluation with {reply.kind!r}.")
        _check_scores(study, site, reply)
        replies[site] = reply

        if reply.profile is not None:
            profiles[site] = doubted_profile(reply.profile, _trained(study, table.plan), site)

    expected = Expected(state.run, state.round, state.study_sha256, state.weights_sha256, schema)
    order = _order("evaluate", table, state, state.round, "test")
    parcel = setting.courier.publish(setting.folder.weights(state.round), state.weights_sha256)
    converse(setting, table, order, parcel, setting.presence().sites, expected, keep, quorum=1)
    setting.courier.retire(state.weights_sha256)
    if profiles:
        write_atomic(setting.folder.reference, canonical_json(reference(list(profiles.values()))))
    whole = {name: _together(name, replies.values()) for name in study.task.answers}
    append_json(
        setting.folder.metrics,
        {
            "round": state.round,
            "final": True,
            "scored_round": state.round,
            "sites": {site: _rows(r) for site, r in sorted(replies.items())},
            "federation": {name: None if score is None else row_of(score) for name, score in whole.items()},
            "left_out": {s: {"state": a.state, "reason": a.reason} for s, a in table.seats.items() if s not in replies},
        },
    )


def _trained(study: Study, plan: str | None) -> Study:
    """The study with the plan in it that its sites have made."""
    return study if plan is None else planned(study, parse_json(Plan, plan, "plan"))


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
) -> None:
    """Asks every site of `cohort` and takes replies as they arrive, until all have settled or the deadline has passed.

    A site that is online as the phase opens, or is asked since, is waited for until the deadline; one that is away, or
    joins the federation meanwhile (unless the cohort is a part of it), is asked as soon as it appears. With fewer
    accepted replies than `quorum` the phase stays open, shown as paused, for `rounds.pause_s` more.

    Raises:
        RoundPaused: the quorum is still missing then, or everybody has settled and it cannot be reached.
    """
    rounds = table.study.rounds
    began, span_s = setting.clock(), rounds.deadline_s if setting.bounded else LONGEST_S
    deadline, give_up = began + span_s, began + span_s + rounds.pause_s
    reask_s = max(setting.reask_s, span_s / 4)
    seats = table.seats = {site: Seat() for site in cohort}
    asked: dict[str, str] = {}  # message id -> site
    presence, looked_at = setting.presence(), setting.clock()
    while True:
        now = setting.clock()
        if now - looked_at >= setting.presence_s:
            presence, looked_at = setting.presence(), now
            _shut_out(setting, seats)
        if rounds.cohort == 1.0:
            for newcomer in presence.sites:
                seats.setdefault(newcomer, Seat())
        for site, seat in seats.items():
            if site in presence.nodes and _is_due(seat, now, reask_s):
                mine = replace(order, counted=table.last.get(site, 0))
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
        show(setting, table, "paused" if now >= deadline or idle else order.kind, order.round, deadline)
        if not arrived:
            setting.sleep(setting.poll_s)
    for message_id, site in asked.items():
        if seats[site].open:
            seats[site].state, seats[site].reason = "late", f"did not answer within {rounds.deadline_s:.0f} s"
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
            _note(setting, f"reply-{seat.state}", expected.run, round=expected.round, site=site, why=seat.reason[:200])


def _put_off(seat: Seat, reply: Reply) -> None:
    """Asked again in a while, as if for the first time: a hospital may take days to decide."""
    seat.state, seat.reason = "pending", LATER[reply.refusal or ""]
    seat.attempt, seat.put_off = 0, seat.put_off + 1


def _refused(seat: Seat, reply: Reply) -> None:
    keys = f" ({', '.join(reply.refusal_keys)})" if reply.refusal_keys else ""
    seat.state, seat.reason = "refused", f"{reply.refusal or 'REFUSED'}{keys}"


def _check_scores(study: Study, site: str, reply: Reply) -> None:
    """Scores go into files and reports by the names of their labels; only the study's own may, and counts of its task
    that add up with those of other sites."""
    if strange := {*reply.scores, *reply.own_scores} - set(study.task.answers):
        raise UpdateRejected(
            "OTHER_LABELS", f"site {site!r}: scores {len(strange)} labels that the study does not have."
        )
    for score in (*reply.scores.values(), *reply.own_scores.values()):
        doubted_scores(score, study.task, site)


def _together(name: str, replies: Iterable[Reply]) -> Score | None:
    """The counts of all sites for one label."""
    return scored_together(reply.scores[name] for reply in replies if name in reply.scores)


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
            _note(setting, "reply-counted", was_asked.run, round=was_asked.round, site=site, why="late")
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
    write_progress(
        setting.folder,
        {
            "phase": phase,
            "round": round_number,
            "rounds": count,
            "quorum": table.study.rounds.quorum,
            "updated_at": round(time.time(), 3),
            "deadline_in_s": round(max(0.0, deadline - now), 1),
            "left_s": None if mean is None else round(mean * (count - round_number + 1), 1),
            "sites": {s: {"state": a.state, "reason": a.reason, "attempt": a.attempt} for s, a in table.seats.items()},
        },
    )


def _order(kind: Any, table: Table, state: State, round_number: int, evaluate: Any = None) -> Order:
    digests = (state.study_sha256, state.weights_sha256)
    order = Order(kind, state.run, round_number, 1, table.text, *digests, evaluate)
    return replace(
        order, plan=table.plan, plan_sha256=state.plan_sha256, plan_proof=table.proof, study_proof=table.study_proof
    )


def _update(site: str, reply: Reply, delta: Any) -> Update:
    known = (reply.run, reply.round, reply.study_sha256, reply.base_sha256)
    return Update(site, *known, delta, reply.examples, reply.plan_sha256)


def _line(reply: Reply) -> dict[str, Any]:
    return {
        "examples": reply.examples,
        "steps": reply.steps,
        "seconds": round(reply.seconds, 3),
        "losses": list(reply.losses),
        "attempt": reply.attempt,
        "device": reply.device,
        **_rows(reply),
    }


def _rows(reply: Reply) -> dict[str, Any]:
    """Scores of the received weights, and of the site's own model where it has one."""
    kinds = {"scores": reply.scores} | ({"personalised": reply.own_scores} if reply.own_scores else {})
    return {kind: {label: row_of(c) for label, c in sorted(of.items())} for kind, of in kinds.items()}


def _code(reason: str | None) -> str:
    """The upper-case code of an error that our client sent; other words stay out of status files."""
    first = (reason or "").split(" ", 1)[0]
    return first if first.isupper() and len(first) <= 40 else "CLIENT_ERROR"


def _reasons(seats: Mapping[str, Seat]) -> str:
    return " ".join(f"{s}: {a.reason}." for s, a in sorted(seats.items()) if a.state != "counted")
