"""Classification of images: a sigmoid for each label, or a softmax where exactly one is true.

The truth of an example is uint8[labels], 1 for each label that its case shows. A case of many planes is answered by
the mean of their probabilities.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared_models.class_counts import class_counts
from shared_models.scores import Score
from shared_models.study import Task
from shared_models.tasks.functions import LEAST, CaseAnswer, Loss, TaskFunctions


def functions_of(task: Task) -> TaskFunctions:
    return TaskFunctions(
        loss=loss_of(task),
        chances=partial(torch.softmax, dim=1) if task.exclusive else torch.sigmoid,
        scores=partial(scores, task),
    )


def loss_of(task: Task) -> Loss:
    weights = torch.tensor(task.class_weights or (1.0,) * len(task.labels))
    if task.loss == "focal":
        return partial(focal, class_weights=weights, gamma=task.focal_gamma)
    return partial({"bce": bce, "ce": ce}[task.loss], class_weights=weights)


def bce(logits: Tensor, truth: Tensor, class_weights: Tensor) -> Tensor:
    """Binary cross-entropy, mean over examples and labels; positives weigh by their class, negatives 1."""
    return F.binary_cross_entropy_with_logits(logits, truth.float(), pos_weight=class_weights.to(logits))


def ce(logits: Tensor, truth: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy, each example weighing by its class, mean over the batch: so sites of unlike mixes stay alike."""
    wanted = truth.argmax(dim=1)
    losses = F.cross_entropy(logits, wanted, reduction="none")
    return (losses * class_weights.to(logits)[wanted]).mean()


def focal(logits: Tensor, truth: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
    """Focal loss over a softmax (Lin et al. 2017, equation 5), each example weighing by its class, mean over them."""
    wanted = truth.argmax(dim=1)
    log_chance = -F.cross_entropy(logits, wanted, reduction="none")
    missed = (1 - log_chance.exp()).clamp(min=LEAST)
    return (-class_weights.to(logits)[wanted] * missed**gamma * log_chance).mean()


def scores(task: Task, cases: Iterable[CaseAnswer], threshold: float, smallest_count: int) -> Mapping[str, Score]:
    """Counts of each label against all others; called is what lies above the threshold, or the most probable."""
    listed = list(cases)
    shape = (len(listed), len(task.labels))
    chances = np.array([case.chances.mean(axis=0, dtype=np.float64) for case in listed]).reshape(shape)
    truth = np.array([case.truth[0] for case in listed], dtype=bool).reshape(shape)
    called = chances > threshold
    if task.exclusive:
        called = np.arange(shape[1]) == chances.argmax(axis=1)[:, None]
    return {
        label: class_counts(chances[:, k], truth[:, k], called[:, k], smallest_count, task.specificity)
        for k, label in enumerate(task.labels)
    }
