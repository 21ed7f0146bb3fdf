"""The rounds of a run: who is asked, what is counted, when a round ends, and what is told meanwhile."""

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message

from fedserver.aggregation import fold
from fedserver.calibration import calibration
from fedserver.checkpoint import (
    State,
    adopt_plan,
    check_weights,
    finish_round,
    forget_unfinished,
    read_plan,
    read_state,
    read_study,
    schema_on_disk,
)
from fedserver.cohort import choose
from fedserver.conversation import converse, gather, order_of
from fedserver.courier import Parcel
from fedserver.optimizers import optimizer_of
from fedserver.publish.lineage import RETRAINED
from fedserver.secure_round import secure_evaluation, secure_round, secure_statistics
from fedserver.setting import Setting, Table, note, note_closed, show, signed_in
from shared_models import study as study_file
from shared_models.drift import Profile, reference
from shared_models.drift import doubted as doubted_profile
from shared_models.errors import StateInvalid, UpdateRejected, WeightsInvalid
from shared_models.files import append_json, canonical_json, read_json, read_lines, write_atomic, write_json
from shared_models.parse import parse_json, plain
from shared_models.plan import Fingerprint, Plan, derive, doubted
from shared_models.plan import total as merged
from shared_models.planned import PURPOSE, constraints, planned, statement
from shared_models.protect.stages import incoming, on_the_wire
from shared_models.scores import Score, doubted_scores, row_of
from shared_models.scores import total as scored_together
from shared_models.study import Study
from shared_models.update import Expected, Update, admit
from shared_models.weights import Schema, size_bytes
from shared_models.wire import Reply


def carry_out(setting: Setting) -> State:
    """Runs every round that is still to do, then the final evaluation; returns the last state.

    Raises:
        RoundPaused: the quorum was missing for longer than `rounds.pause_s`, or the disk has no room for a round; the
            same run can be carried on later.
    """
    folder = setting.folder
    state = read_state(folder)
    study = read_study(folder)
    forget_unfinished(folder, state)
    table = Table(study, (folder.path / "study.json").read_text(), last=state.counted)
    if setting.sign is not None:
        table.study_proof = setting.sign(study_file.SIGNED, study_file.statement(state.run, state.study_sha256))
        write_json(folder.path / "study-proof.json", plain(table.study_proof))
    note(setting, "run-opened", state.run, round=state.round, study=state.study_sha256)
    _close_again(setting, state)
    if study.plan == "federated" and state.plan_sha256 is None:
        state = statistics(setting, table, state)
    check_weights(folder, state)
    table.plan = read_plan(folder, state)
    if state.plan_sha256 is not None and setting.sign is not None:
        table.proof = setting.sign(PURPOSE, statement(state.run, state.study_sha256, state.plan_sha256))
        write_json(folder.path / "plan-proof.json", plain(table.proof))
    schema = schema_on_disk(folder, state.round)
    while state.round < study.rounds.count:
        setting.courier.check_room(size_bytes(schema), len(setting.presence().sites), state.round + 1)
        began = setting.clock()
        state = one_round(setting, table, state, schema)
        table.durations.append(setting.clock() - began)
    final_evaluation(setting, table, state, schema)
    show(setting, table, "finished", state.round, 0.0, always=True)
    note(setting, "run-finished", state.run, round=state.round, weights=state.weights_sha256)
    return state


def _close_again(setting: Setting, state: State) -> None:
    """The line of the last finished round, where a process was killed after its state and before the audit log."""
    if setting.records is None or not state.round:
        return
    before = setting.folder.path / RETRAINED
    if before.exists() and read_json(before)["round"] >= state.round:
        return  # closed in the run that this one goes on from
    lines = [x for x in read_lines(setting.folder.metrics) if x["round"] == state.round and not x.get("final")]
    said = setting.records.closed(state.run, state.round)
    if said is None or (lines and said.get("signed", {}) != signed_in(lines[-1])):  # else of when it was done before
        note_closed(setting, state, lines[-1] if lines else {"sites": {}})


def statistics(setting: Setting, table: Table, state: State) -> State:
    """Asks every site for its fingerprint and derives the plan of the run from their sum; a quorum of sites decides.

    Counted once, whoever answers late or joins later trains by the same plan.

    Raises:
        StudyInvalid: the memory that the study allows is too small for any plan.
    """
    study, parts = table.study, dict[str, Fingerprint]()
    if study.protect.secure_aggregation is not None:
        whole, sites = secure_statistics(setting, table, state)
        adopted = _adopted(setting, state, study, whole, sites)
        shutil.rmtree(setting.folder.sum, ignore_errors=True)  # now that its plan is durable
        return adopted

    def add(site: str, reply: Reply, message: Message, asked: Expected, late: bool) -> None:
        if reply.kind != "statistics" or reply.fingerprint is None:
            raise UpdateRejected("MESSAGE_INVALID", f"site {site!r}: answered statistics with {reply.kind!r}.")
        if (reply.run, reply.study_sha256) != (asked.run, asked.study_sha256):
            raise UpdateRejected("OTHER_STUDY", f"site {site!r}: counted for another study or run. Ask it again.")
        parts[site] = doubted(reply.fingerprint, site, study.modality == "ct", len(study.task.labels))

    expected = Expected(state.run, 0, state.study_sha256, state.weights_sha256, {})
    order, cohort = order_of("statistics", table, state, 0), gather(setting, table, state).sites
    converse(setting, table, order, Parcel(None, None), cohort, expected, add, study.rounds.quorum)
    return _adopted(setting, state, study, merged(parts.values()), tuple(sorted(parts)))


def _adopted(setting: Setting, state: State, study: Study, whole: Fingerprint, sites: tuple[str, ...]) -> State:
    """The run with the plan that follows from the histograms of `sites`."""
    plan = derive(whole, constraints(study))
    adopted = adopt_plan(setting.folder, state, plan, whole, sites, setting.first_weights)
    note(setting, "plan-made", state.run, plan=adopted.plan_sha256, sites=list(sites))
    return adopted


def one_round(setting: Setting, table: Table, state: State, schema: Schema) -> State:
    """Opens, collects and closes round `state.round + 1`."""
    study, number = table.study, state.round + 1
    if study.protect.secure_aggregation is not None:
        return secure_round(setting, table, state, schema)
    updates = fold(_trained(study, table.plan), number, schema, setting.folder.spool)
    lines, late_rounds = dict[str, Any](), dict[str, int]()
    score = bool(study.evaluate.every) and state.round > 0 and state.round % study.evaluate.every == 0
    order = order_of("train", table, state, number, "val" if score else None)
    digests = (state.study_sha256, state.weights_sha256)
    private = study.protect.privacy is not None
    expected = Expected(state.run, number, *digests, schema, plan_sha256=state.plan_sha256, private=private)
    cohort = choose(study, number, gather(setting, table, state))
    parcel = setting.courier.publish(setting.folder.weights(state.round), state.weights_sha256)

    def count(site: str, reply: Reply, message: Message, asked: Expected, late: bool) -> None:
        if reply.kind != "update":
            raise UpdateRejected("MESSAGE_INVALID", f"round {number}, site {site!r}: answered with {reply.kind!r}.")
        _check_scores(study, site, reply)
        sent = setting.courier.collect(site, reply, message)
        delta = incoming(study.protect, sent, schema, f"round {asked.round}, site {site!r}")
        admit(_update(site, reply, delta), asked)
        try:
            added = updates.add(site, asked.round, delta, reply)
        except (WeightsInvalid, ValueError) as e:  # half of it may be in the sum: the round begins again
            raise StateInvalid(
                f"round {number}: the sum was spoilt ({e}). It begins again from the last weights."
            ) from e
        if not added:
            raise UpdateRejected("SUPERSEDED", f"round {number}, site {site!r}: a newer one of it is counted.")
        if updates.one_vote:
            lines.pop(f"{site} (round {late_rounds.pop(site, 0)})", None)
        if late:
            late_rounds[site] = max(asked.round, late_rounds.get(site, 0))
        lines[site if not late else f"{site} (round {asked.round})"] = _line(reply)

    began = setting.clock()
    converse(setting, table, order, parcel, cohort, expected, count, study.rounds.quorum)
    signed = {label: envelope for label, envelope in table.answers.items() if label in lines}
    for label, envelope in signed.items():
        lines[label]["signed"] = envelope
    scores = {site: line["scores"] for site, line in lines.items() if line["scores"]}
    asked = sum(a.attempt > 0 or a.put_off > 0 for a in table.seats.values())
    line = {
        "seconds": round(setting.clock() - began, 3),
        "sites": lines,
        "left_out": {s: {"state": a.state, "reason": a.reason} for s, a in table.seats.items() if a.state != "counted"},
        "scored_round": state.round if scores else None,
        "bytes_down": size_bytes(schema) * asked,
        "bytes_up": size_bytes(on_the_wire(study.protect, schema)) * len(lines),
    }
    counted = tuple(sorted(s for s, a in table.seats.items() if a.state == "counted"))
    if (used := updates.used()) is not None:
        line["used"] = used
    done = finish_round(setting.folder, state, updates, optimizer_of(study.strategy), counted, line, late_rounds)
    table.last = done.counted
    setting.courier.retire(state.weights_sha256)
    note_closed(setting, done, line)
    return done


def final_evaluation(setting: Setting, table: Table, state: State, schema: Schema) -> None:
    """Scores the last weights at every site, on its own test patients, and adds the line to metrics.jsonl, once."""
    study = table.study
    if not study.evaluate.every or any(line.get("final") for line in read_lines(setting.folder.metrics)):
        return
    if study.protect.secure_aggregation is not None:
        return secure_evaluation(setting, table, state)
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
    order = order_of("evaluate", table, state, state.round, "test")
    parcel = setting.courier.publish(setting.folder.weights(state.round), state.weights_sha256)
    converse(setting, table, order, parcel, setting.presence().sites, expected, keep, quorum=1)
    setting.courier.retire(state.weights_sha256)
    if profiles:
        write_atomic(setting.folder.reference, canonical_json(reference(list(profiles.values()))))
    whole = {name: _together(name, (r.scores for r in replies.values())) for name in study.task.answers}
    told = {name: _together(name, (r.validation for r in replies.values())) for name in study.task.answers}
    append_json(
        setting.folder.metrics,
        {
            "round": state.round,
            "final": True,
            "scored_round": state.round,
            "sites": {site: _rows(r) for site, r in sorted(replies.items())},
            "federation": {name: None if score is None else row_of(score) for name, score in whole.items()},
            **calibration(study, whole, told),
            "left_out": {s: {"state": a.state, "reason": a.reason} for s, a in table.seats.items() if s not in replies},
        },
    )


def _trained(study: Study, plan: str | None) -> Study:
    """The study with the plan in it that its sites have made."""
    return study if plan is None else planned(study, parse_json(Plan, plan, "plan"))


def _check_scores(study: Study, site: str, reply: Reply) -> None:
    """Scores go into files and reports by the names of their labels; only the study's own may, and counts of its task
    that add up with those of other sites."""
    if strange := {*reply.scores, *reply.own_scores, *reply.validation} - set(study.task.answers):
        raise UpdateRejected(
            "OTHER_LABELS", f"site {site!r}: scores {len(strange)} labels that the study does not have."
        )
    for score in (*reply.scores.values(), *reply.own_scores.values(), *reply.validation.values()):
        doubted_scores(score, study.task, site)


def _together(name: str, scores: Iterable[Mapping[str, Score]]) -> Score | None:
    """The counts of all sites for one label."""
    return scored_together(of[name] for of in scores if name in of)


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
