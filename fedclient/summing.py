"""A site's part in the secure sum of a round: what an order leaves stays here, and only the steps of the sum leave.

A `statistics`, `train` or `evaluate` of such a study is carried out and kept; the coordinator hears `ready`. Then come
the five steps of `fedclient.secagg`. Every number of a sum but who takes part follows from the study that this site has
approved, and is compared; a step that comes again word by word (its answer was lost) gets the same answer, any other is
refused.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fedclient.egress import check_tensors
from fedclient.kept import finished, keep, kept_path
from fedclient.partners import counted
from fedclient.renewal import fetch_roster, read_roster
from fedclient.secagg import Held, Member, check_context
from fedclient.site import Site
from fedclient.sums import Sums, open_sums
from fedclient.work import Gate, Learner, carry_out, reply_to, study_of
from shared_models.errors import OrderRefused, StateInvalid
from shared_models.files import canonical_json, file_sha256, replacing, write_atomic
from shared_models.identity import load_secret
from shared_models.parse import parse_json, plain
from shared_models.protect.context import Context
from shared_models.protect.counted import counts_of
from shared_models.protect.counted_plan import plan_counts
from shared_models.protect.messages import Revealed
from shared_models.protect.ring import Layout
from shared_models.protect.secure import layout_of, round_of, wanted, weight_in_sum
from shared_models.roster import Roster
from shared_models.study import Study
from shared_models.weights import Arrays, OnDisk, open_tensors
from shared_models.wire import STEPS, BlobRef, Order, Reply, dump

ASKED = {"advertise": "context", "share": "adverts", "mask": "inbox", "confirm": "survivors", "unmask": "confirmations"}
KINDS = {"update": "train", "evaluation": "evaluate", "statistics": "statistics"}  # of what was done -> of its order
CODES = {"run": "ROUND_MISMATCH", "round": "ROUND_MISMATCH", "whole": "WEIGHTING_MISMATCH"}  # else ENCODING_MISMATCH
CODES |= {"threshold": "THRESHOLD_MISMATCH", "least_cohort": "COHORT_MISMATCH"}


def is_summed(order: Order) -> bool:
    """Whether what `order` leaves is for a secure sum alone.

    Raises:
        OrderRefused: `SUM_NOT_IN_STUDY`: a step of a sum that the study does not have.
    """
    secure = study_of(order).protect.secure_aggregation is not None
    if order.kind in STEPS and not secure:
        raise OrderRefused("SUM_NOT_IN_STUDY", f"run {order.run}: the study has no protect.secure_aggregation.")
    return secure and (order.kind in STEPS or order.kind in ("statistics", "train", "evaluate"))


def summed(
    order: Order, site: Site, weights: Callable[[], Arrays], learner: Learner, gate: Gate
) -> tuple[Reply, Path | None]:
    """The reply to an order of such a study, and the file of the masked vector that goes with it, in one step.

    Args:
        weights: brings the tensors of a `train` or `evaluate`, where they are needed; of a `statistics` none.

    Raises:
        OrderRefused: what `carry_out` refuses, or a step that would tell more than a sum.
    """
    kept = kept_path(order, site.sums)
    if order.kind in STEPS:
        return _step(order, site, study_of(order), kept)
    if finished(order, kept) is None:
        received = weights()
        done = carry_out(order, received, site, learner, gate)
        if done.reply.kind == "update":
            check_tensors(done.delta, received, study_of(order))
        keep(done.reply, done.delta, kept)
    return reply_to(order, site, "ready"), None


def _step(order: Order, site: Site, study: Study, kept: Path) -> tuple[Reply, Path | None]:
    asked = getattr(order, ASKED[order.kind])
    if asked is None:
        raise OrderRefused("STEP_EMPTY", f"secure sum of round {order.round}: {order.kind!r} holds no message.")
    context_id = asked.id if isinstance(asked, Context) else asked.context
    digest = hashlib.sha256(canonical_json(plain(asked))).hexdigest()
    said = kept.parent / f"sum-{context_id[:16]}-{order.kind}-{digest[:16]}.json"
    if said.exists():
        return _said(order, said)
    roster = _roster(site, asked.roster_sha256 if isinstance(asked, Context) else None)
    sums = open_sums(_member(site, roster), site.sums)
    vector: Path | None = None
    if order.kind == "advertise":
        reply = reply_to(order, site, "advert", advert=_advertise(order, study, kept, sums))
    else:
        _same_order(order, sums, context_id)
        if order.kind == "share":
            reply = reply_to(order, site, "sealed", sealed=sums.share(asked))
        elif order.kind == "mask":
            vector = said.with_suffix(".vector")
            reply = reply_to(order, site, "masked", blob=_masked(order, asked, study, kept, sums, vector))
        elif order.kind == "confirm":
            reply = reply_to(order, site, "confirmation", confirmation=sums.confirm(asked))
        else:

            def keep_answer(told: Revealed) -> None:
                write_atomic(said, dump(reply_to(order, site, "revealed", revealed=told)))

            reply = reply_to(order, site, "revealed", revealed=sums.unmask(asked, keep_answer))
    write_atomic(said, dump(reply))
    return reply, vector


def _said(order: Order, said: Path) -> tuple[Reply, Path | None]:
    """The answer that was given to the same words, if its vector is as it was written."""
    reply, vector = parse_json(Reply, said.read_bytes(), str(said)), said.with_suffix(".vector")
    if reply.blob is None:
        return replace(reply, attempt=order.attempt), None
    if not vector.exists() or file_sha256(vector) != reply.blob.sha256:
        raise OrderRefused(
            "STEP_REPEATED", f"secure sum of round {order.round}: its vector is lost, and none is masked a second time."
        )
    return replace(reply, attempt=order.attempt), vector


def _roster(site: Site, wanted_sha256: str | None) -> Roster:
    """The newest roster that this site has seen; fetched anew where the coordinator speaks of another.

    Raises:
        OrderRefused: there is none.
    """
    signed = read_roster(site.sums)
    if site.deployed and (signed is None or (wanted_sha256 is not None and signed.roster.sha256 != wanted_sha256)):
        try:
            signed = fetch_roster(site.folder, site.coordinator)
        except StateInvalid as error:  # not signed, another history, or an older one
            raise OrderRefused("ROSTER_INVALID", str(error)) from error
    if signed is None:
        raise OrderRefused("ROSTER_MISSING", f"{site.sums}: no roster of the federation. Start the node again.")
    return signed.roster


def _member(site: Site, roster: Roster) -> Member:
    key = load_secret(site.sums / "keys" / "identity.key")
    if not site.deployed:
        return Member(site.name, key, roster)
    named = site.policy.partners
    partners = counted(site.folder, site.name, named, roster) if named else None
    return Member(site.name, key, roster, site.policy.least_cohort, partners)


def _kept(order: Order, kept: Path) -> tuple[Reply, OnDisk]:
    """What the site holds for the sum; refused where the order is about something that it has not done."""
    reply = finished(order, kept)
    if reply is None:
        raise OrderRefused("NO_UPDATE", f"secure sum of round {order.round}: this site has nothing for it.")
    return reply, open_tensors(kept.with_suffix(".safetensors"), f"update of round {order.round}")


def _layout(study: Study, reply: Reply, delta: OnDisk) -> Layout:
    return layout_of(study, delta.schema, reply.kind == "update", reply.scored is not None, reply.kind == "statistics")


def _advertise(order: Order, study: Study, kept: Path, sums: Sums) -> Any:
    context = order.context
    assert context is not None
    first = 0 if study.plan == "federated" and order.plan is None else 1
    if not first <= order.round <= study.rounds.count:
        raise OrderRefused("ROUND_RANGE", f"round {order.round}: the study has {study.rounds.count}.")
    reply, delta = _kept(order, kept)
    trained, layout = reply.kind == "update", _layout(study, reply, delta)
    held = Held(order.base_sha256, layout.sha256, order.study_sha256)
    check_context(sums.member, context, held)
    due = wanted(
        study,
        run=order.run,
        round_number=round_of(KINDS[reply.kind], order.round),
        attempt=context.attempt,
        cohort=context.cohort,
        roster_sha256=sums.member.roster.sha256,
        model_sha256=order.base_sha256,
        layout=layout,
        study_sha256=order.study_sha256,
        trained=trained,
    )
    if other := [f.name for f in fields(Context) if getattr(due, f.name) != getattr(context, f.name)]:
        raise OrderRefused(
            CODES.get(other[0], "ENCODING_MISMATCH"),
            f"secure sum of round {order.round}: its {other[0]} is {getattr(context, other[0])!r}, by the study that "
            f"was approved here it is {getattr(due, other[0])!r}.",
        )
    return sums.advertise(context, held)


def _same_order(order: Order, sums: Sums, context_id: str) -> None:
    """A step is asked under the study, run and weights of its sum, which consent was asked for."""
    about: Mapping[str, object] = sums.about(context_id)
    asked = {"run": order.run, "model_sha256": order.base_sha256, "policy_sha256": order.study_sha256}
    if other := [name for name, value in asked.items() if about[name] != value]:
        raise OrderRefused(
            "CONTEXT_SPLIT", f"secure sum of round {order.round}: the order's {other[0]} is not that of the sum."
        )


def _masked(order: Order, inbox: Any, study: Study, kept: Path, sums: Sums, vector: Path) -> BlobRef:
    """Writes the masked vector; not synced: what a power cut spoils is a site that was lost."""
    reply, delta = _kept(order, kept)
    trained, layout = reply.kind == "update", _layout(study, reply, delta)
    if reply.fingerprint is not None:
        counts = plan_counts(reply.fingerprint)
    else:
        scored = reply.scored is not None
        counts = counts_of(study, trained, scored, reply.losses, reply.scores, reply.own_scores, reply.validation)
    weight = weight_in_sum(study, reply.examples, trained)
    digest, size = hashlib.sha256(), 0
    with replacing(vector, synced=False) as file:
        for block in sums.mask(inbox, delta, weight, counts, layout):
            file.write(block.data)
            digest.update(block.data)
            size += block.size
    return BlobRef(digest.hexdigest(), size)
