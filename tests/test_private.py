"""DP-SGD by patient: what one patient can change, who is in a lot, what the noise is, and an audit of the claim."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fedclient.data.cache import Facts, Stored
from fedclient.data.cases import Case
from fedclient.data.dataset import Batch, DataSet
from fedclient.training.chance import Chance
from fedclient.training.private import (
    CLIP,
    check_network,
    clipped,
    fit_private,
    lot_sum,
    patients_of,
    poisson_lots,
    train_privately,
)
from shared_models.errors import OrderRefused
from shared_models.preprocess import Geometry
from shared_models.protect.prg import keystream
from shared_models.protect.privacy import Privacy
from shared_models.study import Augment, Train, load_study
from simulations.attacks.claim import audit
from simulations.audit import Guesses, epsilon_at_least, guesses, p_value

GRID = Geometry((1, 1, 1), (1.0, 1.0, 1.0), (1,), (0.0,), (1.0,))
PRIVACY = Privacy(noise_multiplier=1.0, sample_rate=0.5, clip_norm=1.0, examples_per_patient=2)
TRAIN = Train(local_steps=1, batch_size=8, optimizer="sgd", learning_rate=1.0, precision="float32")


def known_chance(number: int = 0) -> Chance:
    """A stream that is the same in every run."""
    return Chance(keystream(number.to_bytes(32, "big")))


def tiny_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 1, 1))


def squares(logits: Tensor, truth: Tensor) -> Tensor:
    return ((logits[:, 0] - truth.float()) ** 2).mean()


def patient(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(1 + seed % 3, 1, 6, 6, generator=draw) * scale
    return images, torch.randint(0, 2, (*images.shape[:1], 6, 6), generator=draw)


def stored(key: str, examples: int, value: float = 0.0) -> Stored:
    images = np.full((examples, 1, 4, 4), value, np.float16)
    images[:, 0, 0, 0] = np.arange(examples)
    return Stored(key, images, np.zeros((examples, 4, 4), np.uint8), Facts(GRID, 0))


def case(key: str, person: str) -> Case:
    return Case(key, person, (), None, "train")


# What one patient can change


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e12, 1e30])), max_size=5),
    st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 1.0, 1e6, 1e30, float("inf"), float("nan")])),
    st.floats(1e-3, 1e3),
)
def test_one_patient_more_or_less_changes_the_sum_by_at_most_the_clip(others, one, clip_norm):
    net = tiny_net()
    trained = list(net.parameters())
    without = lot_sum(net, trained, [patient(*o) for o in others], squares, clip_norm)
    added = lot_sum(net, trained, [patient(*o) for o in [*others, one]], squares, clip_norm)
    change = [int(c) for c in added - without]
    assert sum(c * c for c in change) <= CLIP**2  # whole numbers: nothing is rounded in this comparison


def test_the_sum_does_not_depend_on_the_order_of_patients_to_the_last_digit():
    net = tiny_net()
    lot = [patient(n, 10.0**n) for n in range(6)]
    forwards = lot_sum(net, list(net.parameters()), lot, squares, 1.0)
    assert torch.equal(forwards, lot_sum(net, list(net.parameters()), lot[::-1], squares, 1.0))


def test_a_short_gradient_keeps_its_length_and_a_long_one_gets_the_clips():
    gradient = torch.tensor([3.0, -4.0])
    assert (clipped(gradient, 10.0).double() / CLIP * 10.0).tolist() == pytest.approx([3.0, -4.0], rel=2e-6)
    assert (clipped(gradient, 1.0).double() / CLIP).tolist() == pytest.approx([0.6, -0.8], rel=2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_patient_whose_gradient_is_not_finite_adds_nothing(bad):
    assert clipped(torch.tensor([1.0, bad]), 1.0).tolist() == [0, 0]


def test_a_patient_with_many_images_counts_once():
    net = tiny_net()
    images, truth = patient(2, 100.0)
    many = (images.repeat(50, 1, 1, 1), truth.repeat(50, 1, 1))
    one = lot_sum(net, list(net.parameters()), [(images, truth)], squares, 1e-3)
    assert (lot_sum(net, list(net.parameters()), [many], squares, 1e-3) - one).abs().max() < 1e-4 * CLIP


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_layers_that_mix_patients_are_refused_by_name(layer):
    with pytest.raises(OrderRefused, match="layer '1'") as refused:
        check_network(nn.Sequential(nn.Conv2d(1, 4, 1), layer))
    assert refused.value.code == "DP_BATCH_STATISTICS"


# Who is in a lot


def test_all_images_of_a_person_are_one_patient():
    cases = DataSet((stored("a", 3), stored("b", 2), stored("c", 4)))
    found = patients_of([case("a", "one"), case("c", "two"), case("b", "one")], cases)
    assert [sorted(places) for places in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_lot_takes_each_patient_for_itself_and_at_most_so_many_of_its_images():
    cases = DataSet(tuple(stored(f"{n:03d}", 5, n) for n in range(100)))
    people = patients_of([case(f"{n:03d}", str(n)) for n in range(100)], cases)
    privacy = replace(PRIVACY, sample_rate=0.1)
    lots = [list(lot) for lot in poisson_lots(cases, people, privacy, 300, Augment(), known_chance())]
    sizes = np.array([len(lot) for lot in lots])
    assert len(lots) == 300
    assert abs(sizes.mean() - 10) < 4 * math.sqrt(9 / 300)  # binomial: mean 10, variance 9
    assert 0.75 < sizes.var() / 9 < 1.3  # and not always the same number
    assert {len(batch.images) for lot in lots for batch in lot} == {2}
    of_one = [sorted(batch.images[:, 0, 0, 0]) for lot in lots for batch in lot if batch.images[0, 0, 1, 1] == 7]
    assert len({tuple(drawn) for drawn in of_one}) > 5  # which ones is drawn each time
    assert all(len(set(drawn)) == 2 for drawn in of_one)


def test_a_step_that_took_nobody_is_a_step_with_noise():
    net = tiny_net()
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    fitted = fit_private(net, [[], []], squares, TRAIN, PRIVACY, known_chance())
    assert (fitted.steps, fitted.losses) == (2, ())
    assert (nn.utils.parameters_to_vector(net.parameters()) != before).all()


def test_private_work_that_may_not_go_on_ends_before_its_next_lot():
    study = replace(load_study("lung-ct-private"), augment=Augment())
    asked: list[int] = []

    def go_on() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise OrderRefused("OUTSIDE_HOURS", "the night is over")

    cases, people = DataSet((stored("a", 2),)), [np.arange(2, dtype=np.intp)]
    with pytest.raises(OrderRefused, match="the night is over"):
        train_privately(tiny_net(), cases, people, squares, study, study.train, go_on=go_on)
    assert len(asked) == 3  # of six lots


def test_every_patient_is_taken_when_the_rate_is_one_and_few_when_it_is_small():
    chance = known_chance()
    assert chance.taken(1000, 1.0).all()
    assert abs(int(chance.taken(200_000, 0.01).sum()) - 2000) < 4 * math.sqrt(1980)


# What the noise is


def test_what_is_added_to_a_fixed_gradient_is_gaussian_with_the_deviation_that_is_accounted_for():
    net = nn.Linear(40_000, 1, bias=False)
    nn.init.zeros_(net.weight)
    privacy = replace(PRIVACY, noise_multiplier=2.5, clip_norm=0.5)
    one = Batch(np.full((1, 40_000), 1.0, np.float32), np.zeros((1, 1), np.uint8))
    fit_private(net, [[one]], lambda logits, _: -logits.mean(), TRAIN, privacy, known_chance())
    signal = 0.5 / math.sqrt(40_000) / TRAIN.batch_size
    noise = (net.weight.detach().double().numpy().ravel() - signal) * TRAIN.batch_size
    assert stats.kstest(noise / (2.5 * 0.5), "norm").pvalue > 0.01
    assert noise.std() == pytest.approx(2.5 * 0.5, rel=0.02)


def test_normal_numbers_are_normal_also_far_out_and_not_related_to_their_neighbours():
    drawn = known_chance(1).normal(1_000_001)
    assert len(drawn) == 1_000_001
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    far = int((np.abs(drawn) > 4).sum())
    assert abs(far - 63.3) < 4 * math.sqrt(63.3)  # 2 * (1 - Phi(4)) = 6.33e-5
    half = drawn[:500_000]
    assert abs(np.corrcoef(half, drawn[500_001:])[0, 1]) < 4 / math.sqrt(500_000)


def test_two_rounds_have_different_noise_and_a_known_stream_the_same():
    assert (Chance().normal(100) != Chance().normal(100)).all()
    assert (known_chance(3).normal(100) == known_chance(3).normal(100)).all()
    assert "stream" not in repr(Chance())


def test_what_pulls_towards_the_received_weights_is_added_after_the_clip():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    train = replace(TRAIN, learning_rate=0.5, proximal_mu=0.1)
    push = Batch(np.full((1, 1), 1e6, np.float32), np.zeros((1, 1), np.uint8))
    lots = [[push], []]
    fit_private(net, lots, lambda logits, _: logits.mean(), train, PRIVACY, known_chance(), np.zeros)
    first = -0.5 * 1.0 / 8  # the clip, over the batch size
    moved = first * 1.9 - 0.5 * 0.1 * first  # momentum 0.9, then the pull of mu times how far it has gone
    assert float(net.weight.detach()) - 2.0 == pytest.approx(moved, rel=1e-4)


# Whether the claim holds


def test_an_attacker_who_sees_every_weight_cannot_disprove_the_claimed_epsilon_and_does_without_the_noise():
    privacy = Privacy(noise_multiplier=2.0, sample_rate=1.0, examples_per_patient=1)
    found = audit(privacy, 600, 2, known_chance(5))
    assert 0.1 * found.claimed < found.at_least <= found.claimed
    silent = audit(privacy, 600, 2, known_chance(5), np.zeros)
    assert silent.found.right > 0.98 * silent.found.made
    assert silent.at_least > silent.claimed + 0.5


def test_guesses_bound_epsilon_as_the_closed_form_does_where_all_are_right():
    # all of r guesses right: P = q^r, so that epsilon is log(q / (1 - q)) of q = 0.05^(1 / r) where delta is 0
    right = 0.05 ** (1 / 100)
    assert epsilon_at_least(Guesses(100, 100, 100), 0.0) == pytest.approx(math.log(right / (1 - right)), abs=2e-3)
    assert epsilon_at_least(Guesses(100, 100, 50), 1e-5) == 0.0  # no better than a coin
    assert p_value(Guesses(100, 100, 90), 1.0, 1e-2) > p_value(Guesses(100, 100, 90), 1.0, 0.0)


def test_the_highest_and_lowest_scores_are_guessed_and_the_others_are_not():
    scores = np.array([5.0, 1.0, 3.0, -2.0, 0.0])
    took_part = np.array([True, True, False, False, False])
    assert guesses(scores, took_part, 2) == Guesses(5, 4, 3)  # right: 5 in, -2 and 0 out; wrong: 3
