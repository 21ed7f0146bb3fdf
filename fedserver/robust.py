"""Robust rules: what the updates of a round come to when some of their sites may send anything.

Functions of arrays alone. A rule has two parts: from the inner products of whole updates it picks those that count,
and from these it makes one number for each weight; so it can work through a model in blocks (`fedserver.spool`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared_models.strategy import Strategy

Matrix: TypeAlias = NDArray[np.float64]  # [n, ...]: a row for each update


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which updates count, by their place in the list, and what each is multiplied by."""

    rows: tuple[int, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Attributes:
    choose: [n, n] inner products of the updates -> which count; None counts all and saves the pass over them.
    combine: [k, b] the chosen updates, b weights of each, and [k] their shares, which add up to 1 -> [b].
    """

    choose: Callable[[Matrix], Chosen] | None
    combine: Callable[[Matrix, Matrix], Matrix]


def weighted_mean(updates: Matrix, shares: Matrix) -> Matrix:
    """Row by row, so that a weight's mean does not depend on the block that it lies in (a matrix product's does)."""
    mean: Matrix = updates[0] * shares[0]
    for update, share in zip(updates[1:], shares[1:], strict=True):
        mean += update * share
    return mean


def median(updates: Matrix, shares: Matrix) -> Matrix:
    """Coordinate-wise median (Yin et al. 2018, Algorithm 1, option I); of an even number the mean of the middle two."""
    ordered, half = np.sort(updates, axis=0), len(updates) // 2
    middle: Matrix = ordered[half] if len(updates) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return middle


def trimmed_mean(malicious: int) -> Callable[[Matrix, Matrix], Matrix]:
    """Mean of each coordinate without its `malicious` largest and smallest values (Yin et al. 2018, option II)."""

    def combine(updates: Matrix, shares: Matrix) -> Matrix:
        kept = np.sort(updates, axis=0)[malicious : len(updates) - malicious]
        return weighted_mean(kept, np.full(len(kept), 1 / len(kept)))

    return combine


def nearest_mean(count: Callable[[int], int]) -> Callable[[Matrix, Matrix], Matrix]:
    """Mean of the values of each coordinate that are nearest to its median (El Mhamdi et al. 2018, section 4)."""

    def combine(updates: Matrix, shares: Matrix) -> Matrix:
        kept = count(len(updates))
        order = np.argsort(np.abs(updates - median(updates, shares)), axis=0, kind="stable")[:kept]
        return weighted_mean(np.take_along_axis(updates, order, axis=0), np.full(kept, 1 / kept))

    return combine


def distances(products: Matrix) -> Matrix:
    """Squared Euclidean distances from inner products."""
    norms = np.diag(products)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0.0)


def krum_scores(apart: Matrix, malicious: int) -> Matrix:
    """Sum of the squared distances to the n - f - 2 nearest others (Blanchard et al. 2017, section 4)."""
    others = np.sort(apart + np.diag(np.full(len(apart), np.inf)), axis=1)
    scores: Matrix = others[:, : max(1, len(apart) - malicious - 2)].sum(axis=1)
    return scores


def krum(malicious: int, count: Callable[[int], int]) -> Callable[[Matrix], Chosen]:
    """The `count(n)` updates with the lowest score; of equal ones those that come first."""

    def choose(products: Matrix) -> Chosen:
        scores = krum_scores(distances(products), malicious)
        best = sorted(np.argsort(scores, kind="stable")[: count(len(scores))].tolist())
        return Chosen(tuple(best), (1.0,) * len(best))

    return choose


def bulyan(malicious: int) -> Callable[[Matrix], Chosen]:
    """Krum n - 2f times, each time among those not chosen yet (El Mhamdi et al. 2018, section 4, first step).

    Flower 1.41 takes the n - 2f best of one pass.
    """

    def choose(products: Matrix) -> Chosen:
        apart, left, chosen = distances(products), list(range(len(products))), list[int]()
        while len(chosen) < len(products) - 2 * malicious:
            scores = krum_scores(apart[np.ix_(left, left)], malicious)
            chosen.append(left.pop(int(np.argmin(scores))))
        return Chosen(tuple(sorted(chosen)), (1.0,) * len(chosen))

    return choose


def bounded(longest: float | None) -> Callable[[Matrix], Chosen]:
    """Every update, scaled to at most `longest`, or to the median of their norms (Sun et al. 2019, section 5).

    What lives by its length dies of it. A patient backdoor does not: honest updates have nothing to say where its
    trigger is, so that the pushes of all rounds add up, each as long as an honest update; see `centred`.
    """

    def choose(products: Matrix) -> Chosen:
        norms = [sqrt(max(0.0, square)) for square in np.diag(products)]
        bound = float(np.median(norms)) if longest is None else longest
        return Chosen(tuple(range(len(norms))), tuple(min(1.0, bound / norm) if norm else 1.0 for norm in norms))

    return choose


def centred(longest: float | None) -> Callable[[Matrix], Chosen]:
    """Centred clipping (Karimireddy et al. 2021, Algorithm 2, one step), begun at the update nearest to all others.

    c + mean of clip(x - c), each x no farther from the centre c than `longest`, or than the median of the distances to
    it. What sites agree on passes whole, and what one may add of its own is as long as honest sites differ, which is
    far less than an update is long. The centre is the medoid, an honest update where fewer than half lie; its own
    distance of 0 is among the distances, so that their median is an honest one then.
    """

    def choose(products: Matrix) -> Chosen:
        apart = np.sqrt(distances(products))
        count, middle = len(apart), int(np.argmin(apart.sum(axis=1)))
        others = [n for n in range(count) if n != middle]
        bound = float(np.median(apart[middle])) if longest is None else longest
        factors = np.ones(count)
        for n in others:
            factors[n] = min(1.0, bound / apart[middle, n]) if apart[middle, n] else 1.0
        factors[middle] = count - factors[others].sum()  # x - f (x - c) leaves 1 - f of c, for each
        return Chosen(tuple(range(count)), tuple(factors.tolist()))

    return choose


def rule_of(strategy: Strategy) -> Rule:
    """The rule of a study; Multi-Krum averages n - f - 2 updates, the most of its proof."""
    f = strategy.malicious
    match strategy.robust:
        case "median":
            return Rule(None, median)
        case "trimmed_mean":
            return Rule(None, trimmed_mean(f))
        case "krum":
            return Rule(krum(f, lambda n: 1), weighted_mean)
        case "multi_krum":
            return Rule(krum(f, lambda n: n - f - 2), weighted_mean)
        case "bulyan":
            return Rule(bulyan(f), nearest_mean(lambda chosen: chosen - 2 * f))
        case "norm_bound":
            return Rule(bounded(strategy.norm_bound), weighted_mean)
        case "centred_clip":
            return Rule(centred(strategy.norm_bound), weighted_mean)
        case "none":
            return Rule(None, weighted_mean)
