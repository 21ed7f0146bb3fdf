"""An order carried out: doubted, trained or scored, and answered in the words that may leave the site."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fedclient.memory import keep_final, memory_folder, own_path, recall, remember
from fedclient.site import Site
from fedclient.spending import Spending, check_budget, check_order, reserved
from shared_models.authority import read_files
from shared_models.control import without_control
from shared_models.drift import Profile
from shared_models.errors import OrderRefused
from shared_models.identity import stated
from shared_models.parse import parse_json
from shared_models.plan import Plan
from shared_models.planned import PURPOSE, planned, statement
from shared_models.protect.stages import RESIDUAL, outgoing
from shared_models.scores import Score
from shared_models.strategy import remembers
from shared_models.study import Study, from_json
from shared_models.weights import Arrays, load, save_arrays
from shared_models.wire import Order, Proof, Reply, Split


@dataclass(frozen=True, slots=True)
class Learned:
    """What local training gave.

    Attributes:
        weights: after training; same names, shapes and dtypes as received.
        examples: examples trained on, each counted once.
        variance: of the mean local step, where the study weighs by it.
    """

    weights: Arrays
    examples: int
    steps: int
    losses: tuple[float | None, ...] = ()
    device: str = ""
    variance: float | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """How much a site has for a study."""

    train_cases: int = 0
    test_cases: int = 0
    train_patients: int = 0


class Learner(Protocol):
    """The part of an order that touches images; training.learner is the real one."""

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned: ...

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]: ...

    def holding(self, site: Site, study: Study) -> Holding: ...


Gate = Callable[[Order, Site, Study], None]


@runtime_checkable
class Rememberer(Learner, Protocol):
    """A learner for studies in which a site keeps something between its rounds, or has a model of its own."""

    def learn_on(
        self, site: Site, study: Study, round_number: int, weights: Arrays, memory: Arrays
    ) -> tuple[Learned, Arrays]:
        """`learn` from what the site remembers of its last counted round; what it remembers of this one besides."""
        ...

    def own(self, site: Site, study: Study, weights: Arrays, memory: Arrays, tuned: bool) -> Arrays | None:
        """The site's own model; None where it has none yet.

        Args:
            tuned: trained once more, by itself, as the study says.
        """
        ...


@runtime_checkable
class Profiler(Learner, Protocol):
    """A learner that can count what cases are like and what a model answers on them."""

    def profile(self, site: Site, study: Study, weights: Arrays) -> Profile | None:
        """Of the validation and test cases of the site; None where they are too few to be told of."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, and the delta that goes with it where there is one."""

    reply: Reply
    delta: Arrays = field(default_factory=dict)


_STUDIES: dict[str, tuple[Study, str]] = {}  # the last study and its digest, by its text: every order of a run has it


def study_of(order: Order) -> Study:
    """The study inside an order.

    Raises:
        OrderRefused: its digest is not the one that the order names.
    """
    if order.study not in _STUDIES:
        study = from_json(order.study, f"study of run {order.run}")
        _STUDIES.clear()
        _STUDIES[order.study] = study, hashlib.sha256(order.study.encode()).hexdigest()
    study, digest = _STUDIES[order.study]
    if digest != order.study_sha256:
        raise OrderRefused("STUDY_MISMATCH", f"run {order.run}: the study is not the one that the order names.")
    return study


def planned_study(order: Order, study: Study) -> Study:
    """`study` as the plan of an order has it, or as it is where its plan is given.

    Raises:
        OrderRefused: there is no plan where the study wants one, one where it does not, or another than is named.
        StudyInvalid: a plan that the study cannot be trained by.
    """
    if (study.plan == "given") != (order.plan is None):
        raise OrderRefused(
            "PLAN_MISMATCH", f"round {order.round}: the study's plan is {study.plan!r}, the order's not."
        )
    if order.plan is None:
        return study
    if hashlib.sha256(order.plan.encode()).hexdigest() != order.plan_sha256:
        raise OrderRefused("PLAN_MISMATCH", f"run {order.run}: the plan is not the one that the order names.")
    return planned(study, parse_json(Plan, order.plan, f"plan of run {order.run}"))


def check_proof(order: Order, site: Site) -> None:
    """A hospital trains by no plan that its coordinator did not sign, as the authority pinned at `join` vouches.

    Raises:
        OrderRefused: `PLAN_UNSIGNED` or `PLAN_SIGNATURE`.
    """
    if order.plan_sha256 is not None and site.deployed:
        content = statement(order.run, order.study_sha256, order.plan_sha256)
        check_signed(order.plan_proof, site, PURPOSE, content, order.run)


def check_signed(proof: Proof | None, site: Site, purpose: str, content: bytes, run: str) -> None:
    """Raises OrderRefused unless the coordinator signed `content`: `PLAN_UNSIGNED` or `PLAN_SIGNATURE` of a plan."""
    if proof is None:
        raise OrderRefused(
            f"{purpose.upper()}_UNSIGNED", f"run {run}: the coordinator has not signed its {purpose}. Ask it why."
        )
    certificate, signature = proof.certificate.encode(), bytes.fromhex(proof.signature)
    if not stated(read_files(site.folder / "keys"), certificate, signature, purpose, content):
        raise OrderRefused(
            f"{purpose.upper()}_SIGNATURE",
            f"run {run}: the {purpose}'s signature is not the coordinator's for this run and study. Telephone it.",
        )


def check_asked(order: Order, study: Study, site: Site) -> None:
    """Holds an order against the study that was approved here and the privacy that the site requires.

    Raises:
        OrderRefused: `DP_REQUIRED`, `DP_UNNOISED`, `ROUND_RANGE` or `SCORES_NOT_IN_STUDY`.
    """
    check_order(order, study, site)
    if order.kind not in ("train", "evaluate"):
        return
    every, last = study.evaluate.every, study.rounds.count
    if not 1 <= order.round <= last:
        raise OrderRefused("ROUND_RANGE", f"round {order.round}: the study has {last}.")
    if order.kind == "evaluate":
        in_study = order.evaluate == "test" and every > 0 and order.round == last
    else:  # the weights that round n begins with are those of round n - 1
        scored = every > 0 and order.round > 1 and (order.round - 1) % every == 0
        in_study = order.evaluate is None or (order.evaluate == "val" and scored)
    if not in_study:
        raise OrderRefused(
            "SCORES_NOT_IN_STUDY",
            f"round {order.round}: {order.kind!r} asks for scores on {order.evaluate!r}. The study has evaluate.every "
            f"= {every}: validation after each so many rounds (0: never), the test after round {last}. Nothing was "
            f"read. Ask the coordinator why.",
        )


def no_gate(order: Order, site: Site, study: Study) -> None:
    """For learners without images."""


def carry_out(order: Order, weights: Arrays, site: Site, learner: Learner, gate: Gate = no_gate) -> Answer:
    """Scores the received weights where asked, trains where asked, and tells what may be told.

    Args:
        gate: asked before images are touched; refuses by raising.

    Raises:
        OrderRefused: the order does not hold together or asks for more than the study, the gate refuses it, or
            training left numbers that are not finite.
    """
    began = time.monotonic()
    study = study_of(order)
    check_asked(order, study, site)
    private = study.protect.privacy is not None
    reply = reply_to(order, site, "hello")
    if order.kind == "hello":
        untold = private or study.protect.secure_aggregation is not None  # neither tells of one site by itself
        held = Holding() if untold else learner.holding(site, study)
        return Answer(replace(reply, train_cases=held.train_cases, test_cases=held.test_cases))
    if order.kind != "statistics":  # whose order comes before there is a plan
        check_proof(order, site)
    patients = learner.holding(site, study).train_patients if private else 0
    if private:
        check_budget(order, study, site, patients)
    gate(order, site, study)
    if order.kind == "statistics":
        if study.plan == "given":
            raise OrderRefused("PLAN_GIVEN", f"run {order.run}: the study's plan is given, it needs no statistics.")
        from fedclient.fingerprint import site_fingerprint  # imports the image readers

        found = site_fingerprint(site, study)
        return Answer(replace(reply, kind="statistics", fingerprint=found, seconds=time.monotonic() - began))
    study = planned_study(order, study)
    alone = without_control(weights)
    if order.evaluate is not None:
        reply = _scored(reply, order, study, alone, site, learner, order.evaluate)
    if order.kind == "evaluate":
        reply = replace(reply, profile=_profile(order, study, alone, site, learner))
        if site.deployed:
            keep_final(memory_folder(site, order.run, order.study_sha256), study, alone)
        return Answer(replace(reply, kind="evaluation", seconds=time.monotonic() - began))
    spending = reserved(order, study, site, patients) if private else None
    learned, sent = _trained(order, study, weights, site, learner, spending)
    done = replace(reply, kind="update", steps=learned.steps, device=learned.device)
    if spending is not None:  # all else follows from the patients, and carries no noise
        spending.settle()
        return Answer(done, sent)
    done = replace(done, examples=learned.examples, losses=learned.losses, variance=learned.variance)
    return Answer(replace(done, seconds=time.monotonic() - began), sent)


def reply_to(order: Order, site: Site, kind: Any, **told: Any) -> Reply:
    """A reply that says whose it is and to which order, and what is `told`."""
    return Reply(
        kind=kind,
        site=site.name,
        run=order.run,
        round=order.round,
        attempt=order.attempt,
        study_sha256=order.study_sha256,
        base_sha256=order.base_sha256,
        plan_sha256=order.plan_sha256,
        **told,
    )


def _scored(
    reply: Reply, order: Order, study: Study, weights: Arrays, site: Site, learner: Learner, split: Split
) -> Reply:
    """`reply` with the scores of the shared model, and those of the site's own where it has one."""
    reply = replace(reply, scored=split, scores=learner.score(site, study, weights, split))
    own = own_model(order, study, weights, site, learner)
    if own is not None:
        reply = replace(reply, own_scores=learner.score(site, study, own, split))
    if order.kind == "evaluate" and study.task.kind == "classification" and split == "test":
        reply = replace(reply, validation=learner.score(site, study, weights, "val"))
    return reply


def _trained(
    order: Order, study: Study, weights: Arrays, site: Site, learner: Learner, spending: Spending | None
) -> tuple[Learned, Arrays]:
    """What training gave, and its delta as the study protects it; what the site remembers is kept.

    Raises:
        OrderRefused: of the learner; or it left numbers that are not finite.
    """
    folder = memory_folder(site, order.run, order.study_sha256)
    try:
        if remembers(study):
            last = recall(folder, order.counted)
            learned, memory = _rememberer(learner).learn_on(site, study, order.round, weights, last)
        else:
            learned, memory = learner.learn(site, study, order.round, weights), {}
    except OrderRefused as refused:
        if spending is not None:
            spending.give_back(refused)
        raise
    delta = {name: learned.weights[name] - weights[name] for name in weights}
    odd = [n for n, d in (*delta.items(), *memory.items()) if d.dtype.kind == "f" and not np.isfinite(d).all()]
    if odd:
        raise OrderRefused("TRAINING_DIVERGED", f"round {order.round}: {odd[0]!r} is not finite after training.")
    if study.protect.compression != "none":
        last = recall(folder, order.counted)
        residual = {name: array for name, array in last.items() if name.startswith(RESIDUAL)}
        sent, left = outgoing(study.protect, delta, residual)
        memory = {**memory, **left}
    else:
        sent, _ = outgoing(study.protect, delta, {})
    if memory:
        remember(folder, order.round, order.counted, memory)
    return learned, sent


def _profile(order: Order, study: Study, weights: Arrays, site: Site, learner: Learner) -> Profile | None:
    """What the final evaluation counts for drift, where the study wants it and there are cases enough to tell it."""
    if not study.evaluate.reference or order.evaluate != "test" or not isinstance(learner, Profiler):
        return None
    return learner.profile(site, study, weights)


def own_model(order: Order, study: Study, weights: Arrays, site: Site, learner: Learner) -> Arrays | None:
    """The site's own model on the weights of an order, where the study gives it one; the last one is kept at the site.

    Raises:
        OrderRefused: what it is made of is lost.
    """
    if not study.personal.any:
        return None
    folder, final = memory_folder(site, order.run, order.study_sha256), order.kind == "evaluate"
    kept = own_path(folder, order.base_sha256)
    if final and kept.exists():
        return load(kept)
    memory = recall(folder, order.counted) if remembers(study) else {}
    own = _rememberer(learner).own(site, study, weights, memory, tuned=final and study.personal.fine_tunes)
    if final and own is not None:
        save_arrays(kept, own)
    return own


def _rememberer(learner: Learner) -> Rememberer:
    if not isinstance(learner, Rememberer):
        raise OrderRefused("NO_MEMORY", "this client keeps nothing between rounds. Install the released client.")
    return learner


def refusal(order: Order, site: Site, code: str, keys: tuple[str, ...] = (), accused: str | None = None) -> Reply:
    """A refused order; the reason's words stay in the site's log."""
    return reply_to(order, site, "refusal", refusal=code, refusal_keys=keys, accused=accused)
