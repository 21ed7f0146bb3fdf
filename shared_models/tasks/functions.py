"""What a task is made of, as functions: the loss, what logits become, and the counts of its scores."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_models.preprocess import Geometry
from shared_models.scores import Score

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
LEAST = torch.finfo(torch.float32).tiny  # that a focal loss takes a power of: at 0 one below 1 has no derivative


class CaseAnswer(NamedTuple):
    """What a network says of one case, beside the truth.

    Attributes:
        chances: float32[N, outputs, *size] of a segmentation, else float32[N, outputs], of the case's N examples. Of a
            detection the marks that they come to, float64[m, 8]: label, score, centre and half-extents in mm.
        truth: as the task's batches hold it: uint8[N, *size] masks, uint8[N, labels] classes. Of a detection the
            lesions of the whole image, float64[n, 7]: label, centre and half-extents in mm along its axes.
        spacing_mm: of the grid that `chances` and `truth` lie on.
    """

    chances: NDArray[Any]
    truth: NDArray[Any]
    spacing_mm: tuple[float, ...] = ()


def deeply(loss: Loss, dims_of: Callable[[Tensor], int]) -> Loss:
    """`loss` of a network whose lower levels answer too, float32[B, 1 + levels, outputs, *size]: each level counts half
    of the one above (Isensee et al. 2021, online methods). Answers without levels are scored as they are.

    Args:
        dims_of: of the truth of a batch: how many spatial dimensions it is about.
    """

    def over_levels(logits: Tensor, truth: Tensor) -> Tensor:
        if logits.ndim == 2 + dims_of(truth):
            return loss(logits, truth)
        shares = [0.5**level for level in range(logits.shape[1])]
        parts = [share * loss(level, truth) for share, level in zip(shares, logits.unbind(1), strict=True)]
        return torch.stack(parts).sum() / sum(shares)

    return over_levels


@dataclass(frozen=True, slots=True)
class TaskFunctions:
    """One kind of task, whatever the network.

    Attributes:
        loss: (logits float32[B, outputs, ...], truth of the batch) -> scalar.
        chances: logits -> probabilities of the same shape.
        scores: (answers of all cases, threshold, smallest count whose histogram may leave) -> counts by name.
        located: of a task that answers with places: (probabilities of a case, its geometry) -> marks float64[m, 8].
    """

    loss: Loss
    chances: Callable[[Tensor], Tensor]
    scores: Callable[[Iterable[CaseAnswer], float, int], Mapping[str, Score]]
    located: Callable[[NDArray[Any], Geometry], NDArray[Any]] | None = None
