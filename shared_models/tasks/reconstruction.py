"""Masked images: squares of an image are hidden, and the network restores them from the rest. It needs no label.

Masked autoencoding (He et al. 2022, section 3) in the simple form that suits a CNN: hidden squares hold 0, and the loss
is the absolute error on them alone (SimMIM, Xie et al. 2022, section 3). Its weights begin another study.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.restored_counts import restored_counts
from shared_models.scores import Score
from shared_models.study import Task
from shared_models.tasks.functions import CaseAnswer, TaskFunctions


def functions_of(task: Task) -> TaskFunctions:
    return TaskFunctions(loss=absolute_error, chances=_as_it_is, scores=partial(scores, task))


def hidden(
    images: NDArray[Any], task: Task, chance: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images float32[B, C, *size] with squares of `mask_size` hidden, and the truth float32[B, C + 1, *size].

    The truth is the image, and 1 where it was hidden. Of each image a share of `mask_share` of the squares is, rounded
    up, but never all of them; those at the end of an edge may be cut.
    """
    whole = images.astype(np.float32)
    size = whole.shape[2:]
    cells = [-(-edge // task.mask_size) for edge in size]
    count = int(np.prod(cells))
    most = min(count - 1, int(np.ceil(task.mask_share * count)))
    chosen = chance.random((len(whole), count)).argsort(axis=1) < most
    where: NDArray[np.float32] = chosen.reshape(-1, 1, *cells).astype(np.float32)
    for axis, edge in enumerate(size, start=2):
        where = np.repeat(where, task.mask_size, axis=axis).take(range(edge), axis=axis)
    return whole * (1 - where), np.concatenate([whole, where], axis=1)


def absolute_error(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error where the image was hidden."""
    image, where = truth[:, :-1], truth[:, -1:]
    return ((restored - image).abs() * where).sum() / (where.sum() * image.shape[1]).clamp(min=1)


def scores(task: Task, cases: Iterable[CaseAnswer], threshold: float, smallest_count: int) -> Mapping[str, Score]:
    """How much of each case's hidden parts comes back, beside filling in the mean of what is seen of it."""
    errors: list[float] = []
    blanks: list[float] = []
    for case in cases:
        image, where = case.truth[:, :-1], np.broadcast_to(case.truth[:, -1:] > 0, case.truth[:, :-1].shape)
        errors.append(float(np.abs(case.chances - image)[where].mean()))
        blanks.append(float(np.abs(image[~where].mean() - image)[where].mean()))
    return {task.labels[0]: restored_counts(np.array(errors), np.array(blanks))}


def _as_it_is(restored: Tensor) -> Tensor:
    return restored.to(torch.float32)
