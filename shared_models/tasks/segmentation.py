"""Segmentation: a sigmoid for each label or region, or a softmax over the labels and the background.

Masks are uint8[B, *size]: 0 background, k the study's labels[k - 1], 127 ignored: no weight, no gradient, no score.
A site that labels only some of the study's labels learns and scores those: with a sigmoid the others have no loss, with
a softmax they count as background (the marginal loss of Shi et al. 2021, section 3.1).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared_models.metrics import IGNORE, counts, dice
from shared_models.scores import Score
from shared_models.study import Task
from shared_models.surface_counts import SurfaceCounts
from shared_models.tasks.decide import predicted_of as predicted_of
from shared_models.tasks.functions import LEAST, CaseAnswer, Loss, TaskFunctions, deeply
from shared_models.tasks.surfaces import CaseSurface, case_surface, surface_counts

Parts = tuple[tuple[int, ...], ...]  # of each answer: the mask values that it holds


def functions_of(task: Task, labelled: Sequence[str] = ()) -> TaskFunctions:
    softmax = task.exclusive
    return TaskFunctions(
        loss=deeply(loss_of(task, labelled), lambda masks: masks.ndim - 1),
        chances=partial(torch.softmax, dim=1) if softmax else torch.sigmoid,
        scores=partial(scores, task, kept(task, labelled)),
    )


def parts_of(task: Task) -> Parts:
    """The mask values of each answer: a label's own, or those of a region's parts."""
    value = {label: k for k, label in enumerate(task.labels, start=1)}
    if task.regions:
        return tuple(tuple(sorted(value[part] for part in region.parts)) for region in task.regions)
    return tuple((value[label],) for label in task.labels)


def kept(task: Task, labelled: Sequence[str]) -> tuple[int, ...]:
    """The answers that a site can tell: those whose parts it labels; all where it names none."""
    known = {k for k, label in enumerate(task.labels, start=1) if not labelled or label in labelled}
    return tuple(n for n, parts in enumerate(parts_of(task)) if set(parts) <= known)


def targets(masks: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Targets float32[B, L, *size], validity float32[B, 1, *size] of masks uint8[B, *size]; label k is value k + 1."""
    values = torch.arange(1, labels + 1, device=masks.device, dtype=masks.dtype).view(1, -1, *[1] * (masks.ndim - 1))
    return (masks[:, None] == values).float(), (masks[:, None] != IGNORE).float()


def region_targets(masks: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """As `targets`, an answer being true where the mask has any of its parts."""
    truth = [torch.stack([masks == value for value in values]).any(0) for values in parts]
    return torch.stack(truth, dim=1).float(), (masks[:, None] != IGNORE).float()


Targets = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def bce(logits: Tensor, masks: Tensor, targets: Targets = targets) -> Tensor:
    """Binary cross-entropy over the voxels that are not ignored, mean over voxels and labels."""
    truth, valid = targets(masks, logits.shape[1])
    loss = F.binary_cross_entropy_with_logits(logits, truth, weight=valid.expand_as(truth), reduction="sum")
    return loss / (valid.sum() * logits.shape[1]).clamp(min=1)


def dice_bce(logits: Tensor, masks: Tensor, targets: Targets = targets) -> Tensor:
    """Soft Dice of each example (Milletari et al. 2016, section 3, plain sums below) plus `bce`, in equal parts."""
    truth, valid = targets(masks, logits.shape[1])
    return _soft_dice_loss(torch.sigmoid(logits), truth, valid) + bce(logits, masks, targets)


def _soft_dice_loss(chance: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    chance = chance * valid
    truth = truth * valid
    space = tuple(range(2, chance.ndim))
    overlap = 2 * (chance * truth).sum(space) + 1
    soft_dice = overlap / (chance.sum(space) + truth.sum(space) + 1)
    return (1 - soft_dice).mean()


def focal(logits: Tensor, masks: Tensor, targets: Targets = targets, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al. 2017, equation 4), mean over the voxels that are not ignored and the labels."""
    truth, valid = targets(masks, logits.shape[1])
    cross = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    missed = torch.sigmoid(torch.where(truth > 0, -logits, logits)).clamp(min=LEAST)  # 1 - the probability of the truth
    return (missed**gamma * cross * valid).sum() / (valid.sum() * logits.shape[1]).clamp(min=1)


def tversky(logits: Tensor, masks: Tensor, targets: Targets = targets, beta: float = 0.7) -> Tensor:
    """1 - the Tversky index of each example (Salehi et al. 2017, equation 3), missed voxels weighing `beta`."""
    truth, valid = targets(masks, logits.shape[1])
    chance, truth = torch.sigmoid(logits) * valid, truth * valid
    space = tuple(range(2, logits.ndim))
    both = (chance * truth).sum(space)
    missed, false = truth.sum(space) - both, chance.sum(space) - both
    return (1 - (both + 1) / (both + beta * missed + (1 - beta) * false + 1)).mean()


def ce(logits: Tensor, masks: Tensor, unlabelled: Sequence[int] = ()) -> Tensor:
    """Cross-entropy of a softmax whose channel 0 is the background, mean over the voxels that are not ignored."""
    logits = _without(logits, unlabelled)
    valid = masks != IGNORE
    wanted = torch.where(valid, _renumbered(masks, unlabelled), 0)
    losses = F.cross_entropy(logits, wanted, reduction="none") * valid
    return losses.sum() / valid.sum().clamp(min=1)


def dice_ce(logits: Tensor, masks: Tensor, unlabelled: Sequence[int] = ()) -> Tensor:
    """Soft Dice of each example over the labels without the background, plus `ce`, in equal parts."""
    chance = torch.softmax(_without(logits, unlabelled), dim=1)[:, 1:]
    truth, valid = targets(torch.where(masks != IGNORE, _renumbered(masks, unlabelled), IGNORE), chance.shape[1])
    return _soft_dice_loss(chance, truth, valid) + ce(logits, masks, unlabelled)


def _without(logits: Tensor, unlabelled: Sequence[int]) -> Tensor:
    """Logits where the unlabelled channels are one with the background: their probabilities added."""
    if not unlabelled:
        return logits
    known = [c for c in range(1, logits.shape[1]) if c not in unlabelled]
    background = torch.logsumexp(logits[:, [0, *unlabelled]], dim=1, keepdim=True)
    return torch.cat([background, logits[:, known]], dim=1)


def _renumbered(masks: Tensor, unlabelled: Sequence[int]) -> Tensor:
    """Mask values as the channels of `_without`."""
    masks = masks.long()
    lower = sum(((masks > value) & (masks != IGNORE)).long() for value in unlabelled)
    shifted = masks - lower
    for value in unlabelled:
        shifted = torch.where(masks == value, 0, shifted)
    return shifted


def loss_of(task: Task, labelled: Sequence[str] = ()) -> Loss:
    """The loss that a study names, over the answers that a site can tell."""
    answers = kept(task, labelled)
    if task.exclusive:
        unlabelled = tuple(k for k in range(1, len(task.labels) + 1) if k - 1 not in answers)
        chosen = {"ce": ce, "dice_ce": dice_ce}[task.loss]
        return partial(chosen, unlabelled=unlabelled) if unlabelled else chosen
    sigmoids: Mapping[str, Callable[..., Tensor]] = {
        "bce": bce,
        "dice_bce": dice_bce,
        "focal": partial(focal, gamma=task.focal_gamma),
        "tversky": partial(tversky, beta=task.tversky_beta),
    }
    loss = sigmoids[task.loss]
    parts = parts_of(task)
    if not task.regions and len(answers) == len(parts):
        return loss
    known = [parts[n] for n in answers]

    def over_answers(logits: Tensor, masks: Tensor) -> Tensor:
        return loss(logits[:, list(answers)], masks, lambda masks, _: region_targets(masks, tuple(known)))

    return over_answers


def truth_of(task: Task, masks: NDArray[Any]) -> Iterable[NDArray[np.bool_]]:
    """The truth of each answer, bool like the masks."""
    for values in parts_of(task):
        yield masks == values[0] if len(values) == 1 else np.isin(masks, values)


def scores(
    task: Task, answers: Sequence[int], cases: Iterable[CaseAnswer], threshold: float, smallest_count: int
) -> Mapping[str, Score]:
    """Dice by answer (and surfaces, where the study asks): all examples of a case are one volume."""
    found: dict[str, list[float | None]] = {task.answers[n]: [] for n in answers}
    surfaces: dict[str, list[CaseSurface | None]] = {name: [] for name in found}
    for case in cases:
        predicted, valid = predicted_of(task, case.chances, threshold), case.truth != IGNORE
        for n, truth in enumerate(truth_of(task, case.truth)):
            if n not in answers:
                continue
            name = task.answers[n]
            found[name].append(dice(predicted[:, n], truth, valid))
            if task.tolerance_mm is not None:
                marked, drawn = (predicted[:, n] & valid)[0], (truth & valid)[0]  # one example: the whole image
                surfaces[name].append(case_surface(marked, drawn, case.spacing_mm, task.tolerance_mm))
    counted: dict[str, Score] = {}
    for name, of in found.items():
        surface: SurfaceCounts | None = None
        if task.tolerance_mm is not None:
            surface = surface_counts(surfaces[name], task.tolerance_mm, smallest_count)
        counted[name] = counts(of, smallest_count, surface)
    return counted
