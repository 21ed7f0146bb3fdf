"""Detection of lesions as points: a map that is highest at their centres, and their extents beside it.

CenterNet (Zhou et al. 2019) at full resolution: for each label a heat map, for each axis the logarithm of a lesion's
half-extent in pixels. The truth of an example is float32[M, 1 + 2 D] in its pixels, a row for each lesion: its label
(k is labels[k - 1], 127 irrelevant, 0 no row), its centre, and its half-extents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from math import log
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shared_models.detection_counts import ScanMarks, detection_counts, judged
from shared_models.metrics import IGNORE
from shared_models.preprocess import Geometry
from shared_models.scores import Score
from shared_models.study import Task
from shared_models.tasks.functions import CaseAnswer, TaskFunctions, deeply

ALPHA, BETA = 2, 4  # of the focal loss (Zhou et al. 2019, equation 1)
SIZE_WEIGHT = 1.0  # of the extents in the loss; of pixels a tenth (Zhou et al. 2019, equation 4), of logarithms all
WIDTH = 0.5  # standard deviation of a lesion's peak as a share of its half-extent, and a pixel at least
NEAR = 0.5  # extents are learnt where a peak is at least so high
LARGEST = 1024.0  # pixels
MOST_PEAKS, MOST_MARKS = 1000, 100  # of one label in a scan, before and after neighbours are merged


def functions_of(task: Task) -> TaskFunctions:
    labels = len(task.labels)
    return TaskFunctions(
        loss=deeply(partial(centre_loss, labels=labels), lambda lesions: (lesions.shape[2] - 1) // 2),
        chances=partial(chances, labels=labels),
        scores=partial(scores, task),
        located=partial(located, labels=labels),
    )


def centre_loss(logits: Tensor, truth: Tensor, labels: int) -> Tensor:
    """Penalty-reduced focal loss of the centres plus the L1 of the logarithms of extents.

    Each over the number of lesions; nothing is learnt within what is irrelevant.

    Args:
        logits: float32[B, labels + D, *size].
        truth: float32[B, M, 1 + 2 D].
    """
    heat = logits[:, :labels]
    target, valid, extents, near = _targets(truth.to(heat), labels, heat.shape[2:])
    centre = target == 1
    rising, falling = F.logsigmoid(heat), F.logsigmoid(-heat)
    missed = (1 - heat.sigmoid()) ** ALPHA * rising * centre
    false = (1 - target) ** BETA * heat.sigmoid() ** ALPHA * falling * ~centre
    found = (centre & valid).sum().clamp(min=1)
    loss = -((missed + false) * valid).sum() / found
    off = (logits[:, labels:] - extents).abs() * near[:, None]
    return loss + SIZE_WEIGHT * off.sum() / (near.sum() * extents.shape[1]).clamp(min=1)


def _targets(truth: Tensor, labels: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heat [B, labels, *size], valid bool[B, 1, *size], log half-extents [B, D, *size], and where they are learnt
    bool[B, *size]: those of the highest peak.

    A centre is the pixel that it lies in; it may lie outside, whence only its flank is seen.
    """
    dims, batch = len(size), len(truth)
    each = (batch, *[1] * dims)
    axes = [
        torch.arange(n, device=truth.device, dtype=truth.dtype).view(1, *[-1 if d == a else 1 for d in range(dims)])
        for a, n in enumerate(size)
    ]
    heat = truth.new_zeros((batch, labels, *size))
    valid = torch.ones((batch, 1, *size), dtype=torch.bool, device=truth.device)
    extents, highest = truth.new_zeros((batch, dims, *size)), truth.new_zeros((batch, *size))
    for row in truth.unbind(1):  # a volume of many lesions would not fit at once
        kind, centre, half = row[:, 0], row[:, 1 : 1 + dims].round(), row[:, 1 + dims :].clamp(min=0.5)
        away = [axis - centre[:, a].view(each) for a, axis in enumerate(axes)]
        spread = (half * WIDTH).clamp(min=1)
        peak = torch.exp(-_far(away, spread) / 2)
        counts = (kind >= 1) & (kind <= labels)
        peak = peak * counts.view(each)
        place = (kind.long() - 1).clamp(0, labels - 1)
        one = F.one_hot(place, labels).view(batch, labels, *[1] * dims)
        heat = torch.maximum(heat, peak[:, None] * one)
        inside = _far(away, half.clamp(min=1)) <= 1
        valid &= ~(inside & (kind == IGNORE).view(each))[:, None]
        higher = peak > highest
        extents = torch.where(higher[:, None], half.log().view(batch, dims, *[1] * dims), extents)
        highest = torch.maximum(highest, peak)
    return heat, valid, extents, (highest >= NEAR) & valid[:, 0]


def _far(away: Sequence[Tensor], unit: Tensor) -> Tensor:
    """[B, *size]: squared distance, where each axis is counted in units [B, D]."""
    each = (len(unit), *[1] * len(away))
    return reduce(torch.add, [(d / unit[:, a].view(each)) ** 2 for a, d in enumerate(away)])


def chances(logits: Tensor, labels: int) -> Tensor:
    """Probability of a centre for each label, then half-extents in pixels."""
    return torch.cat([logits[:, :labels].sigmoid(), logits[:, labels:].clamp(max=log(LARGEST)).exp()], dim=1)


def located(given: NDArray[Any], geometry: Geometry, labels: int) -> NDArray[np.float64]:
    """Marks of one case, float64[m, 8]: label from 1, score, centre and half-extents along the image's axes in mm.

    A peak is a pixel that no neighbour exceeds; of peaks of one label within each other's extents, across planes too,
    the highest stays. Planes know no extent across: there a lesion is as deep as it is wide.

    Args:
        given: `chances` of the case's examples, float32[N, labels + D, *size].
    """
    dims, spacing = given.ndim - 2, np.array(geometry.spacing_mm)
    marks: list[NDArray[np.float64]] = []
    for label in range(labels):
        heat = torch.from_numpy(np.ascontiguousarray(given[:, label], dtype=np.float32))[:, None]
        pool = F.max_pool2d if dims == 2 else F.max_pool3d
        top = (pool(heat, 3, stride=1, padding=1) == heat)[:, 0].numpy()
        places = np.argwhere(top)
        score = given[:, label][tuple(places.T)].astype(np.float64)
        order = np.argsort(-score, kind="stable")[:MOST_PEAKS]
        places, score = places[order], score[order]
        halves = np.stack([given[:, labels + a][tuple(places.T)] for a in range(dims)], axis=1).astype(np.float64)
        halves = np.maximum(halves, 0.5)
        step, start = np.array(geometry.step), np.array(geometry.start)
        centre = (start + step * places[:, 1:]) * spacing[:dims]
        half_mm = halves * step * spacing[:dims]
        if dims == 2:
            centre = np.column_stack([centre, places[:, 0] * spacing[2]])
            half_mm = np.column_stack([half_mm, half_mm.mean(axis=1)])
        found = np.column_stack([np.full(len(score), label + 1.0), score, centre, half_mm])
        marks.append(found[_apart(found)])
    return np.concatenate(marks)


def _apart(marks: NDArray[np.float64]) -> list[int]:
    """Which marks stay, highest first: those that lie within the extents of none that stays already."""
    kept: list[int] = []
    free = np.ones(len(marks), bool)
    for n in range(len(marks)):
        if not free[n]:
            continue
        kept.append(n)
        if len(kept) == MOST_MARKS:
            break
        away = (marks[:, 2:5] - marks[n, 2:5]) / marks[n, 5:8]
        free &= (away**2).sum(axis=1) >= 1
    return kept


def scan_marks(task: Task, case: CaseAnswer) -> Iterator[tuple[str, ScanMarks]]:
    """Each label with what the marks of one case came to."""
    kind = case.truth[:, 0]
    irrelevant = case.truth[kind == IGNORE, 1:].astype(np.float64)
    for value, label in enumerate(task.labels, start=1):
        marks = case.chances[case.chances[:, 0] == value, 1:].astype(np.float64)
        yield label, judged(marks, case.truth[kind == value, 1:].astype(np.float64), irrelevant)


def scores(task: Task, cases: Iterable[CaseAnswer], threshold: float, smallest_count: int) -> Mapping[str, Score]:
    """FROC counts by label; no threshold is needed."""
    found: dict[str, list[ScanMarks]] = {label: [] for label in task.labels}
    for case in cases:
        for label, of in scan_marks(task, case):
            found[label].append(of)
    return {label: detection_counts(of, smallest_count) for label, of in found.items()}
