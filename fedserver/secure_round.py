"""A round whose updates the coordinator never sees: it asks the sites through a secure sum, and steps by the sum.

    train -> (who is ready is the cohort) -> advertise -> share -> mask -> confirm -> unmask -> step

Until the survivors are told, a sum that fails is begun anew: another attempt, another context, from the updates that
the sites have kept. From then on it is ended and never repeated, because sites add no update to two sums: what is
needed to end it is on disk first, so that a coordinator that is killed goes on with the same sum, and one that waits
may wait.

    runs/ID/sum/attempt.json   round and number of the last attempt, written before its orders
    runs/ID/sum/signed.json    who has signed which vector, by the envelopes
    runs/ID/sum/vector.bin     the sum of the masked vectors, once all are there
    runs/ID/sum/sum.json       keys and names that end it; written after the vector
    runs/ID/sum/confirmations.json   who has confirmed the survivors; written before shares are asked for
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedserver.calibration import calibration
from fedserver.checkpoint import RunFolder, State, finish_round
from fedserver.cohort import choose
from fedserver.conversation import Patience, converse, gather, order_of
from fedserver.courier import Parcel
from fedserver.optimizers import optimizer_of
from fedserver.secagg import Gathered, SecureSum, SecureTotal
from fedserver.setting import Seat, Setting, Table, note, note_closed
from shared_models.errors import RoundPaused, StateInvalid, SumAborted, UpdateRejected
from shared_models.files import (
    append_json,
    canonical_json,
    private_folder,
    read_json,
    replacing,
    write_atomic,
    write_json,
)
from shared_models.parse import parse_json, plain
from shared_models.plan import Fingerprint, doubted
from shared_models.protect.context import Context
from shared_models.protect.counted import Told, told_in
from shared_models.protect.counted_plan import fingerprint_in
from shared_models.protect.messages import Confirmations, Inbox
from shared_models.protect.prg import CHUNK
from shared_models.protect.ring import MOST_SITES, Layout, bytes_of
from shared_models.protect.secure import SecureAggregation, layout_of, round_of, training_s, wanted
from shared_models.roster import Roster
from shared_models.scores import row_of
from shared_models.seeds import rng
from shared_models.study import Study
from shared_models.update import Expected
from shared_models.weights import Schema, size_bytes
from shared_models.wire import STEPS, Order, Reply

BELIEVED = 2  # sites that accuse the same one
MOST_TRIES = 5  # attempts of one round, one after the other, before it is paused
log = logging.getLogger("fedserver")


@dataclass(slots=True)
class Sum:
    """One secure sum under way.

    Attributes:
        order: what the sites carried out for it, `train`, `evaluate` or `statistics`.
        schema: of the update; empty where scores or histograms alone are summed.
        left_out: sites that are not in the sum, with the state and reason of their last answer.
        failing: the same of sites that answered a step of a failed attempt with something else, or are said by others
            to have dealt false shares; the next attempts do without them, where enough are left.
    """

    setting: Setting
    table: Table
    state: State
    order: Order
    schema: Schema
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    failing: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def study(self) -> Study:
        return self.table.study

    @property
    def secure(self) -> SecureAggregation:
        table = self.study.protect.secure_aggregation
        assert table is not None
        return table

    @property
    def trained(self) -> bool:
        return self.order.kind == "train"

    @property
    def scored(self) -> bool:
        return self.order.evaluate is not None

    @property
    def layout(self) -> Layout:
        return layout_of(self.study, self.schema, self.trained, self.scored, self.order.kind == "statistics")

    @property
    def expected(self) -> Expected:
        return Expected(self.state.run, self.order.round, self.state.study_sha256, self.state.weights_sha256, {})

    @property
    def number(self) -> int:
        """Of the sum: the round's, and of the last scores one more; 0 before there is a plan."""
        return round_of(self.order.kind, self.order.round)


def secure_round(setting: Setting, table: Table, state: State, schema: Schema) -> State:
    """Opens, collects and closes round `state.round + 1`.

    Raises:
        RoundPaused: too few sites; the same run can be carried on later.
        SumAborted: a sum that cannot be ended nor repeated.
    """
    study, number, began = table.study, state.round + 1, setting.clock()
    score = bool(study.evaluate.every) and state.round > 0 and state.round % study.evaluate.every == 0
    order = order_of("train", table, state, number, "val" if score else None)
    making = Sum(setting, table, state, order, schema)
    total = made(making)
    told, seats, signed = _told(making, total), set(total.sites), _signed(making, total)
    line = {
        "seconds": round(setting.clock() - began, 3),
        "sites": {},  # nothing is known of any by itself
        "together": _together(making, total, told),
        **({"signed": signed} if signed else {}),
        "left_out": {site: why for site, why in making.left_out.items() if site not in seats},
        "scored_round": state.round if told.scores else None,
        "bytes_down": size_bytes(schema) * len(total.context.cohort),
        "bytes_up": bytes_of(total.layout, total.context.ring_bits) * len(total.sites),
    }
    done = finish_round(setting.folder, state, total, optimizer_of(study.strategy), total.sites, line)
    table.last = done.counted
    _closed(making)
    note_closed(setting, done, line)
    return done


def _signed(making: Sum, total: SecureTotal) -> dict[str, str]:
    """Site -> SHA-256 of the envelope about its masked vector; also of a sum that was gathered before a restart."""
    found = read_json(making.setting.folder.sum / "signed.json")
    return {site: found[site] for site in total.sites if site in found}


def secure_evaluation(setting: Setting, table: Table, state: State) -> None:
    """Scores the last weights at every site, on its own test patients, and adds the sum's line to metrics.jsonl.

    A sum that a site has spoilt costs the scores, and not the run, whose weights are there.
    """
    making = Sum(setting, table, state, order_of("evaluate", table, state, state.round, "test"), {})
    try:
        total = made(making)
    except SumAborted as error:
        log.warning("the scores of the last weights are lost: %s", error)
        note(setting, "sum-aborted", state.run, round=making.number, code=error.code, why=str(error)[:200])
        lost = {site: {"state": "rejected", "reason": f"{error.code}: the sum of the scores"} for site in table.seats}
        append_json(
            setting.folder.metrics,
            {
                "round": state.round,
                "final": True,
                "scored_round": state.round,
                "sites": {},
                "federation": dict.fromkeys(table.study.task.answers),
                "left_out": making.left_out | lost,
            },
        )
        return _closed(making)
    told, seats = _told(making, total), set(total.sites)
    append_json(
        setting.folder.metrics,
        {
            "round": state.round,
            "final": True,
            "scored_round": state.round,
            "sites": {},
            "together": _together(making, total, told),
            "federation": {n: row_of(told.scores[n]) if n in told.scores else None for n in table.study.task.answers},
            **calibration(table.study, told.scores, told.validation),
            "left_out": {site: why for site, why in making.left_out.items() if site not in seats},
        },
    )
    _closed(making)


def secure_statistics(setting: Setting, table: Table, state: State) -> tuple[Fingerprint, tuple[str, ...]]:
    """The histograms of all sites' training cases together, and whose they are.

    Raises:
        RoundPaused: too few sites; the same run can be carried on later.
        SumAborted: a sum that cannot be ended nor repeated, or of numbers that no cases can have.
    """
    making = Sum(setting, table, state, order_of("statistics", table, state, 0), {})
    total, study = made(making), table.study
    try:
        whole = fingerprint_in(total.counts)
        doubted(whole, "all sites together", study.modality == "ct", len(study.task.labels), len(total.sites))
    except (ValueError, UpdateRejected) as error:
        raise SumAborted(
            "PLAN_COUNTS", f"the histograms in the sum cannot be, so a site has lied: {error} Take another seed."
        ) from error
    return whole, total.sites


def made(making: Sum) -> SecureTotal:
    """The sum: one that was gathered before a restart, or a new one."""
    setting, state = making.setting, making.state
    digest, parcel = state.weights_sha256, Parcel(None, None)
    if making.order.kind != "statistics":
        parcel = setting.courier.publish(setting.folder.weights(state.round), digest)
    found = _on_disk(setting.folder, making)
    if found is None:
        found = _gathered(making, parcel)
    total = _ended(making, found)
    if making.order.kind != "statistics":
        setting.courier.retire(digest)
    return total


def _gathered(making: Sum, parcel: Parcel) -> SecureSum:
    """Attempt after attempt, until the vectors of enough sites are in one sum and it is on disk.

    Raises:
        RoundPaused: too few sites have work to add, or `MOST_TRIES` attempts have failed.
    """
    setting, table = making.setting, making.table
    for tries in range(1, MOST_TRIES + 1):
        if making.trained:
            asked = choose(making.study, making.order.round, gather(setting, table, making.state))
        elif making.order.kind == "statistics":
            asked = gather(setting, table, making.state).sites
        else:
            asked = setting.presence().sites
        try:
            found = _attempt(making, parcel, asked)
            _save(setting.folder, found, table.answers)
            return found
        except SumAborted as error:
            note(setting, "sum-aborted", making.state.run, round=making.number, code=error.code, why=str(error)[:200])
            log.warning("%s", error)
            if tries == MOST_TRIES:
                raise RoundPaused(
                    f"round {making.number}: {tries} secure sums failed, the last one: {error} Mend that, or wait for "
                    f"the sites, and run the study again."
                ) from error
    raise AssertionError("the last try returns or raises")


def _attempt(making: Sum, parcel: Parcel, asked: tuple[str, ...]) -> SecureSum:
    """Training, and a sum up to its vectors; raises SumAborted where too few answer a step."""
    study, setting, order = making.study, making.setting, making.order
    ready: list[str] = []

    def is_ready(site: str, reply: Reply, message: Message, was: Expected, late: bool) -> None:
        _doubted(site, reply, was, "ready", late)
        ready.append(site)

    span_s = training_s(study)
    patience = Patience(span_s, study.rounds.pause_s, grows=study.rounds.cohort == 1.0)
    converse(setting, making.table, order, parcel, asked, making.expected, is_ready, study.rounds.quorum, patience)
    _leave_out(making)
    roster = setting.roster()
    if roster is None:
        raise StateInvalid("a secure sum needs the roster of the federation, and there is none. Let the sites join.")
    strangers = sorted(set(ready) - roster.sites.keys())
    making.left_out |= {s: {"state": "revoked", "reason": "is not on the roster"} for s in strangers}
    cohort = tuple(sorted(set(ready) & roster.sites.keys()))
    if len(able := [site for site in cohort if site not in making.failing]) >= study.rounds.quorum:
        making.left_out |= {site: making.failing[site] for site in cohort if site in making.failing}
        cohort = tuple(able)
    cohort = _few_enough(making, cohort)
    context = _context(making, cohort, roster)
    if len(cohort) < context.fewest:
        raise SumAborted(
            "SUM_BELOW_THRESHOLD",
            f"round {making.number}: {len(cohort)} sites are on the roster, {context.fewest} are needed. Nothing was "
            f"asked of them.",
        )
    found = SecureSum(context, roster, making.layout)
    _ask(making, found, "advertise", cohort, lambda site, reply, _: found.take_advert(_said(site, reply.advert)),
         lambda site, o: replace(o, context=context))  # fmt: skip
    adverts = found.close_adverts()
    _ask(making, found, "share", _sites(adverts.adverts),
         lambda site, reply, _: found.take_sealed(_said(site, reply.sealed)),
         lambda site, o: replace(o, adverts=adverts))  # fmt: skip
    inboxes: Mapping[str, Inbox] = found.close_sealed()

    def add(site: str, reply: Reply, message: Message) -> None:
        vector = setting.courier.vector(site, reply, message)
        found.take_vector(site, vector.size, (vector[at : at + 4 * CHUNK] for at in range(0, vector.size, 4 * CHUNK)))

    _ask(making, found, "mask", tuple(inboxes), add, lambda site, o: replace(o, inbox=inboxes[site]))
    found.close_vectors()
    return found


def _few_enough(making: Sum, ready: tuple[str, ...]) -> tuple[str, ...]:
    """As many as one sum holds, drawn anew in each round."""
    if len(ready) <= MOST_SITES:
        return ready
    drawn = rng(making.study.seed, making.study.name, "sum", making.number).permutation(len(ready))[:MOST_SITES]
    chosen = tuple(ready[n] for n in sorted(drawn))
    why = {"state": "rejected", "reason": f"SUM_FULL: one sum holds {MOST_SITES} sites, drawn anew in each round"}
    making.left_out |= {site: why for site in ready if site not in chosen}
    return chosen


def _ended(making: Sum, found: SecureSum) -> SecureTotal:
    """The survivors confirmed and the masks taken away; waits for sites as a round does for its quorum.

    Raises:
        RoundPaused: fewer than the threshold answer; the same run goes on with the same sum.
        SumAborted: a site has lied in a way that shows only now. That ends a run, but for a sum of its last scores: the
            next round would start from the same weights, and no site adds a second update from them, which would differ
            from this one by little.
    """
    survivors = found.survivors
    if found.step == "confirmations":
        _ask(making, found, "confirm", survivors.sites,
             lambda site, reply, _: found.take_confirmation(_said(site, reply.confirmation)),
             lambda site, o: replace(o, survivors=survivors))  # fmt: skip
        write_atomic(_confirmed(making.setting.folder), canonical_json(plain(found.close_confirmations())))
    confirmations = found.confirmations
    _ask(making, found, "unmask", tuple(confirmations.signatures),
         lambda site, reply, _: found.take_revealed(_said(site, reply.revealed)),
         lambda site, o: replace(o, confirmations=confirmations))  # fmt: skip
    try:
        return found.finish()
    except SumAborted as error:
        if error.culprits:
            facts = {"code": error.code, "sites": list(error.culprits)}
            note(making.setting, "sum-lied", making.state.run, round=making.number, **facts)
        if making.order.kind == "evaluate":
            raise
        without = " on a roster without the site that you suspect"
        if error.culprits:
            without = f" without {' and '.join(error.culprits)} (`fedserver revoke`)"
        raise SumAborted(
            error.code,
            f"{error} No site adds an update to two sums, so this run cannot go on from here: run the study with "
            f"another seed{without}.",
            error.culprits,
        ) from error


def _ask(
    making: Sum,
    found: SecureSum,
    kind: Any,
    sites: tuple[str, ...],
    take: Callable[[str, Reply, Message], None],
    tailored: Callable[[str, Order], Order],
) -> None:
    """One step of a sum.

    Raises:
        SumAborted: too few have answered, or the roster has changed, while the sum can still be begun anew.
        RoundPaused: too few have answered after the survivors were told.
    """
    setting, repeatable = making.setting, kind in ("advertise", "share", "mask")

    def accept(site: str, reply: Reply, message: Message, was: Expected, late: bool) -> None:
        _doubted(site, reply, was, STEPS[kind], late)
        take(site, reply, message)

    if repeatable and (now := setting.roster()) is not None and now.sha256 != found.context.roster_sha256:
        raise SumAborted("ROSTER_CHANGED", f"round {making.number}: the roster has changed during the sum.")
    order = replace(making.order, kind=kind)
    step_s = making.secure.step_s
    pause_s = 0.0 if repeatable else making.study.rounds.pause_s
    needed = found.context.fewest if repeatable else found.context.threshold
    patience = Patience(step_s, pause_s, grows=False, reask_s=max(2.0, step_s / 4))
    try:
        converse(
            setting, making.table, order, Parcel(None, None), sites, making.expected, accept, needed, patience, tailored
        )
    except RoundPaused as error:
        if not repeatable:
            raise
        _leave_out(making)
        making.failing |= _to_blame(making.table.seats)
        raise SumAborted("SUM_BELOW_THRESHOLD", f"{error} Nothing was revealed.") from error
    if repeatable:
        _leave_out(making)


def _to_blame(seats: Mapping[str, Seat]) -> dict[str, dict[str, str]]:
    """Whom the next attempts do without: who answered with something else than was asked, and who is accused.

    Of two sites by themselves nobody can tell which of them lies, so both are left out; two who accuse a third one are
    believed.
    """
    accused = Counter(seat.accused for seat in seats.values() if seat.accused in seats)
    found = {
        site: {"state": seat.state, "reason": seat.reason}
        for site, seat in seats.items()
        if seat.state in ("refused", "rejected", "failed") and accused[seat.accused] < BELIEVED
    }
    for site, times in accused.items():
        if site is not None:
            found[site] = {"state": "rejected", "reason": f"SHARE_FORGED: {times} of the others say so"}
    return found


def _leave_out(making: Sum) -> None:
    """Notes of every site that did not answer a step why; of one that answers the next attempt it is forgotten."""
    for site, seat in making.table.seats.items():
        if seat.state == "counted":
            making.left_out.pop(site, None)
        else:
            making.left_out[site] = {"state": seat.state, "reason": seat.reason}


def _doubted(site: str, reply: Reply, asked: Expected, kind: str, late: bool) -> None:
    if reply.kind != kind or late:
        raise UpdateRejected("MESSAGE_INVALID", f"site {site!r}: answered {reply.kind!r} where {kind!r} was asked.")
    known = (reply.run, reply.round, reply.study_sha256, reply.base_sha256)
    if known != (asked.run, asked.round, asked.study_sha256, asked.base_sha256):
        raise UpdateRejected("OTHER_ROUND", f"site {site!r}: answers another round, study or run. It was left out.")


def _said(site: str, message: Any) -> Any:
    """What a site says in a step, under its own name."""
    if message is None or message.site != site:
        raise UpdateRejected("OTHER_SITE", f"site {site!r}: its message is empty or of another site. It was left out.")
    return message


def _sites(messages: Iterable[Any]) -> tuple[str, ...]:
    return tuple(message.site for message in messages)


def _context(making: Sum, cohort: tuple[str, ...], roster: Roster) -> Context:
    """Of another attempt than any before, also by a process that was killed."""
    folder, number = making.setting.folder, making.number
    path = folder.sum / "attempt.json"
    before = read_json(path) if path.exists() else {"round": 0, "attempt": 0}
    attempt = before["attempt"] + 1 if before["round"] == number else 1
    private_folder(folder.sum)
    write_json(path, {"round": number, "attempt": attempt})
    return wanted(
        making.study,
        run=making.state.run,
        round_number=number,
        attempt=attempt,
        cohort=cohort,
        roster_sha256=roster.sha256,
        model_sha256=making.state.weights_sha256,
        layout=making.layout,
        study_sha256=making.state.study_sha256,
        trained=making.trained,
    )


def _save(folder: RunFolder, found: SecureSum, signed: Mapping[str, str]) -> None:
    facts, vector = found.gathered()
    write_json(folder.sum / "signed.json", dict(signed))
    _confirmed(folder).unlink(missing_ok=True)  # of a sum before
    with replacing(folder.sum / "vector.bin") as file:
        file.write(vector.astype("<u4", copy=False).data)
    write_atomic(folder.sum / "sum.json", canonical_json(plain(facts)))


def _on_disk(folder: RunFolder, making: Sum) -> SecureSum | None:
    """The sum of this round that was gathered and not ended, or None."""
    path = folder.sum / "sum.json"
    if not path.exists():
        return None
    facts = parse_json(Gathered, path.read_bytes(), str(path), StateInvalid)
    if facts.context.round != making.number or facts.context.model_sha256 != making.state.weights_sha256:
        return None
    vector: NDArray[np.uint32] = np.fromfile(folder.sum / "vector.bin", "<u4").astype(np.uint32, copy=False)
    if vector.size != making.layout.elements:
        raise StateInvalid(f"{folder.sum / 'vector.bin'}: is not the sum that sum.json is about. Restore the folder.")
    making.left_out |= {
        site: {"state": "lost", "reason": "its vector was not there in time"}
        for site in facts.context.cohort
        if site not in facts.added
    }
    found = SecureSum.resumed(facts, making.layout, vector)
    if (told := _confirmed(folder)).exists():
        found.confirmed(parse_json(Confirmations, told.read_bytes(), str(told), StateInvalid))
    return found


def _confirmed(folder: RunFolder) -> Path:
    """Sites answer a second question for shares only if it is the same, word by word."""
    return folder.sum / "confirmations.json"


def _closed(making: Sum) -> None:
    """Lets go of a sum whose round is durable."""
    shutil.rmtree(making.setting.folder.sum, ignore_errors=True)


def _told(making: Sum, total: SecureTotal) -> Told:
    """Losses and scores of all sites together; none where a site's numbers cannot be."""
    try:
        return told_in(making.study, making.trained, making.scored, total.counts)
    except ValueError as error:
        log.warning("round %s: the scores in the sum cannot be, so a site has lied; they are left out: %s",
                    making.number, error)  # fmt: skip
        return Told(None, {}, {})


def _together(making: Sum, total: SecureTotal, told: Told) -> dict[str, Any]:
    """What is known of the sites in the sum, together."""
    by_examples = making.trained and making.study.strategy.weighting == "examples"
    rows: dict[str, Any] = {"scores": {label: row_of(s) for label, s in sorted(told.scores.items())}}
    if told.own_scores:
        rows["personalised"] = {label: row_of(s) for label, s in sorted(told.own_scores.items())}
    return {
        "sites": list(total.sites),
        "cohort": list(total.context.cohort),
        "attempt": total.context.attempt,
        "examples": total.weight if by_examples else None,
        "clipped": total.counts["clipped"],
        "losses": [] if told.loss is None else [told.loss],
        **rows,
    }
