"""Whether cases that come one by one are still like a reference, with a bound on false alarms however often one looks.

A conformal test martingale (Vovk, Nouretdinov & Gammerman 2003; Vovk et al. 2021, "Retrain or not retrain"): a case's
rank among the reference and the cases before it is uniform and independent of what came before, as long as all of them
are exchangeable, whatever their distribution. Whoever bets against that with 1 unit multiplies it by 100 with a chance
of at most 1 in 100, at any time (Ville 1939). Bets are histograms of the ranks so far, of several widths, begun anew
at several times, on all features at once; their mean is a martingale too, so that no correction for many features or
many looks is needed. Where the reference is of several sites, the least wealth over them counts: like one is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_models.drift import Cells, Profile
from shared_models.seeds import rng

WINDOW = 200  # cases; then the bets begin anew
ALARM = 100.0  # wealth: at most one window in a hundred is a false alarm
WIDTHS = (2, 4, 8)  # cells that ranks are counted in
STARTS = (0, 50, 100, 150)  # cases of a window after which a share of the money goes into play
FEWEST = 10  # cases of a reference


@dataclass(frozen=True, slots=True)
class Window:
    """What came of the bets on up to `WINDOW` cases.

    Attributes:
        cases: of the window.
        wealth: the largest so far.
        alarm: after how many cases it reached `ALARM`; None where it did not.
        nearest: the profile that the cases are most like: whose bets won least.
        features: against which the bets won most by the alarm (or by now), most first, with their wealth.
    """

    cases: int
    wealth: float
    alarm: int | None
    nearest: int
    features: tuple[tuple[str, float], ...]


def watched(profiles: Sequence[Profile], cases: Sequence[Cells], words: Sequence[object]) -> Window:
    """One window of cases, in the order in which they came.

    Args:
        profiles: the reference, each of at least `FEWEST` cases.
        words: what the draws that break ties follow from; another window has others.
    """
    names = sorted(profiles[0].counts)
    longest = max(len(profiles[0].counts[name]) for name in names)
    bag = np.zeros((len(profiles), len(names), longest))
    for k, profile in enumerate(profiles):
        for f, name in enumerate(names):
            bag[k, f, : len(profile.counts[name])] = profile.counts[name]
    at = np.array([[cells[name] for name in names] for cells in cases], np.intp).reshape(len(cases), len(names))
    ties = rng("drift", *words).random((WINDOW, len(names)))
    bets = _Bets(bag.shape[:2])
    most, alarm = 1.0, None
    told = np.ones(bag.shape[:2])
    for t in range(len(cases)):
        ranks = _ranks(bag, at[t], ties[t])
        told = bets.won(ranks, t)
        wealth = float(told.mean(axis=1).min())
        most = max(most, wealth)
        if wealth >= ALARM:
            alarm = t + 1
            break
        bag[:, np.arange(len(names)), at[t]] += 1
    nearest = int(told.mean(axis=1).argmin())
    order = np.argsort(-told[nearest], kind="stable")
    features = tuple((names[f], float(told[nearest, f])) for f in order)
    return Window(len(cases), most, alarm, nearest, features)


def _ranks(bag: NDArray[np.float64], at: NDArray[np.intp], ties: NDArray[np.float64]) -> NDArray[np.float64]:
    """[profiles, features]: the share of the bag and the case itself that lies above it; ties are broken by lot."""
    cell = at[None, :, None]
    above = np.where(np.arange(bag.shape[2]) > cell, bag, 0).sum(axis=2)
    equal = np.take_along_axis(bag, np.broadcast_to(cell, (*bag.shape[:2], 1)), axis=2)[:, :, 0] + 1
    ranks: NDArray[np.float64] = (above + ties * equal) / (bag.sum(axis=2) + 1)
    return ranks


class _Bets:
    """Wealth of those who bet by a histogram of the ranks since each start, with one count in every cell to begin
    with (Laplace's rule); for every start, width, profile and feature."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.starts = np.array(STARTS)
        self.widths = np.array(WIDTHS).reshape(-1, 1, 1)
        self.counts = np.ones((len(STARTS), len(WIDTHS), *shape, max(WIDTHS)))
        self.log = np.zeros((len(STARTS), len(WIDTHS), *shape))

    def won(self, ranks: NDArray[np.float64], t: int) -> NDArray[np.float64]:
        """Mean wealth over starts and widths, [profiles, features], once the ranks of case `t` are known."""
        begun = int((self.starts <= t).sum())
        since = (t - self.starts[:begun]).reshape(-1, 1, 1, 1)
        cell = np.minimum((ranks * self.widths).astype(np.intp), self.widths - 1)
        at = np.broadcast_to(cell[None, ..., None], (begun, *cell.shape, 1))
        held = np.take_along_axis(self.counts[:begun], at, axis=4)
        self.log[:begun] += np.log(self.widths * held[..., 0] / (since + self.widths))
        np.put_along_axis(self.counts[:begun], at, held + 1, axis=4)
        wealth: NDArray[np.float64] = np.exp(np.minimum(self.log, 600.0)).mean(axis=(0, 1))
        return wealth
