"""An order carried out by a learner without images: what is doubted, what is refused, and what may leave the site."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedclient.client import client_app
from fedclient.site import Site
from fedclient.work import Answer, Holding, Learned, Learner, carry_out, refusal, study_of
from shared_models.errors import (
    FederationError,
    ImageUnreadable,
    ManifestInvalid,
    OrderRefused,
    StudyInvalid,
    TransferFailed,
    WeightsInvalid,
)
from shared_models.metrics import counts
from shared_models.scores import Score
from shared_models.study import Evaluate, Rounds, Study, Train, canonical, sha256
from shared_models.weights import Arrays
from shared_models.wire import Order, Reply, Split, dump, pack, read_reply, tensors_of, write_order
from simulations.engine import identify
from tests.toys import WEIGHTS, ToyLearner

STUDY = Study(name="toy")
BASE = "b" * 64
HERE = Site("north", Path("/nowhere"), Path("/nowhere"), (), "cpu", 1, 11, "salt", deployed=False)


def order(kind: str = "train", **change: object) -> Order:
    made = Order(kind, "toy-1", 3, 2, canonical(STUDY).decode(), sha256(STUDY), BASE)  # type: ignore[arg-type]
    return replace(made, **change)  # type: ignore[arg-type]


FINAL = order("evaluate", evaluate="test", round=STUDY.rounds.count)


def answered(of: Order, learner: Learner | None = None) -> Answer:
    return carry_out(of, WEIGHTS, HERE, learner or ToyLearner())


# What is done


def test_a_training_order_is_answered_with_the_difference_and_the_words_of_the_order():
    done = answered(order(), ToyLearner(moves={"north": 0.25}, examples={"north": 17}))
    assert {n: d.dtype for n, d in done.delta.items()} == {n: w.dtype for n, w in WEIGHTS.items()}
    assert (done.delta["body.bias"] == 0.25).all()
    assert done.delta["steps"].tolist() == [2]
    assert done.reply == Reply(
        "update", "north", "toy-1", 3, 2, sha256(STUDY), BASE, examples=17, steps=3, seconds=done.reply.seconds,
        losses=(1.0, 0.5), device="cpu",
    )  # fmt: skip


@dataclass(frozen=True)
class Noting(ToyLearner):
    """Notes what is scored: the weights as they came, and not as they are after training."""

    def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
        assert all(weights[n].tobytes() == w.tobytes() for n, w in WEIGHTS.items())
        return {"lung": counts([0.25] if split == "val" else [0.75])}


def test_the_received_weights_are_scored_where_that_is_asked():
    done = answered(order(evaluate="val"), Noting())
    assert done.reply.kind == "update"
    assert done.reply.scored == "val"
    assert done.reply.scores["lung"].value == 0.25
    assert done.delta


def test_an_evaluation_trains_nothing_and_sends_no_tensor():
    @dataclass(frozen=True)
    class Scoring(Noting):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            raise AssertionError("was trained")

    done = answered(FINAL, Scoring())
    assert (done.reply.kind, done.reply.scored, done.reply.examples) == ("evaluation", "test", 0)
    assert done.reply.scores["lung"].value == 0.75
    assert done.delta == {}


def test_hello_tells_how_many_cases_there_are_and_touches_no_weights():
    done = carry_out(order("hello"), {}, HERE, ToyLearner())
    assert (done.reply.kind, done.reply.train_cases, done.reply.test_cases) == ("hello", 8, 2)
    assert done.delta == {}


def test_the_order_is_handed_to_the_learner_as_it_came():
    asked: list[object] = []

    @dataclass(frozen=True)
    class Asking(ToyLearner):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            asked.extend([site, study, round_number, weights])
            return ToyLearner.learn(self, site, study, round_number, weights)

    answered(order(), Asking())
    assert asked == [HERE, STUDY, 3, WEIGHTS]


# The gate


@pytest.mark.parametrize("of", [order(evaluate="val"), FINAL, order("statistics")], ids=lambda of: of.kind)
def test_an_order_that_the_gate_refuses_touches_no_image(of):
    asked: list[object] = []

    def closed(of: Order, site: Site, study: Study) -> None:
        asked.extend([of, site, study])
        raise OrderRefused("DATA_NOT_READY", "Jane_Doe")

    @dataclass(frozen=True)
    class Untouched(ToyLearner):
        def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
            raise AssertionError("was trained")

        def score(self, site: Site, study: Study, weights: Arrays, split: Split) -> Mapping[str, Score]:
            raise AssertionError("was scored")

    with pytest.raises(OrderRefused, match="Jane_Doe") as refused:
        carry_out(of, WEIGHTS, HERE, Untouched(), closed)
    assert refused.value.code == "DATA_NOT_READY"
    assert asked == [of, HERE, STUDY]
    assert carry_out(order("hello"), {}, HERE, ToyLearner(), closed).reply.train_cases == 8  # counts, no image


# What is doubted


@pytest.mark.parametrize(
    "change",
    [
        {"study_sha256": "c" * 64},
        {"study": canonical(replace(STUDY, train=Train(local_epochs=1000))).decode()},
        {"study": canonical(replace(STUDY, seed=1)).decode()},
    ],
)
def test_a_study_that_is_not_the_one_named_is_refused_also_after_the_right_one_was_seen(change):
    for _ in range(2):
        with pytest.raises(OrderRefused, match="not the one that the order names") as refused:
            answered(order(**change))
        assert refused.value.code == "STUDY_MISMATCH"
        assert answered(order()).delta


def code(study: Study, kind: str, number: int, split: Split | None) -> str | None:
    """Of the refusal, which comes before the gate and any image; None of an order that is let through."""

    class Through(Exception):
        pass

    def gate(of: Order, site: Site, study: Study) -> None:
        raise Through

    of = order(kind, round=number, evaluate=split, study=canonical(study).decode(), study_sha256=sha256(study))
    try:
        carry_out(of, WEIGHTS, HERE, ToyLearner(), gate)
    except OrderRefused as refused:
        return refused.code
    except Through:
        return None
    raise AssertionError("the gate was not asked")


NOT_IN_STUDY = "SCORES_NOT_IN_STUDY"


@pytest.mark.parametrize(
    ("every", "kind", "number", "split", "refused"),
    [
        (3, "train", 1, None, None),
        (3, "train", 4, "val", None),
        (3, "train", 7, "val", None),
        (3, "train", 4, None, None),
        (3, "evaluate", 8, "test", None),
        (3, "train", 1, "val", NOT_IN_STUDY),  # of the first weights, whom nobody has trained
        (3, "train", 5, "val", NOT_IN_STUDY),
        (3, "train", 4, "test", NOT_IN_STUDY),
        (3, "evaluate", 8, "val", NOT_IN_STUDY),
        (3, "evaluate", 8, None, NOT_IN_STUDY),
        (3, "evaluate", 4, "test", NOT_IN_STUDY),
        (0, "train", 2, None, None),
        (0, "train", 2, "val", NOT_IN_STUDY),
        (0, "train", 1, "test", NOT_IN_STUDY),
        (0, "evaluate", 8, "test", NOT_IN_STUDY),
        (3, "train", 0, None, "ROUND_RANGE"),
        (3, "train", 9, None, "ROUND_RANGE"),
        (3, "evaluate", 7000, "test", "ROUND_RANGE"),
        (3, "evaluate", 0, "test", "ROUND_RANGE"),
    ],
)
def test_rounds_and_scores_are_those_of_the_study_and_not_what_the_order_says(every, kind, number, split, refused):
    assert code(Study(name="toy", rounds=Rounds(count=8), evaluate=Evaluate(every)), kind, number, split) == refused


def test_a_study_is_known_by_its_very_bytes():
    text = '{ "name" : "toy" }'
    with pytest.raises(OrderRefused, match="not the one that the order names"):
        study_of(order(study=text))
    named = replace(order(study=text), study_sha256=hashlib.sha256(text.encode()).hexdigest())
    assert study_of(named) == STUDY


def test_a_study_that_cannot_be_used_is_refused():
    with pytest.raises(StudyInvalid, match="study of run toy-1: `code` is not a key here"):
        answered(order(study='{"name":"toy","code":"import os"}'))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["body.weight", "body.bias"])
def test_training_that_left_no_finite_numbers_is_not_sent(name, value):
    def spoil(trained: dict[str, np.ndarray]) -> None:
        trained[name] = trained[name].copy()
        trained[name].reshape(-1)[-1] = value

    with pytest.raises(OrderRefused, match=f"round 3: '{name}' is not finite after training") as refused:
        answered(order(), ToyLearner(spoil={"north": spoil}))
    assert refused.value.code == "TRAINING_DIVERGED"


def test_a_refusal_tells_a_code_and_nothing_else():
    reply = refusal(order(), HERE, "NO_CASES")
    assert reply == Reply("refusal", "north", "toy-1", 3, 2, sha256(STUDY), BASE, refusal="NO_CASES")


# The shell around it


@dataclass(frozen=True)
class Failing(ToyLearner):
    error: Exception = field(default_factory=RuntimeError)

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        raise self.error

    def holding(self, site: Site, study: Study) -> Holding:
        raise self.error


def told(learner: Learner, of: Order | None = None) -> tuple[Reply, Message]:
    """What the coordinator hears from a node with this learner."""
    identify()
    sent = write_order(of or order(), 1, pack(WEIGHTS))
    config: dict[str, bool | float | int | str] = {"site": "north", "data": "d", "work": "w"}
    message = client_app(learner)(sent, Context(1, 1, config, RecordDict(), {}))
    return read_reply(message, "north"), message


def test_the_app_answers_with_facts_and_tensors():
    reply, message = told(ToyLearner())
    tensors = tensors_of(message, "north")
    assert reply.kind == "update"
    assert tensors is not None
    assert tensors.keys() == WEIGHTS.keys()


@pytest.mark.parametrize(("of", "kind"), [(order("hello"), "hello"), (FINAL, "evaluation")])
def test_an_answer_without_tensors_has_none(of, kind):
    reply, message = told(ToyLearner(), of)
    assert reply.kind == kind
    assert tensors_of(message, "north") is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OrderRefused("NO_CASES", "/data/of/Jane_Doe"), "NO_CASES"),
        (ImageUnreadable("row 3: /data/of/Jane_Doe.nii.gz"), "DATA_INVALID"),
        (ManifestInvalid("Jane_Doe"), "DATA_INVALID"),
        (WeightsInvalid("Jane_Doe"), "WEIGHTS_MISMATCH"),
        (TransferFailed("Jane_Doe"), "TRANSFER_FAILED"),
        (StudyInvalid("Jane_Doe"), "STUDY_INVALID"),
        (FederationError("Jane_Doe"), "SITE_ERROR"),
    ],
)
def test_the_coordinator_hears_a_code_and_never_the_words(caplog, error, code):
    reply, message = told(Failing(error=error))
    assert (reply.kind, reply.refusal, reply.examples) == ("refusal", code, 0)
    assert b"Jane_Doe" not in dump(reply)
    assert list(message.content) == ["facts"]
    assert "Jane_Doe" in caplog.text  # the site's own log has them
