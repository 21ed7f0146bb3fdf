"""Losses against their closed forms; what is marked as ignored has no weight and no gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_models.metrics import IGNORE, DiceCounts
from shared_models.study import Task
from shared_models.task_table import Region
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.functions import CaseAnswer
from shared_models.tasks.segmentation import bce, ce, dice_bce, dice_ce, focal, loss_of, targets, tversky

LOSSES = [bce, dice_bce, focal, tversky]
SOFTMAX = [ce, dice_ce]
BRATS = Task(
    labels=("necrosis", "oedema", "enhancing"),
    loss="dice_bce",
    regions=(
        Region("whole", ("necrosis", "oedema", "enhancing")),
        Region("core", ("necrosis", "enhancing")),
        Region("active", ("enhancing",)),
    ),
)
seeds = st.integers(0, 2**31)


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(seed: int, labels: int = 2, size: tuple[int, ...] = (5, 4), batch: int = 3) -> tuple[Tensor, Tensor]:
    """Logits and masks with background, every label, and ignored voxels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, labels, *size, generator=generator, dtype=torch.float64)
    values = torch.tensor([*range(labels + 1), IGNORE], dtype=torch.uint8)
    return logits, values[torch.randint(0, labels + 2, (batch, *size), generator=generator)]


def slow_bce(logits: Tensor, masks: Tensor) -> float:
    """Voxel by voxel, as a textbook writes it."""
    terms = []
    for b in range(len(logits)):
        for place, value in enumerate(masks[b].reshape(-1).tolist()):
            for label in range(logits.shape[1]) if value != IGNORE else ():
                p = 1 / (1 + math.exp(-float(logits[b, label].reshape(-1)[place])))
                terms.append(-math.log(p if value == label + 1 else 1 - p))
    return sum(terms) / len(terms) if terms else 0.0


def slow_soft_dice(logits: Tensor, masks: Tensor) -> float:
    """1 - (2 sum p g + 1) / (sum p + sum g + 1), mean over examples and labels."""
    found = []
    for b in range(len(logits)):
        for label in range(logits.shape[1]):
            pairs = [
                (1 / (1 + math.exp(-z)), float(v == label + 1))
                for z, v in zip(logits[b, label].reshape(-1).tolist(), masks[b].reshape(-1).tolist(), strict=True)
                if v != IGNORE
            ]
            overlap = 2 * sum(p * g for p, g in pairs) + 1
            found.append(1 - overlap / (sum(p for p, _ in pairs) + sum(g for _, g in pairs) + 1))
    return sum(found) / len(found)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 3), st.sampled_from([(5, 4), (3, 2, 2)]))
def test_the_losses_are_their_closed_forms(seed, labels, size):
    logits, masks = drawn(seed, labels, size)
    assert float(bce(logits, masks)) == pytest.approx(slow_bce(logits, masks), rel=1e-6)
    both = slow_bce(logits, masks) + slow_soft_dice(logits, masks)
    assert float(dice_bce(logits, masks)) == pytest.approx(both, rel=1e-6)


def test_numbers_done_by_hand():
    masks = torch.tensor([[[1, 0], [IGNORE, 0]]], dtype=torch.uint8)
    undecided = torch.zeros(1, 1, 2, 2)
    assert float(bce(undecided, masks)) == pytest.approx(math.log(2))
    assert float(dice_bce(undecided, masks)) == pytest.approx(math.log(2) + 1 - (2 * 0.5 + 1) / (1.5 + 1 + 1))
    perfect = torch.tensor([[[[50.0, -50.0], [50.0, -50.0]]]])
    assert float(dice_bce(perfect, masks)) == pytest.approx(0, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(LOSSES))
def test_ignored_voxels_have_no_gradient_and_no_say(seed, loss):
    logits, masks = drawn(seed)
    ignored = (masks == IGNORE)[:, None].expand_as(logits)
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, masks)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).all()
    moved = torch.where(ignored, torch.full_like(logits, 90.0), logits)
    torch.testing.assert_close(loss(moved, masks), value)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_that_is_all_ignored_costs_nothing_and_pulls_nowhere(loss):
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 4), IGNORE, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_truth_is_learned_from(loss):
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)), logits)
    assert (gradient > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_huge_logits_stay_finite(loss):
    logits = torch.tensor([[[[1e4, -1e4], [1e4, -1e4]]]], requires_grad=True)
    value = loss(logits, torch.tensor([[[0, 1], [1, 0]]], dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_bce_weighs_voxels_alike_wherever_they_are_and_dice_each_example(seed):
    logits, masks = drawn(seed, batch=4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for loss in LOSSES:
        torch.testing.assert_close(loss(logits[order], masks[order]), loss(logits, masks), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss(logits.flip(2), masks.flip(1)), loss(logits, masks), rtol=1e-5, atol=1e-6)


def test_targets_are_one_channel_for_each_label():
    masks = torch.tensor([[[0, 1, 2, IGNORE]]], dtype=torch.uint8)
    truth, valid = targets(masks, 2)
    assert truth.tolist() == [[[[0, 1, 0, 0]], [[0, 0, 1, 0]]]]
    assert valid.tolist() == [[[[1, 1, 1, 0]]]]
    assert truth.dtype == valid.dtype == torch.float32


def test_the_loss_is_the_one_that_the_study_names():
    assert loss_of(Task(loss="bce")) is bce
    assert loss_of(Task(loss="dice_bce")) is dice_bce


# Other losses


def voxels(logits: Tensor, masks: Tensor) -> list[tuple[list[float], int]]:
    """Logits and mask value of each voxel that is not ignored."""
    flat = logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    return [(z, v) for z, v in zip(flat, masks.reshape(-1).tolist(), strict=True) if v != IGNORE]


def softmax(z: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.0, 1.0, 2.0]))
def test_the_focal_loss_is_its_closed_form(seed, gamma):
    logits, masks = drawn(seed)
    terms = []
    for z, value in voxels(logits, masks):
        for k, logit in enumerate(z, start=1):
            p = 1 / (1 + math.exp(-logit))
            right = p if value == k else 1 - p
            terms.append(-((1 - right) ** gamma) * math.log(right))
    assert float(focal(logits, masks, gamma=gamma)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    if gamma == 0:
        assert float(focal(logits, masks, gamma=gamma)) == pytest.approx(float(bce(logits, masks)), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0])
def test_the_focal_loss_of_who_is_wholly_sure_moves_nothing(gamma):
    logits = torch.tensor([[[[-150.0, -0.5], [150.0, 0.5]]]], requires_grad=True)
    loss = focal(logits, torch.tensor([[[0, 0], [1, 1]]], dtype=torch.uint8), gamma=gamma)
    loss.backward()
    grad = logits.grad
    assert loss.isfinite()
    assert grad is not None
    assert grad[..., 0].abs().max() == 0
    assert grad[..., 1].isfinite().all()
    assert grad[0, 0, 0, 1] > 0 > grad[0, 0, 1, 1]


@settings(max_examples=10, deadline=None)
@given(seeds, st.sampled_from([0.3, 0.5, 0.7]))
def test_the_tversky_loss_is_its_closed_form_and_soft_dice_where_both_mistakes_weigh_alike(seed, beta):
    logits, masks = drawn(seed)
    terms = []
    for b in range(len(logits)):
        for k in range(logits.shape[1]):
            pairs = [(1 / (1 + math.exp(-z[k])), v == k + 1) for z, v in voxels(logits[b : b + 1], masks[b : b + 1])]
            both = sum(p * g for p, g in pairs)
            missed, false = sum(g - p * g for p, g in pairs), sum(p - p * g for p, g in pairs)
            terms.append(1 - (both + 1) / (both + beta * missed + (1 - beta) * false + 1))
    assert float(tversky(logits, masks, beta=beta)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_cross_entropy_is_its_closed_form_with_the_background_as_a_class(seed):
    logits, masks = drawn(seed, labels=3)
    masks = torch.where(masks == 3, IGNORE, masks)  # three channels: the background and two labels
    terms = [-math.log(softmax(z)[value]) for z, value in voxels(logits, masks)]
    assert float(ce(logits, masks)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    assert float(dice_ce(logits, masks)) > float(ce(logits, masks))


@pytest.mark.parametrize("loss", SOFTMAX)
def test_a_softmax_leaves_ignored_voxels_without_a_say(loss):
    logits, masks = drawn(3, labels=3)
    masks = torch.where(masks == 3, IGNORE, masks)
    ignored = (masks == IGNORE)[:, None].expand_as(logits)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, masks), leaf)
    assert (gradient[ignored] == 0).all()
    assert float(loss(logits, torch.full_like(masks, IGNORE))) == 0


# Regions, and sites that label a part of the study's labels


def test_regions_are_unions_of_labels():
    masks = np.array([[[0, 1, 2, 3, IGNORE]]], np.uint8)
    chances = np.array([[[[0.9, 0.9, 0.9, 0.9, 0.9]], [[0.1, 0.9, 0.1, 0.9, 0.9]], [[0.1, 0.1, 0.1, 0.1, 0.1]]]])
    found = functions_of(BRATS).scores([CaseAnswer(chances.astype(np.float32), masks)], 0.5, 1)
    values = {name: score.value for name, score in found.items()}
    assert values == {"whole": pytest.approx(6 / 7, abs=1e-6), "core": 1.0, "active": 0.0}
    assert BRATS.outputs == 3


def test_the_loss_of_regions_is_that_of_their_own_masks():
    logits, masks = drawn(5, labels=3)
    whole = torch.where((masks > 0) & (masks != IGNORE), 1, masks)
    core = torch.where((masks == 1) | (masks == 3), 1, torch.where(masks == 2, 0, masks))
    active = torch.where(masks == 3, 1, torch.where(masks == IGNORE, IGNORE, 0)).to(torch.uint8)
    parts = [float(dice_bce(logits[:, k : k + 1], part)) for k, part in enumerate((whole, core, active))]
    assert float(loss_of(BRATS)(logits, masks)) == pytest.approx(sum(parts) / 3, rel=1e-6)


def test_a_site_learns_and_scores_the_labels_that_it_has():
    task = Task(labels=("lung", "nodule"), loss="dice_bce")
    logits, masks = drawn(7)
    masks = torch.where(masks == 2, 0, masks)  # this site marks no nodules: where they are it says background
    leaf = logits.clone().requires_grad_()
    value = loss_of(task, ("lung",))(leaf, masks)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert (gradient[:, 1] == 0).all()
    assert value.item() == pytest.approx(float(dice_bce(logits[:, :1], masks)), rel=1e-6)
    answer = CaseAnswer(np.full((1, 2, 4, 4), 0.9, np.float32), np.ones((1, 4, 4), np.uint8))
    assert list(functions_of(task, ("lung",)).scores([answer], 0.5, 1)) == ["lung"]
    assert list(functions_of(BRATS, ("enhancing",)).scores([], 0.5, 1)) == ["active"]


def test_a_softmax_takes_what_a_site_does_not_label_for_background():
    task = Task(labels=("lung", "nodule", "heart"), loss="ce")
    logits, masks = drawn(9, labels=4)
    masks = torch.where((masks == 2) | (masks == 4), 0, masks)
    terms = []
    for z, value in voxels(logits, masks):
        p = softmax(z)
        terms.append(-math.log(p[0] + p[2] if value == 0 else p[value]))
    assert float(loss_of(task, ("lung", "heart"))(logits, masks)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_the_most_probable_label_is_marked_by_a_softmax():
    task = Task(labels=("lung", "nodule"), loss="dice_ce")
    chances = np.array([[[[0.5, 0.2, 0.3]], [[0.3, 0.4, 0.3]], [[0.2, 0.4, 0.4]]]], np.float32)
    found = functions_of(task).scores([CaseAnswer(chances, np.array([[[0, 1, 2]]], np.uint8))], 0.5, 1)
    assert {name: score.value for name, score in found.items()} == {"lung": 1.0, "nodule": 1.0}
    assert task.outputs == 3
    assert all(isinstance(score, DiceCounts) for score in found.values())
