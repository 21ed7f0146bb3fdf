"""How well a prognosis ranks patients and how far its survival curves are off, as whole numbers that add up.

Pairs are counted within a site, as no site knows another's patients; their sums are exact, so the federation's C-index
is that of all such pairs. The Brier score is weighted by the site's own censoring (Graf et al. 1999, section 4).
"""

from dataclasses import dataclass
from math import nan
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared_models.class_counts import least_of
from shared_models.parse import STRICT

MICRO = 1_000_000
LEAST_UNCENSORED = 0.05  # share still in follow-up, below which a weight grows no further
Count = Annotated[int, Field(ge=0, lt=2**53)]
Counts = Annotated[tuple[Count, ...], Field(max_length=64, fail_fast=True)]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SurvivalCounts:
    """The cases of one site, or of several merged.

    Attributes:
        cases, events: followed, and of those with the event.
        wins: over all comparable pairs twice those that the risks order rightly, and once those that tie.
        pairs: of two cases, the first of which is known to have had its event earlier (Harrell et al. 1982).
        square_micro: at the end of each interval the weighted sum of (survived - predicted)^2, in millionths.
        predicted_micro: sum of the predicted survival there; withheld with the next two for want of cases with the
            event or without.
        at_risk, came: cases that were followed through each interval or had the event in it, and those that had it.
        told_cases: cases behind these three; sites of earlier versions tell them of all their cases and do not say so.

    Raises:
        ValueError: counts that no cases can give; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    measure: Literal["c_index"] = "c_index"
    cases: Count = 0
    events: Count = 0
    wins: Count = 0
    pairs: Count = 0
    square_micro: Counts = ()
    predicted_micro: Counts = ()
    at_risk: Counts = ()
    came: Counts = ()
    told_cases: Count = 0

    def __post_init__(self) -> None:
        if self.events > self.cases or 2 * self.pairs > self.cases * max(0, self.cases - 1):
            raise ValueError(f"{self.cases} cases cannot have {self.events} events and {self.pairs} pairs")
        if self.wins > 2 * self.pairs:
            raise ValueError(f"{self.pairs} pairs cannot have {self.wins} wins")
        if any(s > self.cases * MICRO / LEAST_UNCENSORED for s in self.square_micro):
            raise ValueError(f"{self.cases} cases cannot have such squares")
        lengths = {len(self.predicted_micro), len(self.at_risk), len(self.came)}
        if len(lengths) > 1 or not lengths <= {0, len(self.square_micro)}:
            raise ValueError("the curves have other intervals than the squares")
        if self.predicted_micro and not self.told_cases:
            object.__setattr__(self, "told_cases", self.cases)
        if self.told_cases > (self.cases if self.predicted_micro else 0):
            raise ValueError(f"the curves are of {self.told_cases} cases, which is more than there are or are told")
        if any(c > r or r > self.told_cases for c, r in zip(self.came, self.at_risk, strict=True)):
            raise ValueError(f"{self.told_cases} cases cannot have more events than were at risk")
        if sum(self.came) > self.events or any(p > self.told_cases * MICRO for p in self.predicted_micro):
            raise ValueError(f"the curves hold more than {self.told_cases} cases")

    @property
    def value(self) -> float:
        """C-index; NaN without a comparable pair."""
        return self.wins / 2 / self.pairs if self.pairs else nan


def merge(a: SurvivalCounts, b: SurvivalCounts) -> SurvivalCounts:
    """Counts of both; curves that one side withholds leave the other's standing alone, with its own cases.

    Raises:
        ValueError: of unlike intervals.
    """
    return SurvivalCounts(
        cases=a.cases + b.cases,
        events=a.events + b.events,
        wins=a.wins + b.wins,
        pairs=a.pairs + b.pairs,
        square_micro=_sum(a.square_micro, b.square_micro),
        predicted_micro=_sum(a.predicted_micro, b.predicted_micro),
        at_risk=_sum(a.at_risk, b.at_risk),
        came=_sum(a.came, b.came),
        told_cases=a.told_cases + b.told_cases,
    )


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if a and b and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} intervals do not add up")
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def survival_counts(
    survival: Floats, time: Floats, event: NDArray[np.bool_], ends: Floats, smallest_count: int = 1
) -> SurvivalCounts:
    """The counts of one site: predicted survival float64[N, J] at `ends` [J], time [N] in days, event bool[N].

    Curves are withheld where there are cases with the event or without it, and fewer than `smallest_count` of them.
    """
    wins, pairs = pairs_of(-survival.sum(axis=1), time, event)
    had = event[:, None] & (time[:, None] <= ends)
    followed = (time[:, None] >= ends) & ~had
    begins = np.concatenate([[0.0], ends[:-1]])
    came = had & (time[:, None] > begins)
    squares = (followed_weights(time, event, ends) * (followed.astype(float) - survival) ** 2).sum(axis=0)
    kept = least_of(int(event.sum()), int((~event).sum())) >= max(1, smallest_count)
    return SurvivalCounts(
        cases=len(time),
        events=int(event.sum()),
        wins=wins,
        pairs=pairs,
        square_micro=_ints(np.rint(squares * MICRO)),
        predicted_micro=_ints(np.rint(survival * MICRO).sum(axis=0)) if kept else (),
        at_risk=_ints((came | followed).sum(axis=0)) if kept else (),
        came=_ints(came.sum(axis=0)) if kept else (),
        told_cases=len(time) if kept else 0,
    )


def _ints(values: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def pairs_of(risk: Floats, time: Floats, event: NDArray[np.bool_]) -> tuple[int, int]:
    """(wins, pairs) of Harrell's C-index: of a pair the one with an event must be earlier, or as early and the other
    censored."""
    wins = pairs = 0
    for n in np.flatnonzero(event):
        later = (time > time[n]) | ((time == time[n]) & ~event)
        pairs += int(later.sum())
        wins += int(2 * (risk[later] < risk[n]).sum() + (risk[later] == risk[n]).sum())
    return wins, pairs


def followed_weights(time: Floats, event: NDArray[np.bool_], ends: Floats) -> Floats:
    """float64[N, J]: the weight of each case at each end, 1 over the share not yet censored (Kaplan and Meier's
    estimate): when its event came, at the end when it is followed until then, 0 when it was censored before.

    Who is censored at the very end was followed through the interval, as in the loss: so his going weighs on nobody
    there. A study that ends on the last day of an interval would else weigh each who stayed by up to twenty.
    """
    before = np.array([_uncensored(time, event, t) for t in time])
    at_end = np.array([_uncensored(time, event, t) for t in ends])
    had = event[:, None] & (time[:, None] <= ends)
    beyond = time[:, None] >= ends
    weights = np.zeros((len(time), len(ends)))
    weights += had / np.maximum(before, LEAST_UNCENSORED)[:, None]
    weights += (beyond & ~had) / np.maximum(at_end, LEAST_UNCENSORED)
    return weights


def _uncensored(time: Floats, event: NDArray[np.bool_], at: float) -> float:
    """Share that is not censored before `at`."""
    share = 1.0
    for t in np.unique(time[~event]):
        if t < at:
            at_risk = int((time > t).sum() + ((time == t) & ~event).sum())  # events of that day come before
            share *= 1 - int(((time == t) & ~event).sum()) / at_risk
    return share


def observed(of: SurvivalCounts) -> list[float]:
    """Survival at the end of each interval, from the counts of all sites (the life-table estimate)."""
    shares, left = list[float](), 1.0
    for came, at_risk in zip(of.came, of.at_risk, strict=True):
        left *= 1 - came / at_risk if at_risk else 1.0
        shares.append(left)
    return shares


def as_row(of: SurvivalCounts) -> dict[str, Any]:
    """For JSON and tables; None where a figure is not known."""
    brier = [s / MICRO / of.cases for s in of.square_micro] if of.cases else []
    return {
        "measure": of.measure,
        "c_index": round(of.value, 6) if of.pairs else None,
        "brier": round(sum(brier) / len(brier), 6) if brier else None,
        "cases": of.cases,
        "events": of.events,
        "pairs": of.pairs,
        "curve": {
            "predicted": [round(p / MICRO / of.told_cases, 6) for p in of.predicted_micro if of.told_cases],
            "observed": [round(s, 6) for s in observed(of)],
        },
    }
