"""What may be added to a round, and that the sum does not care about order."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared_models.errors import UpdateRejected
from shared_models.update import MOST_WEIGHT, UNIT, Expected, Total, Update, admit, weight_of
from shared_models.weights import BLOCK, Arrays, InMemory, schema_of

MODEL: Arrays = {"w": np.zeros((2, 3), np.float32), "n": np.zeros(1, np.int64)}
EXPECTED = Expected("run", 3, "a" * 64, "b" * 64, schema_of(MODEL), most_examples=1000)
GOOD = Update("north", "run", 3, "a" * 64, "b" * 64, InMemory(MODEL), 10)
deltas = arrays(np.float32, (2, 3), elements=st.floats(-64, 64, width=32))
sent = st.lists(st.tuples(deltas, st.integers(1, 10**6)), min_size=1, max_size=6)


def mean_of(updates: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    total = Total(schema_of({"w": MODEL["w"]}))
    for delta, weight in updates:
        total.add(InMemory({"w": delta}), weight)
    return total.take_mean("w"), total.weight


@given(sent, st.randoms())
def test_arrival_order_does_not_matter_not_even_in_the_last_bit(updates, random):
    shuffled = random.sample(updates, k=len(updates))
    assert mean_of(updates)[0].tobytes() == mean_of(shuffled)[0].tobytes()


@given(sent)
def test_the_mean_is_the_weighted_mean(updates):
    mean, weight = mean_of(updates)
    wanted = sum(d.astype(np.float64) * w for d, w in updates) / sum(w for _, w in updates)
    np.testing.assert_allclose(mean, wanted, atol=len(updates) * UNIT / weight, rtol=1e-12)


@given(deltas, st.integers(1, 1000), st.integers(1, 1000))
def test_one_site_alone_gets_its_own_delta_whatever_its_weight(delta, one, other):
    np.testing.assert_allclose(mean_of([(delta, one)])[0], mean_of([(delta, other)])[0], atol=2 * UNIT)


def test_blocks_do_not_show_in_the_sum():
    big = np.linspace(-1, 1, 2 * BLOCK + 17, dtype=np.float32)
    total = Total(schema_of({"w": big}))
    total.add(InMemory({"w": big}), 3)
    np.testing.assert_allclose(total.take_mean("w"), big, atol=UNIT)


def test_whole_numbers_come_back_as_whole_numbers():
    total = Total(schema_of({"n": MODEL["n"]}))
    for step, weight in [(4, 1), (5, 2)]:
        total.add(InMemory({"n": np.array([step], np.int64)}), weight)
    mean = total.take_mean("n")
    assert mean.dtype == np.int64
    assert mean.tolist() == [5]


def test_the_sum_of_weights_is_bounded_so_that_it_cannot_overflow():
    total = Total(schema_of({"w": MODEL["w"]}))
    worst = InMemory({"w": np.full((2, 3), 64, np.float32)})
    total.add(worst, MOST_WEIGHT - 1)
    with pytest.raises(ValueError, match="sum of weights"):
        total.add(worst, 2)
    np.testing.assert_allclose(total.take_mean("w"), 64)


def spoilt(array: np.ndarray) -> InMemory:
    return InMemory({"w": array, "n": MODEL["n"]})


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"delta": spoilt(np.full((2, 3), np.nan, np.float32))}, "UPDATE_NONFINITE", "'w' holds NaN or infinity"),
        ({"delta": spoilt(np.full((2, 3), -np.inf, np.float32))}, "UPDATE_NONFINITE", "'w' holds NaN or infinity"),
        ({"delta": spoilt(np.full((2, 3), 65, np.float32))}, "UPDATE_RANGE", "moved by 65, allowed is 64"),
        ({"delta": spoilt(np.zeros((1, 3), np.float32))}, "UPDATE_SCHEMA", r"shape \[1, 3\], the model has \[2, 3\]"),
        ({"delta": spoilt(np.zeros(1, np.float32))}, "UPDATE_SCHEMA", r"shape \[1\], the model has \[2, 3\]"),
        ({"delta": spoilt(np.zeros((2, 3)))}, "UPDATE_SCHEMA", "'w' is float64, the model has float32"),
        ({"delta": InMemory({"w": MODEL["w"]})}, "UPDATE_SCHEMA", "'n' is missing"),
        ({"delta": InMemory({**MODEL, "x": MODEL["w"]})}, "UPDATE_SCHEMA", "'x' is not in the model"),
        ({"examples": -9}, "EXAMPLES_RANGE", "claims -9 examples"),
        ({"examples": 0}, "EXAMPLES_RANGE", "claims 0 examples"),
        ({"examples": 10**9}, "EXAMPLES_RANGE", "allowed are 1 to 1000"),
        ({"round": 2}, "STALE_ROUND", "answers round 2"),
        ({"run": "other"}, "OTHER_RUN", "answers run 'other'"),
        ({"study_sha256": "c" * 64}, "OTHER_STUDY", "trained for another study"),
        ({"base_sha256": "c" * 64}, "OTHER_WEIGHTS", "did not start from this round's weights"),
    ],
)
def test_each_kind_of_bad_update_is_refused_in_its_own_words(change, code, words):
    with pytest.raises(UpdateRejected, match=words) as refused:
        admit(replace(GOOD, **change), EXPECTED)
    assert refused.value.code == code
    assert str(refused.value).startswith("round 3, site 'north': ")


@settings(max_examples=30)
@given(deltas)
def test_a_good_update_passes_as_it_came(delta):
    update = replace(GOOD, delta=spoilt(delta))
    assert admit(update, EXPECTED) is update


def test_stale_and_uniform_weights_are_whole_numbers_above_zero():
    assert weight_of(10, "examples") == 10
    assert weight_of(10, "examples", 0.5) == 5
    assert weight_of(1, "examples", 0.1) == 1
    assert weight_of(10**6, "uniform") == weight_of(1, "uniform") == 2 * weight_of(3, "uniform", 0.5)
