"""A network moved over whole images: overlapping windows, each counting most where it sees most around.

No PyTorch in here: training hands in a network of PyTorch, prediction one of onnxruntime.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_models.study import Study

OVERLAP = 0.5  # share of a window's edge, where the study says nothing
PLANES = 32  # in one pass through the network; volumes go by the batches that training takes
SIGMA = 1 / 8  # of a window's edge (Isensee et al. 2021, online methods, inference)
Through = Callable[[NDArray[Any]], NDArray[np.float32]]  # examples of the study's size -> logits


def moved(through: Through, images: NDArray[Any], study: Study, planes: int = PLANES) -> NDArray[np.float32]:
    """Logits float32[N, L, *whole] from examples [N, C, *whole] of one case.

    Where the study trains on patches, windows of their size are moved over them and averaged with Gaussian weights
    (Isensee et al. 2021).

    Args:
        planes: how many 2-D examples go through the network together, at most.
    """
    size = study.preprocess.size
    together = planes if len(size) == 2 else study.train.batch_size
    if study.preprocess.fit != "patches" or images.shape[2:] == size:
        parts = np.array_split(images, max(1, math.ceil(len(images) / together)))
        return np.concatenate([through(part) for part in parts])
    overlap = OVERLAP if study.evaluate.overlap is None else study.evaluate.overlap
    corners = list(product(*map(begins, images.shape[2:], size, [overlap] * len(size))))
    # planes of a case in turn, so that what is added up stays small
    step = max(1, together // len(corners))
    return np.concatenate(
        [_summed(through, images[n : n + step], corners, size, together) for n in range(0, len(images), step)]
    )


def begins(whole: int, edge: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly, the first at its beginning and the last at its end."""
    count = math.ceil((whole - edge) / max(1.0, edge * (1 - overlap))) + 1
    return [round(at) for at in np.linspace(0, whole - edge, count)]


@lru_cache(maxsize=4)
def weights(size: tuple[int, ...]) -> NDArray[np.float32]:
    """float32[*size]: a Gaussian around the middle, not less than a thousandth in the corners."""
    shape = np.ones((), np.float32)
    for edge in size:
        away = (np.arange(edge, dtype=np.float32) - (edge - 1) / 2) / (edge * SIGMA)
        shape = shape[..., None] * np.exp(-(away**2) / 2)
    least: NDArray[np.float32] = np.maximum(shape, 1e-3).astype(np.float32)
    return least


def _summed(
    through: Through,
    images: NDArray[Any],
    corners: Sequence[tuple[int, ...]],
    size: tuple[int, ...],
    together: int,
) -> NDArray[np.float32]:
    share = weights(size)
    total = seen = np.zeros((), np.float32)
    at_once = max(1, together // len(images))
    for begin in range(0, len(corners), at_once):
        windows = [
            tuple(slice(at, at + edge) for at, edge in zip(corner, size, strict=True))
            for corner in corners[begin : begin + at_once]
        ]
        found = through(np.concatenate([images[(slice(None), slice(None), *w)] for w in windows]))
        if begin == 0:
            total = np.zeros((len(images), found.shape[1], *images.shape[2:]), np.float32)
            seen = np.zeros(images.shape[2:], np.float32)
        for n, window in enumerate(windows):
            total[(slice(None), slice(None), *window)] += found[n * len(images) : (n + 1) * len(images)] * share
            seen[window] += share
    total /= seen
    return total
