"""What the updates of a round become: FedNova's and inverse-variance means by hand, and SCAFFOLD's control variate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedserver.aggregation import Fold, fold, way
from fedserver.checkpoint import create_run, finish_round, read_state
from fedserver.optimizers import fedavg
from shared_models.control import CONTROL
from shared_models.errors import UpdateRejected
from shared_models.study import Rounds, Strategy, Study, Train
from shared_models.update import Total
from shared_models.weights import Arrays, InMemory, load, schema_of
from shared_models.wire import Reply

NOVA = Study(
    name="s",
    train=Train(optimizer="sgd", momentum=0.0, batch_size=5, local_epochs=2),
    strategy=Strategy(normalise_steps=True),
    rounds=Rounds(late_weight=0.5),
)
LIKE: Arrays = {"w": np.zeros(3, np.float32), "n": np.zeros(1, np.int64)}


def reply(site: str, examples: int, steps: int, variance: float | None = None) -> Reply:
    digest = "a" * 64
    return Reply("update", site, "r", 1, 1, digest, digest, examples=examples, steps=steps, variance=variance)


def added(into: Fold, site: str, move: float, examples: int, steps: int, round_number: int = 1) -> bool:
    delta = InMemory({"w": np.full(3, move, np.float32), "n": np.array([2])})
    return into.add(site, round_number, delta, reply(site, examples, steps))


def test_fednova_is_the_mean_of_single_steps_times_the_mean_number_of_steps(tmp_path):
    """Wang et al. 2020, equation 6: 10 and 30 examples, 4 and 12 steps of 0.25 and of 0.5."""
    updates = fold(NOVA, 1, schema_of(LIKE), tmp_path)
    assert added(updates, "small", 4 * 0.25, 10, 4)
    assert added(updates, "large", 12 * 0.5, 30, 12)
    step, length = (10 * 0.25 + 30 * 0.5) / 40, (10 * 4 + 30 * 12) / 40
    np.testing.assert_allclose(updates.take_mean("w"), step * length, rtol=1e-6)
    assert updates.take_mean("n") == [2]


def test_the_order_of_arrival_does_not_show_in_fednova(tmp_path):
    sent = [("a", 0.3, 10, 4), ("b", -0.7, 35, 14), ("c", 0.11, 25, 10)]
    found = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        updates = fold(NOVA, 1, schema_of(LIKE), tmp_path)
        for n in order:
            added(updates, *sent[n])
        found.append(updates.take_mean("w").tobytes())
    assert len(set(found)) == 1


def test_sites_of_equal_steps_are_averaged_as_ever(tmp_path):
    nova, plain = (
        fold(study, 1, schema_of(LIKE), tmp_path) for study in (NOVA, replace(NOVA, strategy=Strategy()))
    )  # fmt: skip
    for updates in (nova, plain):
        added(updates, "a", 0.5, 20, 8)
        added(updates, "b", 1.5, 20, 8)
    np.testing.assert_allclose(nova.take_mean("w"), plain.take_mean("w"), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_length_of_a_way_is_how_far_steps_of_one_go(momentum):
    velocity = at = 0.0
    for _ in range(7):
        velocity = momentum * velocity + 1
        at += velocity
    assert way(7, momentum) == pytest.approx(at)


@pytest.mark.parametrize("momentum", [0.2, 0.79, 0.92, 0.93, 0.99, 0.999])
def test_a_site_of_a_single_step_counts_at_every_momentum(tmp_path, momentum):
    study = replace(NOVA, train=replace(NOVA.train, momentum=momentum, local_epochs=1))
    assert way(1, momentum) == 1.0
    updates = fold(study, 1, schema_of(LIKE), tmp_path)
    assert added(updates, "small", 0.5, 2, 1)
    np.testing.assert_allclose(updates.take_mean("w"), 0.5, rtol=1e-6)


def test_steps_that_do_not_follow_from_the_examples_are_not_believed(tmp_path):
    updates = fold(NOVA, 1, schema_of(LIKE), tmp_path)
    with pytest.raises(UpdateRejected, match="tells 1 steps, its 23 examples make 10") as rejected:
        added(updates, "liar", 1.0, 23, 1)
    assert rejected.value.code == "STEPS_RANGE"
    assert added(updates, "honest", 1.0, 23, 10)
    np.testing.assert_allclose(updates.take_mean("w"), 1.0, rtol=1e-6)


def test_a_mean_by_inverse_variance_is_by_hand_and_an_old_update_weighs_less(tmp_path):
    study = Study(name="s", strategy=Strategy(weighting="inverse_variance"), rounds=Rounds(late_weight=0.5))
    updates = fold(study, 2, schema_of(LIKE), tmp_path / "spool")
    sent = (("a", 1.0, 1.0, 2), ("b", 2.0, 0.5, 2), ("c", 8.0, 1.0, 1))
    for site, move, variance, number in sent:
        delta = InMemory({"w": np.full(3, move, np.float32), "n": np.array([2])})
        assert updates.add(site, number, delta, reply(site, 10, 3, variance))
    np.testing.assert_allclose(updates.take_mean("w"), (1 * 1 + 2 * 2 + 0.5 * 8) / 3.5, rtol=1e-12)


def test_scaffolds_control_variate_is_the_mean_over_all_sites_that_were_ever_counted(tmp_path):
    train = Train(scaffold=True, optimizer="sgd", momentum=0.0)
    study = Study(name="s", train=train, strategy=Strategy(weighting="uniform"))
    run = create_run(tmp_path, "r", study, {"w": np.zeros(3, np.float32)})
    assert load(run.weights(0))[CONTROL + "w"].tolist() == [0, 0, 0]

    def play(changes: dict[str, float]) -> None:
        names = ("w", CONTROL + "w")
        total = Total(schema_of(dict.fromkeys(names, LIKE["w"])))
        for change in changes.values():
            arrays = {"w": np.ones(3, np.float32), CONTROL + "w": np.full(3, change, np.float32)}
            total.add(InMemory(arrays), 1024)
        finish_round(run, read_state(run), total, fedavg(0.5), tuple(sorted(changes)), {})

    def control(number: int) -> float:
        return float(load(run.weights(number))[CONTROL + "w"][0])

    play({"a": 2.0, "b": 4.0})
    assert control(1) == pytest.approx((2 + 4) / 2)
    play({"a": 1.0})
    assert control(2) == pytest.approx((3 + 4) / 2)
    play({"a": 0.0, "b": 0.0, "c": 6.0})
    assert control(3) == pytest.approx((3 + 4 + 6) / 3)
    assert load(run.weights(3))["w"].tolist() == [1.5, 1.5, 1.5]


def test_a_factor_that_could_overflow_the_sum_is_refused():
    total = Total(schema_of(LIKE))
    for factor in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="must lie above 0 and not above 1"):
            total.add(InMemory(LIKE), 1, factor)


def test_steps_follow_from_examples():
    assert Train(batch_size=5, local_epochs=2).steps(23) == 10
    assert Train(batch_size=5, local_steps=7).steps(23) == 7


def test_a_rule_over_all_updates_is_spooled_and_a_mean_is_not(tmp_path):
    study = Study(name="s", strategy=Strategy(robust="median", weighting="uniform"))
    assert fold(study, 1, schema_of(LIKE), tmp_path / "spool").one_vote
    assert not fold(NOVA, 1, schema_of(LIKE), Path("/nowhere")).one_vote
