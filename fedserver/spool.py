"""Updates that wait on disk until their round closes, and the mean or robust rule over all of them, block by block.

For rules that need every update at once. What is held in memory is one tensor and a block of each update, whatever the
number of sites; on disk it is an update for each site. A round that is begun again begins with an empty spool, and the
sites tell again what they have done: nothing here has to survive a process.
"""

import os
import shutil
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedserver.robust import Chosen, Matrix, rule_of
from shared_models.strategy import Strategy
from shared_models.weights import OnDisk, Schema, Tensors, one, open_tensors, save

VALUES = 1 << 20  # float64 of all updates together that are worked on at once: 8 MiB
MOST_RATIO = 4.0  # of a site's share by inverse variance to the median share


@dataclass(frozen=True, slots=True)
class Vote:
    """One site's update.

    Attributes:
        round: that it was trained in.
        weight: its share by examples, or by its age.
        factor: what it is multiplied by for its age.
        variance: of its mean local step, where the study weighs by it and the site knows it.
    """

    round: int
    delta: OnDisk
    weight: float
    factor: float
    variance: float | None


@dataclass(slots=True)
class Spool:
    """The updates of a round as files in `folder`, which is its own; one for each site, the newest."""

    schema: Schema
    folder: Path
    strategy: Strategy
    votes: dict[str, Vote] = field(default_factory=dict)
    _chosen: Chosen | None = None

    def __post_init__(self) -> None:
        clear(self.folder)
        self.folder.mkdir(parents=True, mode=0o700)

    def add(
        self, site: str, round_number: int, delta: Tensors, weight: float, factor: float, variance: float | None = None
    ) -> bool:
        """Keeps an admitted update, by a second name of its file where it is one; False where a newer one is there.

        One vote for a site: with a late update beside the one of the round, a site would count twice.
        """
        known = self.votes.get(site)
        if known is not None and known.round >= round_number:
            return False
        path = self.folder / f"{site}.safetensors"
        path.unlink(missing_ok=True)
        if not (isinstance(delta, OnDisk) and _linked(delta.path, path)):
            save(path, self.schema, ((name, one(delta, name)) for name in sorted(self.schema)), synced=False)
        kept = open_tensors(path, f"update of {site}")
        self.votes[site] = Vote(round_number, kept, weight, factor, variance)
        self._chosen = None
        return True

    def take_mean(self, name: str) -> NDArray[np.float64] | NDArray[np.int64]:
        """What the rule makes of one tensor: its shape, float64; whole numbers stay whole (nearest)."""
        spec, rule = self.schema[name], rule_of(self.strategy)
        sites = sorted(self.votes)
        chosen = self._choose()
        votes = [self.votes[sites[row]] for row in chosen.rows]
        shares = self._shares(votes)
        factors = np.array([v.factor * f for v, f in zip(votes, chosen.factors, strict=True)])
        whole = spec.dtype.kind != "f"
        mean: NDArray[Any] = np.empty(prod(spec.shape), np.int64 if whole else np.float64)
        step = max(1, VALUES // max(1, len(votes)))
        for at in range(0, mean.size, step):
            block = _stacked(votes, name, at, step)
            found = rule.combine(block if whole else block * factors[:, None], shares)
            mean[at : at + step] = np.rint(found) if whole else found
        return mean.reshape(spec.shape)

    def used(self) -> list[str] | None:
        """Sites whose update the rule picked; None for a rule that has a use for every one."""
        if self.strategy.robust not in ("krum", "multi_krum", "bulyan"):
            return None
        sites = sorted(self.votes)
        return [sites[row] for row in self._choose().rows]

    def _choose(self) -> Chosen:
        if self._chosen is None:
            choose = rule_of(self.strategy).choose
            everybody = tuple(range(len(self.votes)))
            self._chosen = choose(self._products()) if choose else Chosen(everybody, (1.0,) * len(everybody))
        return self._chosen

    def _products(self) -> Matrix:
        """[n, n] inner products of the updates, in the order of the sites' names; whole-number tensors left out."""
        votes = [self.votes[site] for site in sorted(self.votes)]
        factors = np.array([vote.factor for vote in votes])
        products, step = np.zeros((len(votes), len(votes))), max(1, VALUES // len(votes))
        for name, spec in sorted(self.schema.items()):
            for at in range(0, prod(spec.shape) if spec.dtype.kind == "f" else 0, step):
                block = _stacked(votes, name, at, step)
                products += block @ block.T
        scaled: Matrix = products * np.outer(factors, factors)
        return scaled

    def _shares(self, votes: list[Vote]) -> Matrix:
        weights = [vote.weight for vote in votes]
        if self.strategy.weighting == "inverse_variance":
            by_variance = inverse_variance([vote.variance for vote in votes])
            weights = [weight * share for weight, share in zip(weights, by_variance, strict=True)]
        return np.array(weights, dtype=np.float64) / sum(weights)


def inverse_variance(variances: list[float | None]) -> list[float]:
    """Shares that make the variance of a mean of independent estimates least: one over the variance of each.

    (Aitken 1935; Cochran 1937.) A share is held within `MOST_RATIO` of the median, so that a site cannot weigh what it
    likes by what it tells; one that tells nothing, or 0, has the median. For sites whose steps are equally noisy the
    variance of the mean step is as one over their number, and this is weighting by steps.
    """
    known = [1 / v for v in variances if v]
    middle = median(known) if known else 1.0
    return [min(max(1 / v, middle / MOST_RATIO), middle * MOST_RATIO) if v else middle for v in variances]


def clear(folder: Path) -> None:
    """Removes a spool, of a round that was finished or killed."""
    if folder.exists():
        shutil.rmtree(folder)


def _linked(file: Path, name: Path) -> bool:
    """Gives a file a second name: the upload is taken away after its reply, its content stays."""
    try:
        os.link(file, name)
    except OSError:
        return False  # another file system, or one without links
    return True


def _stacked(votes: list[Vote], name: str, start: int, count: int) -> Matrix:
    parts = [vote.delta.part(name, start, count) for vote in votes]
    stacked: Matrix = np.stack(parts).astype(np.float64)
    return stacked
