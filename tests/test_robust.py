"""Robust rules against brute force, Flower's own, and poisoners; what a spool makes of them in blocks of any size."""

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import fedserver.spool as spool
from fedserver.robust import Chosen, bulyan, centred, krum, rule_of
from fedserver.spool import Spool, inverse_variance
from shared_models.strategy import Strategy
from shared_models.weights import InMemory, OnDisk, open_tensors, save_arrays, schema_of
from simulations.engine import identify

Updates = NDArray[np.float32]  # [n, d]
RULES = {
    "median": Strategy(robust="median", malicious=2, weighting="uniform"),
    "trimmed_mean": Strategy(robust="trimmed_mean", malicious=2, weighting="uniform"),
    "krum": Strategy(robust="krum", malicious=2, weighting="uniform"),
    "multi_krum": Strategy(robust="multi_krum", malicious=2, weighting="uniform"),
    "bulyan": Strategy(robust="bulyan", malicious=2, weighting="uniform"),
    "norm_bound": Strategy(robust="norm_bound", weighting="uniform"),
    "centred_clip": Strategy(robust="centred_clip", weighting="uniform"),
}


def split(update: Updates) -> dict[str, Any]:
    """One vector as a model of two tensors and a counter."""
    return {"a": update[:3].reshape(3, 1), "b": update[3:], "n": np.array(4, np.int64)}


def spooled(folder: Path, updates: Updates, strategy: Strategy, order: list[int] | None = None) -> NDArray[np.float64]:
    """What the rule makes of `updates`, by way of files."""
    votes = Spool(schema_of(split(updates[0])), folder / "spool", strategy)
    for n in order or range(len(updates)):
        assert votes.add(f"s{n:02}", 1, InMemory(split(updates[n])), 1.0, 1.0)
    assert votes.take_mean("n") == 4
    return np.concatenate([votes.take_mean("a").reshape(-1), votes.take_mean("b")])


def drawn(sites: int = 11, size: int = 8, seed: int = 0) -> Updates:
    return np.random.default_rng(seed).normal(0, 1, (sites, size)).astype(np.float32)


# Against brute force, and what a paper says


def test_krum_is_the_update_nearest_to_its_nearest_others():
    updates = drawn(9).astype(np.float64)
    scores = []
    for i in range(9):
        others = sorted(float(((updates[i] - updates[j]) ** 2).sum()) for j in range(9) if j != i)
        scores.append(sum(others[: 9 - 2 - 2]))
    chosen = krum(2, lambda n: 1)(updates @ updates.T)
    assert chosen.rows == (int(np.argmin(scores)),)
    assert krum(2, lambda n: n - 4)(updates @ updates.T).rows == tuple(sorted(np.argsort(scores)[:5].tolist()))


def test_krum_picks_an_honest_update_whatever_the_others_send():
    honest = drawn(7, 20) * 0.1 + 1
    lie = np.full((2, 20), -5, np.float32)
    updates = np.concatenate([lie, honest]).astype(np.float64)
    assert krum(2, lambda n: 1)(updates @ updates.T).rows[0] >= 2
    assert not set(bulyan(1)(updates[1:] @ updates[1:].T).rows) & {0}


def test_bulyans_first_step_is_krum_again_and_again_without_what_it_has_taken():
    updates, left, taken = drawn(11).astype(np.float64), list(range(11)), list[int]()
    while len(taken) < 7:
        apart = {i: sorted(float(((updates[i] - updates[j]) ** 2).sum()) for j in left if j != i) for i in left}
        count = max(1, len(left) - 2 - 2)
        best = min(left, key=lambda i: sum(apart[i][:count]))
        left.remove(best)
        taken.append(best)
    assert bulyan(2)(updates @ updates.T).rows == tuple(sorted(taken))


def test_an_update_is_shortened_to_the_bound_or_to_the_median_norm(tmp_path):
    updates = np.zeros((3, 8), np.float32)
    updates[0, 0], updates[1, 1], updates[2, 2] = 1.0, 4.0, 100.0
    found = spooled(tmp_path, updates, RULES["norm_bound"])
    np.testing.assert_allclose(found[:3], np.array([1.0, 4.0, 4.0]) / 3)
    given_bound = spooled(tmp_path, updates, Strategy(robust="norm_bound", norm_bound=0.5))
    np.testing.assert_allclose(given_bound[:3], np.full(3, 0.5) / 3)


def test_an_update_is_shortened_towards_the_one_in_the_middle(tmp_path):
    updates = np.zeros((5, 8), np.float32)
    updates[:, 0] = 10.0  # which all agree on
    updates[1, 1], updates[2, 2], updates[3, 3], updates[4, 4] = 1.0, 2.0, 3.0, 50.0
    found = spooled(tmp_path, updates, RULES["centred_clip"])  # the median distance is 2, of 0, 1, 2, 3 and 50
    np.testing.assert_allclose(found[:5], np.array([50.0, 1.0, 2.0, 2.0, 2.0]) / 5)
    given_bound = spooled(tmp_path, updates, Strategy(robust="centred_clip", weighting="uniform", norm_bound=0.5))
    np.testing.assert_allclose(given_bound[:5], np.array([50.0, 0.5, 0.5, 0.5, 0.5]) / 5)


def test_the_middle_is_an_honest_update_whatever_fewer_than_half_send():
    honest = drawn(6, 20) * 0.1 + 1
    for lie in (np.full((5, 20), 30.0), np.zeros((5, 20)), -honest[:5]):
        updates = np.concatenate([lie, honest]).astype(np.float64)
        factors = np.array(centred(None)(updates @ updates.T).factors)
        assert int(np.argmax(factors)) >= 5
        mean = (updates * factors[:, None]).mean(axis=0)
        spread = np.linalg.norm(updates[5:, None] - updates[None, 5:], axis=2).max()
        assert np.linalg.norm(mean - honest.mean(axis=0)) <= 2 * spread


# Against Flower


def flowers(strategy: FlowerStrategy, updates: Updates) -> NDArray[np.float64]:
    identify()
    replies = []
    for update in updates:
        order = Message(RecordDict(), 1, "train")
        arrays = ArrayRecord({"w": FlowerArray(update)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, reply_to=order))
    record, _ = strategy.aggregate_train(1, replies)
    assert record is not None
    return record["w"].numpy()


@pytest.mark.parametrize(
    ("name", "flower"),
    [
        ("median", FedMedian()),
        ("trimmed_mean", FedTrimmedAvg(beta=2 / 11 + 1e-9)),
        ("krum", Krum(num_malicious_nodes=2)),
        ("multi_krum", MultiKrum(num_malicious_nodes=2, num_nodes_to_select=7)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_gives_what_flowers_gives(tmp_path, name, flower, seed):
    updates = drawn(seed=seed)
    np.testing.assert_allclose(spooled(tmp_path, updates, RULES[name]), flowers(flower, updates), atol=1e-6)


def test_bulyan_gives_what_flowers_gives_where_both_take_the_same_updates(tmp_path):
    """Flower 1.41 takes the best of one pass; its second step is the paper's."""
    updates = drawn()

    def ours(contents: list[RecordDict], malicious: int, count: int) -> list[RecordDict]:
        stacked = updates.astype(np.float64)
        rows = bulyan(malicious)(stacked @ stacked.T).rows
        assert len(rows) == count
        return [contents[row] for row in rows]

    flower = Bulyan(num_malicious_nodes=2, selection_rule=ours)
    np.testing.assert_allclose(spooled(tmp_path, updates, RULES["bulyan"]), flowers(flower, updates), atol=1e-6)


# Whatever the updates are

floats = st.floats(-8, 8, width=32)
sets = arrays(np.float32, st.tuples(st.integers(11, 13), st.just(6)), elements=floats)


@settings(max_examples=25, deadline=None)
@given(sets, st.sampled_from(sorted(RULES)), st.randoms(), st.integers(1, 40))
def test_order_of_arrival_and_size_of_the_blocks_do_not_show(tmp_path_factory, updates, name, random, values):
    folder = tmp_path_factory.mktemp("rule")
    whole = spooled(folder, updates, RULES[name])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spool, "VALUES", values)
        arrived = random.sample(range(len(updates)), k=len(updates))
        pieces = spooled(folder, updates, RULES[name], arrived)
    if name in ("median", "trimmed_mean"):
        assert pieces.tobytes() == whole.tobytes()
    elif name in ("norm_bound", "centred_clip"):
        np.testing.assert_allclose(pieces, whole, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_scales_with_its_updates_and_is_the_identity_for_equal_ones(tmp_path, name):
    updates = drawn(seed=5)
    found = spooled(tmp_path, updates, RULES[name])
    np.testing.assert_allclose(spooled(tmp_path, updates * 4, RULES[name]), 4 * found, rtol=1e-12)
    alike = np.repeat(updates[:1], 11, axis=0)
    np.testing.assert_allclose(spooled(tmp_path, alike, RULES[name]), updates[0], rtol=1e-12)


@pytest.mark.parametrize("name", ["median", "norm_bound", "centred_clip"])
def test_with_one_site_a_rule_without_a_least_number_is_that_sites_update(tmp_path, name):
    one = drawn(1)
    np.testing.assert_allclose(spooled(tmp_path, one, RULES[name]), one[0])


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
def test_the_result_lies_among_the_honest_whatever_two_others_send(tmp_path, name):
    honest = drawn(9)
    for lie in (1e3, -1e3):
        found = spooled(tmp_path, np.concatenate([honest, np.full((2, 8), lie, np.float32)]), RULES[name])
        assert (found >= honest.min(axis=0)).all()
        assert (found <= honest.max(axis=0)).all()


# The spool


def test_an_upload_is_kept_by_a_second_name_and_outlives_the_first(tmp_path):
    update = split(drawn(1)[0])
    save_arrays(tmp_path / "upload", update)
    votes = Spool(schema_of(update), tmp_path / "spool", RULES["median"])
    assert votes.add("north", 1, open_tensors(tmp_path / "upload", "north"), 1.0, 1.0)
    assert (tmp_path / "spool/north.safetensors").stat().st_ino == (tmp_path / "upload").stat().st_ino
    (tmp_path / "upload").unlink()
    np.testing.assert_array_equal(votes.take_mean("b"), update["b"])


def test_a_site_has_one_vote_and_it_is_the_newest(tmp_path):
    old, new = drawn(2)
    votes = Spool(schema_of(split(old)), tmp_path / "spool", RULES["median"])
    assert votes.add("north", 1, InMemory(split(old)), 1.0, 0.5)
    np.testing.assert_allclose(votes.take_mean("b"), 0.5 * old[3:])
    assert votes.add("north", 2, InMemory(split(new)), 1.0, 1.0)
    assert not votes.add("north", 1, InMemory(split(old)), 1.0, 0.5)
    np.testing.assert_allclose(votes.take_mean("b"), new[3:])
    assert len(list((tmp_path / "spool").iterdir())) == 1


def test_a_round_that_begins_again_begins_with_an_empty_spool(tmp_path):
    update = split(drawn(1)[0])
    Spool(schema_of(update), tmp_path / "spool", RULES["median"]).add("north", 1, InMemory(update), 1.0, 1.0)
    again = Spool(schema_of(update), tmp_path / "spool", RULES["median"])
    assert not again.votes
    assert not list((tmp_path / "spool").iterdir())


def test_a_part_of_a_tensor_is_read_from_its_file(tmp_path):
    update = split(drawn(1)[0])
    save_arrays(tmp_path / "u", update)
    found = open_tensors(tmp_path / "u", "u")
    assert isinstance(found, OnDisk)
    assert found.part("b", 1, 3).tolist() == update["b"][1:4].tolist()
    assert found.part("b", 4, 9).tolist() == update["b"][4:].tolist()
    assert found.part("n", 0, 1).tolist() == [4]


# Weights by variance


def test_the_variance_of_a_mean_is_least_with_shares_by_inverse_variance():
    variances = [1.0, 2.0, 0.5]
    shares = np.array(inverse_variance(list(variances))) / sum(inverse_variance(list(variances)))
    np.testing.assert_allclose(shares, np.array([2, 1, 4]) / 7)
    least = (shares**2 * variances).sum()
    for other in ([1 / 3] * 3, [0.5, 0.25, 0.25], [0.25, 0.15, 0.6]):
        assert least < (np.array(other) ** 2 * variances).sum()


def test_a_share_by_variance_is_bounded_and_one_that_is_not_told_is_the_median():
    assert inverse_variance([1.0, 1.0, 1e-12]) == [1.0, 1.0, 4.0]
    assert inverse_variance([1.0, 1.0, 1e12]) == [1.0, 1.0, 0.25]
    assert inverse_variance([0.5, None, 0.5]) == [2.0, 2.0, 2.0]
    assert inverse_variance([None, None]) == [1.0, 1.0]


# Poisoners (security.md, section 5): a linear classifier of 10 sites, two of which lie

Attack = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]  # honest delta, backdoored delta


def blobs(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Three classes in 10 dimensions; the last dimension is 0 but for the trigger of a backdoor."""
    labels = rng.integers(0, 3, count)
    images = rng.normal(0, 0.5, (count, 11))
    images[np.arange(count), labels] += 2.0
    images[:, 9], images[:, 10] = 0.0, 1.0
    return images, labels


def trained(
    weights: NDArray[np.float64], images: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Five steps of softmax regression."""
    for _ in range(5):
        logits = images @ weights
        chance = np.exp(logits - logits.max(axis=1, keepdims=True))
        chance /= chance.sum(axis=1, keepdims=True)
        chance[np.arange(len(labels)), labels] -= 1
        weights = weights - 0.5 * images.T @ chance / len(labels)
    return weights


ATTACKS: Mapping[str, Attack] = {
    "sign-flipping": lambda honest, _: -5 * honest,
    "scaling": lambda honest, _: 50 * np.roll(honest, 1, axis=1),
    "backdoor": lambda _, backdoored: 10 * backdoored,
}


def federated(strategy: Strategy, attack: Attack | None, sites: int = 10) -> tuple[float, float]:
    """Accuracy, and success of the backdoor (class 0 where dimension 9 is 3), after 12 rounds."""
    rng = np.random.default_rng(0)
    test, data = blobs(rng, 600), [blobs(rng, 60) for _ in range(sites)]
    weights = np.zeros((11, 3))
    for _ in range(12):
        updates = []
        for n, (images, labels) in enumerate(data):
            delta = trained(weights, images, labels) - weights
            if attack is not None and n < 2:
                marked = images.copy()
                marked[:, 9] = 3.0
                both = np.concatenate([images, marked]), np.concatenate([labels, np.zeros_like(labels)])
                delta = attack(delta, trained(weights, *both) - weights)
            updates.append(delta.reshape(-1))
        stacked = np.array(updates, np.float32).astype(np.float64)
        rule = rule_of(strategy)
        chosen = Chosen(tuple(range(sites)), (1.0,) * sites)
        if rule.choose is not None:
            chosen = rule.choose(stacked @ stacked.T)
        kept = stacked[list(chosen.rows)] * np.array(chosen.factors)[:, None]
        weights = weights + rule.combine(kept, np.full(len(kept), 1 / len(kept))).reshape(11, 3)
    marked = test[0][test[1] != 0].copy()
    marked[:, 9] = 3.0
    accuracy = float(((test[0] @ weights).argmax(1) == test[1]).mean())
    return accuracy, float(((marked @ weights).argmax(1) == 0).mean())


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_poisoners_of_ten_ruin_the_mean_and_no_robust_rule(attack):
    """Bulyan bears two among eleven: it needs 4 f + 3."""
    clean, _ = federated(Strategy(), None)
    accuracy, success = federated(Strategy(), ATTACKS[attack])
    assert accuracy < clean - 0.1 or success > 0.9
    for name in ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "centred_clip"):
        accuracy, success = federated(RULES[name], ATTACKS[attack], sites=11 if name == "bulyan" else 10)
        assert accuracy >= clean - 0.02, name
        assert success < 0.1, name


@pytest.mark.parametrize("attack", ["sign-flipping", "scaling"])
def test_updates_of_bounded_length_bear_what_lives_by_its_length(attack):
    clean, _ = federated(RULES["norm_bound"], None)
    assert federated(RULES["norm_bound"], ATTACKS[attack])[0] >= clean - 0.02


def test_why_a_bound_on_length_alone_does_not_bear_a_patient_backdoor():
    """Honest sites do not see the trigger, so nothing takes back what each round adds; a centre leaves less to add."""
    success = {name: federated(RULES[name], ATTACKS["backdoor"])[1] for name in ("norm_bound", "centred_clip")}
    assert success["norm_bound"] > 0.1
    assert success["centred_clip"] < 0.02


def test_bulyan_stays_among_the_honest_wherever_two_equal_liars_stand(tmp_path):
    honest = drawn(9, 8) * 0.1 + 1
    for liars in combinations(range(11), 2):
        updates = np.insert(honest, [min(liars), max(liars) - 1], -30.0, axis=0)
        found = spooled(tmp_path, updates, RULES["bulyan"])
        assert (found >= honest.min(axis=0)).all()
        assert (found <= honest.max(axis=0)).all()
