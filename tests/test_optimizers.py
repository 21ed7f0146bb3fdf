"""Server optimizers against their closed forms; in pieces they do what they do on the whole."""

import numpy as np
import pytest
import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi
from flwr.serverapp.strategy.fedopt import FedOpt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import fedserver.optimizers as optimizers
from fedserver.optimizers import (
    Optimizer,
    Slots,
    advance,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedyogi,
    optimizer_of,
)
from shared_models.study import Strategy
from shared_models.weights import Array
from simulations.engine import identify

ALL = {
    "fedavg": fedavg(), "half": fedavg(0.5), "fedavgm": fedavgm(0.75, 0.9),
    "fedadam": fedadam(0.1), "fedyogi": fedyogi(0.1), "fedadagrad": fedadagrad(0.1, 0.5),
}  # fmt: skip
shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
numbers = st.floats(-8, 8, width=32)


def zeros(optimizer: Optimizer, weights: Array) -> Slots:
    """What a server optimizer begins with."""
    return {slot: np.full(weights.shape, start, np.float32) for slot, start in optimizer.slots.items()}


def played(optimizer: Optimizer, weights: Array, deltas: list[Array]) -> Array:
    slots = zeros(optimizer, weights)
    for delta in deltas:
        weights, slots = advance(optimizer, weights, delta, slots)
    return weights


@given(arrays(np.float32, (3, 2), elements=numbers), arrays(np.float64, (3, 2), elements=numbers))
def test_fedavg_adds_the_mean_and_its_learning_rate_scales_it(weights, delta):
    np.testing.assert_array_equal(played(fedavg(), weights, [delta]), (weights.astype(float) + delta).astype("f4"))
    moved = played(fedavg(0.25), weights, [delta])
    np.testing.assert_array_equal(moved, (weights.astype(float) + 0.25 * delta).astype("f4"))


@given(st.lists(arrays(np.float64, 4, elements=numbers), min_size=1, max_size=6), st.floats(0, 0.99), st.floats(0.1, 2))
def test_fedavgm_is_the_sum_of_all_deltas_with_fading_weights(deltas, momentum, learning_rate):
    """v_t = sum over s of momentum^(t - s) delta_s, and w_T = w_0 + learning_rate * sum of v_t."""
    velocities = [sum(momentum ** (t - s) * deltas[s] for s in range(t + 1)) for t in range(len(deltas))]
    wanted = 1.0 + learning_rate * np.sum(velocities, axis=0)
    found = played(fedavgm(learning_rate, momentum), np.ones(4, np.float32), deltas)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_fedavgm_is_torchs_sgd_with_momentum_on_the_negative_mean():
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=5) for _ in range(6)]
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weights], lr=0.3, momentum=0.8)
    for delta in deltas:
        weights.grad = -torch.from_numpy(delta)
        sgd.step()
    found = played(fedavgm(0.3, 0.8), np.zeros(5, np.float32), deltas)
    np.testing.assert_allclose(found, weights.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_fedavgm_without_momentum_is_fedavg():
    deltas = [np.full(3, d) for d in (0.5, -2.0, 0.25)]
    start = np.ones(3, np.float32)
    assert played(fedavgm(0.5, 0.0), start, deltas).tobytes() == played(fedavg(0.5), start, deltas).tobytes()


def test_one_step_of_each_adaptive_optimizer_is_the_one_done_by_hand():
    """Reddi et al. 2021, Algorithm 2, with tau = 0.1, so that v starts at 0.01; delta = 0.2 and -0.3."""
    delta, start = np.array([0.2, -0.3]), np.zeros(2, np.float32)
    first = np.array([0.02, -0.03])  # 0.1 delta
    by_hand = {
        "fedadam": first / (np.sqrt([0.99 * 0.01 + 0.01 * 0.04, 0.99 * 0.01 + 0.01 * 0.09]) + 0.1),
        "fedyogi": first / (np.sqrt([0.01 + 0.01 * 0.04, 0.01 + 0.01 * 0.09]) + 0.1),
        "fedadagrad": first / (np.sqrt([0.01 + 0.04, 0.01 + 0.09]) + 0.1),
    }
    made = {
        "fedadam": fedadam(2.0, 0.9, 0.99, 0.1),
        "fedyogi": fedyogi(2.0, 0.9, 0.99, 0.1),
        "fedadagrad": fedadagrad(2.0, 0.9, 0.1),
    }
    for name, optimizer in made.items():
        np.testing.assert_allclose(played(optimizer, start, [delta]), 2.0 * by_hand[name], rtol=1e-6)


def test_yogis_second_moment_falls_by_a_step_of_the_square_where_it_is_above_it():
    optimizer = fedyogi(1.0, 0.0, 0.9, 1e-3)
    slots: Slots = {"first": np.zeros(2, np.float32), "second": np.array([1.0, 0.01], np.float32)}
    _, after = advance(optimizer, np.zeros(2, np.float32), np.array([0.5, 0.5]), slots)
    np.testing.assert_allclose(after["second"], [1.0 - 0.1 * 0.25, 0.01 + 0.1 * 0.25], rtol=1e-6)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_an_adaptive_optimizer_moves_as_flowers_does(name):
    """Flower starts v at 0, which is put right here, and corrects the rate of FedAdam alone, which is taken out."""
    rate, beta1, beta2, tau, start = 0.1, 0.9, 0.99, 1e-2, np.full(5, 0.5)
    words = {"eta": rate, "tau": tau} | ({} if name == "fedadagrad" else {"beta_1": beta1, "beta_2": beta2})
    flower = {"fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}[name](**words)
    flower.v_t = {"w": np.full(5, tau**2)}
    rng, theirs, ours = np.random.default_rng(3), start, start
    slots: Slots = {"first": np.zeros(5), "second": np.full(5, tau**2)}
    for number in range(1, 6):
        delta, factor = rng.normal(0, 0.1, 5), 1.0
        if name == "fedadam":
            factor = np.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
        made = {
            "fedadam": fedadam(rate * factor, beta1, beta2, tau),
            "fedyogi": fedyogi(rate, beta1, beta2, tau),
            "fedadagrad": fedadagrad(rate, 0.0, tau),
        }[name]
        ours, slots = made.step(ours, delta, slots)
        theirs = flowers(flower, number, theirs, delta)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def flowers(strategy: FedOpt, number: int, weights: Array, delta: Array) -> Array:
    """One round of Flower's: a site that began from `weights` sends what it ended with."""
    identify()
    strategy.current_arrays = {"w": weights}
    content = RecordDict(
        {"arrays": ArrayRecord({"w": FlowerArray(weights + delta)}), "metrics": MetricRecord({"num-examples": 1})}
    )
    record, _ = strategy.aggregate_train(number, [Message(content, reply_to=Message(RecordDict(), 1, "train"))])
    assert record is not None
    return record["w"].numpy()


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(ALL)), shapes, st.integers(1, 9))
def test_in_pieces_it_is_what_it_is_on_the_whole(data, name, shape, block):
    weights = data.draw(arrays(np.float32, shape, elements=numbers))
    delta = data.draw(arrays(np.float64, shape, elements=numbers))
    slots = {slot: np.abs(data.draw(arrays(np.float32, shape, elements=numbers))) for slot in ALL[name].slots}
    whole, kept = ALL[name].step(weights, delta, slots)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optimizers, "BLOCK", block)
        pieces, kept_in_pieces = advance(ALL[name], weights, delta, slots)
    assert (pieces.dtype, pieces.shape) == (weights.dtype, weights.shape)
    assert pieces.tobytes() == np.asarray(whole).tobytes()
    assert {s: (a.dtype, a.shape, a.tobytes()) for s, a in kept_in_pieces.items()} == {
        s: (np.dtype(np.float32), shape, np.asarray(a).tobytes()) for s, a in kept.items()
    }


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_whole_numbers_move_by_the_whole_mean_and_stay_what_they_are(name, dtype):
    weights, slots = np.array([7, 0, 200], dtype), zeros(ALL[name], np.zeros(3))
    for _ in range(3):
        weights, slots = advance(ALL[name], weights, np.array([2, 0, -3], np.int64), slots)
    assert weights.dtype == dtype
    assert weights.tolist() == [13, 0, 191]
    assert all((slot == np.float32(ALL[name].slots[kind])).all() for kind, slot in slots.items())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_type_of_the_weights_stays(name, dtype):
    assert played(ALL[name], np.ones(3, dtype), [np.full(3, 0.25)]).dtype == dtype


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_is_given_is_changed(name):
    weights, delta = np.ones((2, 3), np.float32), np.full((2, 3), 0.5)
    slots = {slot: np.ones((2, 3), np.float32) for slot in ALL[name].slots}
    for array in (weights, delta, *slots.values()):
        array.flags.writeable = False
    moved, kept = advance(ALL[name], weights, delta, slots)
    assert not np.shares_memory(moved, weights)
    assert all(not np.shares_memory(kept[s], slots[s]) for s in slots)


def test_small_steps_are_not_lost_in_the_sum_of_weight_and_delta():
    """float32 weights and a float64 mean: added as float64, rounded once."""
    weights, delta = np.array([1.0], np.float32), np.array([2**-24 * 1.5])
    assert played(fedavg(), weights, [delta])[0] == np.float32(1.0 + 2**-23)


def test_the_study_names_the_optimizer():
    delta = [np.ones(2)] * 2
    start = np.zeros(2, np.float32)
    assert played(optimizer_of(Strategy(server_learning_rate=0.5)), start, delta).tolist() == [1.0, 1.0]
    momentum = Strategy(name="fedavgm", momentum=0.5)
    assert played(optimizer_of(momentum), start, delta).tolist() == [2.5, 2.5]
    assert optimizer_of(Strategy(momentum=0.5)).slots == {}
    assert optimizer_of(momentum).slots == {"velocity": 0.0}
