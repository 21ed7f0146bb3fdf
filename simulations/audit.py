"""What one training run says of its own privacy: a lower bound on epsilon from guesses about who took part.

Steinke, Nasr & Jagielski (2023), "Privacy Auditing with One (1) Training Run": each of many canaries takes part or not,
by a coin; whoever looks at the result guesses for some of them. (epsilon, delta) differential privacy bounds how many
guesses can be right, so too many right ones disprove an epsilon.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Guesses:
    """What was guessed of `canaries`: `made` guesses, `right` of them right."""

    canaries: int
    made: int
    right: int


def guesses(scores: NDArray[np.float64], took_part: NDArray[np.bool_], each: int) -> Guesses:
    """The `each` highest scores are guessed to have taken part, the `each` lowest not to; no word on the others."""
    order = np.argsort(scores, kind="stable")
    right = int((~took_part[order[:each]]).sum() + took_part[order[len(order) - each :]].sum())
    return Guesses(len(scores), 2 * each, right)


def p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, if training is (epsilon, delta) private: the paper's bound
    for approximate privacy, with its correction in delta."""
    from scipy.stats import binom

    right = 1 / (1 + math.exp(-epsilon))  # of one guess, as randomised response would have it
    tail = float(binom.sf(found.right - 1, found.made, right))
    back = np.cumsum(binom.pmf(found.right - np.arange(1, found.right + 1), found.made, right))
    worst = float(np.max(back / np.arange(1, found.right + 1), initial=0.0))
    return min(1.0, tail + 2 * found.canaries * delta * worst)


def epsilon_at_least(found: Guesses, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses disprove at this confidence, to a thousandth; 0 where they disprove none."""
    if p_value(found, 0.0, delta) > 1 - confidence:
        return 0.0
    low, high = 0.0, 64.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(found, middle, delta) <= 1 - confidence else (low, middle)
    return low
