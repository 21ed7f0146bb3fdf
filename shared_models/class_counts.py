"""How well one class is told from the rest, as counts that add up across sites: AUROC, AUPRC, calibration.

Scores are counted in bins of equal width in the logit, finer near 0 and 1 where a trained network answers; within a bin
a positive and a negative count as a tie. At 1000 bins the AUROC of 400 and more cases is within 0.002 of that of their
pooled scores (tests/test_class_counts.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, nan, sqrt
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared_models.parse import STRICT

BINS = 1000  # of the logit, from -LIMIT to LIMIT; what lies beyond is in the outermost
LIMIT = 12.0
CELLS = 15  # of the reliability curve, of equal width in the probability
MICRO = 1_000_000
MOST_RANKED = 10**6  # cases of a bin that are ranked one by one; a count that came from elsewhere may say 2**53
STEEPEST = 20.0  # change of a logit by calibration
MIDDLES = (np.arange(BINS) + 0.5) * (2 * LIMIT / BINS) - LIMIT  # of the bins, as logits
Count = Annotated[int, Field(ge=0, lt=2**53)]
Histogram = Annotated[tuple[Count, ...], Field(max_length=BINS, fail_fast=True)]
Curve = Annotated[tuple[Count, ...], Field(max_length=CELLS, fail_fast=True)]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """One class over the cases of one site, or of several merged.

    Attributes:
        positives, negatives: cases that show the class, and that do not.
        true_positives, false_positives: those of them that were called positive.
        wins: over all pairs of a positive and a negative case of one site, twice those that the scores order rightly,
            and once those that tie.
        pairs: how many such pairs there are; sites merged have none across sites, the histograms have.
        square_micro: sum of (score - truth)^2, each in millionths (Brier 1950).
        positive, negative: cases by the bin of their score; empty where the site withholds them for want of cases of
            either kind.
        cell_cases, cell_positives, cell_micro: by cell of the reliability curve: cases, positives, and the sum of
            scores in millionths; withheld together with the histograms.

    Raises:
        ValueError: counts that no cases can give; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    measure: Literal["auroc"] = "auroc"
    positives: Count = 0
    negatives: Count = 0
    true_positives: Count = 0
    false_positives: Count = 0
    wins: Count = 0
    pairs: Count = 0
    square_micro: Count = 0
    positive: Histogram = ()
    negative: Histogram = ()
    cell_cases: Curve = ()
    cell_positives: Curve = ()
    cell_micro: Curve = ()
    specificity: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def __post_init__(self) -> None:
        if self.true_positives > self.positives or self.false_positives > self.negatives:
            raise ValueError(f"more cases are called positive than the {self.cases} that there are")
        if self.pairs > self.positives * self.negatives or self.wins > 2 * self.pairs:
            raise ValueError(f"{self.cases} cases cannot have {self.wins} wins in {self.pairs} pairs")
        if self.square_micro > self.cases * MICRO:
            raise ValueError(f"{self.cases} cases cannot have the squares {self.square_micro}")
        lengths = (len(self.positive), len(self.negative)), (
            len(self.cell_cases), len(self.cell_positives), len(self.cell_micro))  # fmt: skip
        if lengths not in (((0, 0), (0, 0, 0)), ((BINS, BINS), (CELLS, CELLS, CELLS))):
            raise ValueError(f"histograms are withheld together or have {BINS} bins and {CELLS} cells")
        counted = sum(self.positive), sum(self.negative)
        if counted[0] > self.positives or counted[1] > self.negatives:
            raise ValueError(f"the histograms hold more than {self.cases} cases")
        if (sum(self.cell_positives), sum(self.cell_cases)) != (counted[0], sum(counted)):
            raise ValueError("the reliability curve and the histograms count other cases")
        for cases, positives, micro in zip(self.cell_cases, self.cell_positives, self.cell_micro, strict=True):
            if positives > cases or micro > cases * MICRO:
                raise ValueError(f"{cases} cases of a cell cannot have {positives} positives and the sum {micro}")

    @property
    def cases(self) -> int:
        return self.positives + self.negatives

    @property
    def value(self) -> float:
        """AUROC: of one site exactly; of several from their histograms, as far as these are there. NaN without."""
        if self.pairs and self.pairs == self.positives * self.negatives:
            return self.wins / 2 / self.pairs
        return auroc(self.positive, self.negative)


NO_CLASS = ClassCounts()


def merge(a: ClassCounts, b: ClassCounts) -> ClassCounts:
    """Counts of both; histograms that one side withholds leave the other's standing alone."""
    if a == NO_CLASS or b == NO_CLASS:
        return b if a == NO_CLASS else a
    if a.specificity != b.specificity:
        raise ValueError(f"sensitivity at {a.specificity} and at {b.specificity} do not add up")
    return ClassCounts(
        positives=a.positives + b.positives,
        negatives=a.negatives + b.negatives,
        true_positives=a.true_positives + b.true_positives,
        false_positives=a.false_positives + b.false_positives,
        wins=a.wins + b.wins,
        pairs=a.pairs + b.pairs,
        square_micro=a.square_micro + b.square_micro,
        positive=_sum(a.positive, b.positive),
        negative=_sum(a.negative, b.negative),
        cell_cases=_sum(a.cell_cases, b.cell_cases),
        cell_positives=_sum(a.cell_positives, b.cell_positives),
        cell_micro=_sum(a.cell_micro, b.cell_micro),
        specificity=a.specificity,
    )


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else tuple(a or b)


def class_counts(
    scores: Floats,
    truth: NDArray[np.bool_],
    called: NDArray[np.bool_],
    smallest_count: int = 1,
    specificity: float = 0.9,
) -> ClassCounts:
    """The counts of one site from probabilities float64[N], truth bool[N] and decisions bool[N].

    Histograms and curve are withheld where there are positives or negatives, and fewer than `smallest_count` of them.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    kept = least_of(positives, negatives) >= max(1, smallest_count)
    cell = np.minimum((scores * CELLS).astype(int), CELLS - 1)
    micro = np.rint(scores * MICRO).astype(np.int64)
    return ClassCounts(
        positives=positives,
        negatives=negatives,
        true_positives=int((called & truth).sum()),
        false_positives=int((called & ~truth).sum()),
        wins=_wins(scores, truth),
        pairs=positives * negatives,
        square_micro=int(np.rint((scores - truth) ** 2 * MICRO).sum()),
        positive=_counted(bin_of(scores[truth]), BINS) if kept else (),
        negative=_counted(bin_of(scores[~truth]), BINS) if kept else (),
        cell_cases=_counted(cell, CELLS) if kept else (),
        cell_positives=_counted(cell[truth], CELLS) if kept else (),
        cell_micro=tuple(int(micro[cell == c].sum()) for c in range(CELLS)) if kept else (),
        specificity=specificity,
    )


def least_of(*sides: int) -> int:
    """Cases of the smallest side that has any, 0 where none has. A distribution that is told by side hides each patient
    among those of his side only."""
    return min((cases for cases in sides if cases), default=0)


def bin_of(scores: Floats) -> NDArray[np.intp]:
    """The bin of each probability."""
    with np.errstate(divide="ignore"):
        logit = np.log(scores) - np.log1p(-scores)
    place = np.floor((np.clip(logit, -LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * BINS)
    bins: NDArray[np.intp] = np.minimum(place, BINS - 1).astype(np.intp)
    return bins


def _counted(places: NDArray[np.intp], length: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(places, minlength=length))


def _wins(scores: Floats, truth: NDArray[np.bool_]) -> int:
    """Mann and Whitney's U, doubled so that ties stay whole numbers."""
    negative = np.sort(scores[~truth])
    below = np.searchsorted(negative, scores[truth], "left").astype(np.int64)
    return int((below + np.searchsorted(negative, scores[truth], "right")).sum())


def auroc(positive: Sequence[int], negative: Sequence[int]) -> float:
    """Area under the ROC curve from histograms of one scale; NaN where a side is empty (Hanley & McNeil 1982)."""
    p, n = np.array(positive, dtype=object), np.array(negative, dtype=object)
    if not sum(p) or not sum(n):
        return nan
    below = np.cumsum(n) - n
    return float(sum(p * (2 * below + n)) / (2 * sum(p) * sum(n)))


def auprc(positive: Sequence[int], negative: Sequence[int]) -> float:
    """Average precision from histograms, from the highest score down; NaN without positives.

    Within a bin the negatives lie evenly between the positives, as they do on average in any order.
    """
    if not sum(positive):
        return nan
    found, called, area = 0, 0, 0.0
    for p, n in zip(reversed(positive), reversed(negative), strict=True):
        if p > MOST_RANKED:  # its sum in closed form: of 1 / (a + rank) it is a logarithm
            step = 1 + n / (p + 1)
            a = called / step
            area += (p + (found - a) * log((a + p + 0.5) / (a + 0.5))) / step
        elif p:
            rank = np.arange(1, p + 1)
            area += float(np.sum((found + rank) / (called + rank + n * rank / (p + 1))))
        found, called = found + p, called + p + n
    return area / found


def sensitivity_at(specificity: float, positive: Sequence[int], negative: Sequence[int]) -> float:
    """The largest sensitivity of a threshold between bins that has at least this specificity; NaN where undefined."""
    positives, negatives = sum(positive), sum(negative)
    if not positives or not negatives:
        return nan
    found, false, best = 0, 0, 0.0
    for p, n in zip(reversed(positive), reversed(negative), strict=True):
        found, false = found + p, false + n
        if negatives - false < specificity * negatives - 1e-9:
            break
        best = found / positives
    return best


def calibration_error(of: ClassCounts) -> float:
    """Expected calibration error over 15 cells (Guo et al. 2017, equation 3); NaN where they are withheld."""
    total = sum(of.cell_cases)
    if not total:
        return nan
    gaps = (abs(p - m / MICRO) for p, m in zip(of.cell_positives, of.cell_micro, strict=True))
    return sum(gaps) / total


def temperature(of: ClassCounts) -> float:
    """What logits are divided by so that scores are as likely as they say (Guo et al. 2017, section 4.2): the least
    cross-entropy over the histograms, whose bins stand for their middles. NaN where cases of a kind are missing.

    It follows from summed histograms, so that sites together have that of their pooled scores, told in bins. The
    cross-entropy is convex in 1 / temperature, whose derivative is halved to a zero between 1 / 20 and 20.
    """
    if not sum(of.positive) or not sum(of.negative):
        return nan
    p, n = np.array(of.positive, np.float64), np.array(of.negative, np.float64)
    low, high = 1 / STEEPEST, STEEPEST
    for _ in range(60):
        middle = sqrt(low * high)
        rising = float(((p + n) * MIDDLES / (1 + np.exp(-middle * MIDDLES)) - p * MIDDLES).sum()) > 0
        low, high = (low, middle) if rising else (middle, high)
    return 1 / sqrt(low * high)


def calibrated_error(of: ClassCounts, by: float) -> float:
    """Expected calibration error over 15 cells of scores whose logits are divided by `by`, from the histograms."""
    if not sum(of.positive) + sum(of.negative) or not np.isfinite(by):
        return nan
    p, n = np.array(of.positive, np.float64), np.array(of.negative, np.float64)
    score = 1 / (1 + np.exp(-MIDDLES / by))
    cell = np.minimum((score * CELLS).astype(int), CELLS - 1)
    off = np.bincount(cell, p - (p + n) * score, CELLS)
    return float(np.abs(off).sum() / (p + n).sum())


def as_row(of: ClassCounts) -> dict[str, Any]:
    """For JSON and tables: the figures beside the counts that they come from; None where one is not known."""
    sensitivity = of.true_positives / of.positives if of.positives else nan
    true_negatives = of.negatives - of.false_positives
    specificity = true_negatives / of.negatives if of.negatives else nan
    figures = {
        "auroc": of.value,
        "auprc": auprc(of.positive, of.negative) if of.positive else nan,
        "prevalence": of.positives / of.cases if of.cases else nan,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity_at_specificity": sensitivity_at(of.specificity, of.positive, of.negative) if of.positive else nan,
        "at_specificity": of.specificity,
        "brier": of.square_micro / MICRO / of.cases if of.cases else nan,
        "ece": calibration_error(of),
    }
    cells = zip(of.cell_cases, of.cell_positives, of.cell_micro, strict=True)
    return {
        "measure": of.measure,
        **{name: round(value, 6) if np.isfinite(value) else None for name, value in figures.items()},
        "cases": of.cases,
        "positives": of.positives,
        "reliability": [{"cases": n, "positives": p, "score": round(m / MICRO / n, 6)} if n else None
                        for n, p, m in cells],
    }  # fmt: skip
