"""How sure an answer is: the entropy of the mean of answers to changed pictures (test-time augmentation).

The changes are those that the study trains with (Wang et al. 2019, section 3.2), at their largest; none is undone by
resampling. Where a study trains with none, the entropy is that of its one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_models.seeds import rng
from shared_models.study import Study

Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One change of examples [N, C, *size], and what brings an answer [N, L, *size] back."""

    name: str
    change: Change
    back: Change


def variants(study: Study, left_right_axis: int) -> tuple[Variant, ...]:
    """The picture as it is, and what else a study has trained the network to bear.

    Args:
        left_right_axis: 0 where rows run between left and right, 1 where columns do.
    """
    allowed, found = study.augment, [Variant("as it is", _same, _same)]
    if allowed.flip_left_right:
        axis = 2 + left_right_axis
        found.append(Variant("left and right exchanged", lambda x: np.flip(x, axis), lambda x: np.flip(x, axis)))
    for sign, word in ((1, "more"), (-1, "less")):
        if allowed.gamma:
            found.append(Variant(f"gamma, {word}", _gamma(1 + sign * allowed.gamma), _same))
        if allowed.brightness:
            found.append(Variant(f"brightness, {word}", _brighter(sign * allowed.brightness), _same))
        if allowed.shift:
            shares = [sign * allowed.shift / 2] * len(study.preprocess.size)
            found.append(Variant(f"shift, {word}", _shifted(shares), _shifted([-share for share in shares])))
    if allowed.noise:
        found.append(Variant("noise", _noisy(allowed.noise, study), _same))
    return tuple(found)


def entropy(chances: NDArray[np.float32], exclusive: bool) -> NDArray[np.float32]:
    """From probabilities [L, ...] 0 (sure) to 1 (none is likelier): of a softmax over its labels in units of the most
    that there can be; of sigmoids the largest binary entropy, in bits."""
    p = np.clip(chances, 1e-7, 1 - 1e-7)
    if exclusive:
        summed = chances.sum(axis=0)
        spread: NDArray[np.float32] = -(p * np.log(p)).sum(axis=0) / np.float32(np.log(len(p)))
        return np.where(summed > 0.5, np.clip(spread, 0, 1), 0).astype(np.float32)  # 0 where nothing was seen
    binary = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    unsure: NDArray[np.float32] = np.clip(binary, 0, 1).max(axis=0).astype(np.float32)
    return unsure


def _same(images: NDArray[Any]) -> NDArray[Any]:
    return images


def _gamma(exponent: float) -> Change:
    def changed(images: NDArray[Any]) -> NDArray[Any]:
        axes = tuple(range(2, images.ndim))  # each channel by itself, as in training
        low = images.min(axis=axes, keepdims=True)
        span = np.maximum(images.max(axis=axes, keepdims=True) - low, np.float32(1e-6))
        powered: NDArray[Any] = ((images - low) / span) ** np.float32(exponent) * span + low
        return powered

    return changed


def _brighter(by: float) -> Change:
    return lambda images: images + np.float32(by)


def _noisy(deviation: float, study: Study) -> Change:
    def changed(images: NDArray[Any]) -> NDArray[Any]:
        grain = rng(study.seed, study.name, "noise of uncertainty").standard_normal(images.shape, dtype=np.float32)
        noisy: NDArray[Any] = images + np.float32(deviation) * grain
        return noisy

    return changed


def _shifted(shares: Sequence[float]) -> Change:
    """By whole pixels along every axis; the edge goes on, so that what leaves on one side does not enter on another."""

    def changed(images: NDArray[Any]) -> NDArray[Any]:
        moved = images
        for axis, share in enumerate(shares, start=2):
            n = images.shape[axis]
            at = np.clip(np.arange(n) - round(share * n), 0, n - 1)
            moved = moved.take(at, axis=axis)
        return moved

    return changed
