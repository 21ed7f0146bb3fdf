"""Losses against their closed forms; what is marked as ignored has no weight and no gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_models.metrics import IGNORE
from shared_models.study import Task
from shared_models.tasks.segmentation import bce, dice_bce, loss_of, targets

LOSSES = [bce, dice_bce]
seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small networks on a busy machine: more threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
