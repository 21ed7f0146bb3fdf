"""What a run and its sites say to each other: orders go out, replies are doubted as they come, no wait is without end.

Own loop on Flower's `Grid`: `Strategy.start` of Flower 1.41 begins at round 1 whatever was there, holds all replies in
a list, waits for missing nodes without bound, and ends the run on one malformed reply.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedserver.answers import shut_out, take
from fedserver.checkpoint import State
from fedserver.cohort import Presence
from fedserver.courier import Parcel
from fedserver.setting import MOST_REASON, Accept, Seat, Setting, Table, Waited, note, show
from shared_models.envelope import asked_of
from shared_models.errors import RoundPaused
from shared_models.update import Expected
from shared_models.wire import Order, write_order

MOST_ATTEMPTS = 6  # orders to one site in one round
LONGEST_S = 30 * 86400.0  # the longest deadline that a study may give
MOST_PAUSE_S = 2.0  # between two looks at what has arrived, however many are waited for
LATER_S, LONGEST_LATER_S = 15.0, 120.0  # from such a refusal to the next question; it doubles


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
    table.answers = {}
    asked: dict[str, Waited] = {}  # by the id of its message
    presence, looked_at = setting.presence(), setting.clock()
    while True:
        now = setting.clock()
        if now - looked_at >= setting.presence_s:
            presence, looked_at = setting.presence(), now
            shut_out(setting, seats)
        if how.grows:
            for newcomer in presence.sites:
                seats.setdefault(newcomer, Seat())
        for site, seat in seats.items():
            if site in presence.nodes and _is_due(seat, now, reask_s):
                mine = replace(tailored(site, order), counted=table.last.get(site, 0))
                asked |= _ask(setting, mine, parcel, expected, site, presence.nodes[site], seat, now, span_s)
            elif seat.state == "lost" and seat.attempt >= MOST_ATTEMPTS:
                _give_up(setting, order, site, seat)
            elif seat.state == "away":
                seat.reason = presence.away.get(site, "is not online")
        arrived = take(setting, table, asked, seats, accept)
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
            setting.sleep(setting.poll_s + min(MOST_PAUSE_S, setting.poll_each_s * (len(asked) + len(table.late))))
    for seat in (seats[waited.site] for waited in asked.values()):
        if seat.open:
            forged = f"; in its name came {seat.forged}" if seat.forged else ""
            seat.state, seat.reason = "late", f"did not answer within {how.span_s:.0f} s{forged}"[:MOST_REASON]
    table.late |= asked  # also second answers of a site that was counted: their blobs go
    show(setting, table, order.kind, order.round, deadline, always=True)


def _is_due(seat: Seat, now: float, reask_s: float) -> bool:
    """An order is due to a new site, to one that was lost, and again after a silence: a site that has the answer
    sends the same one, and only one is counted (Flower delivers at most once and loses replies with a process)."""
    if seat.attempt >= MOST_ATTEMPTS:
        return False
    if seat.state == "asked":
        return now - seat.asked_at >= reask_s * seat.attempt
    if seat.state == "pending":
        return now - seat.asked_at >= min(LONGEST_LATER_S, LATER_S * 2.0 ** min(seat.put_off - 1, 10))
    return seat.state in ("away", "lost")


def _give_up(setting: Setting, order: Order, site: str, seat: Seat) -> None:
    """Of a site that was asked as often as may be: its node went away each time, or others answer in its name."""
    if seat.forged is None:
        seat.state, seat.reason = "failed", f"its node went away {MOST_ATTEMPTS} times while working"
    else:
        seat.state, seat.reason = "rejected", seat.forged
        note(setting, "reply-rejected", order.run, round=order.round, site=site, why=seat.reason[:200])


def _ask(
    setting: Setting,
    order: Order,
    parcel: Parcel,
    expected: Expected,
    site: str,
    node: int,
    seat: Seat,
    now: float,
    ttl_s: float,
) -> dict[str, Waited]:
    order = replace(order, attempt=seat.attempt + 1, blob=parcel.blob, nonce=secrets.token_hex(16))
    if setting.records is not None:
        order = setting.records.ordered(site, order)
    message = write_order(order, node, parcel.tensors, ttl_s=max(600.0, 2 * ttl_s))
    ids = [i for i in setting.grid.push_messages([message]) if i]
    if not ids:
        seat.state, seat.reason = "lost", "the order could not be handed to its node"
        return {}
    seat.state, seat.reason, seat.attempt, seat.asked_at = "asked", "is working on it", seat.attempt + 1, now
    return {ids[0]: Waited(asked_of(order, site), expected)}


def _reasons(seats: Mapping[str, Seat]) -> str:
    return " ".join(f"{s}: {a.reason}." for s, a in sorted(seats.items()) if a.state != "counted")
