"""Segmentation with one sigmoid channel for each label: loss, prediction, score."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from shared_models.metrics import IGNORE
from shared_models.study import Task

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def targets(masks: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Targets float32[B, L, *size], validity float32[B, 1, *size] of masks uint8[B, *size]; label k is value k + 1."""
    values = torch.arange(1, labels + 1, device=masks.device, dtype=masks.dtype).view(1, -1, *[1] * (masks.ndim - 1))
    return (masks[:, None] == values).float(), (masks[:, None] != IGNORE).float()


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy over the voxels that are not ignored, mean over voxels and labels."""
    truth, valid = targets(masks, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits, truth, weight=valid.expand_as(truth), reduction="sum")
    return loss / (valid.sum() * logits.shape[1]).clamp(min=1)


def dice_bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice of each example (Milletari et al. 2016, section 3, plain sums below) plus `bce`, in equal parts."""
    truth, valid = targets(masks, logits.shape[1])
    chance = torch.sigmoid(logits) * valid
    truth = truth * valid
    space = tuple(range(2, logits.ndim))
    overlap = 2 * (chance * truth).sum(space) + 1
    soft_dice = overlap / (chance.sum(space) + truth.sum(space) + 1)
    return (1 - soft_dice).mean() + bce(logits, masks)


def loss_of(task: Task) -> Loss:
    return {"bce": bce, "dice_bce": dice_bce}[task.loss]
