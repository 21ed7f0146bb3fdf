"""Measures that add up: a site sends whole-number counts, and the federation's figure follows from their sum.

`merge` is associative and commutative with `DiceCounts()` as zero, and the counts of two sites merged are the counts of
their cases together, to the last digit; so any grouping of sites gives the same result and secure aggregation can carry
the counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared_models.parse import STRICT
from shared_models.surface_counts import SurfaceCounts, surface_row
from shared_models.surface_counts import merge as merge_surfaces

BINS = 20  # of the Dice histogram, 0.05 wide, the last one closed
MICRO = 1_000_000
IGNORE = 127  # mask value that is neither trained on nor scored
Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, slots=True)
class DiceCounts:
    """Dice over the cases of one site and label.

    Attributes:
        cases: cases with a score.
        empty: cases left out because neither truth nor prediction holds the label.
        sum_micro, square_micro: sums of Dice and of its square, each rounded to millionths.
        histogram: cases per Dice bin of 1 / `BINS`; empty when the site withholds it for want of cases.
        surface: how far boundaries and volumes are off, where the study asks for it.

    Raises:
        ValueError: counts that no Dice between 0 and 1 can give; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    cases: Count = 0
    empty: Count = 0
    sum_micro: Count = 0
    square_micro: Count = 0
    histogram: Annotated[tuple[Count, ...], Field(max_length=BINS, fail_fast=True)] = ()
    surface: SurfaceCounts | None = None
    measure: Literal["dice"] = "dice"

    def __post_init__(self) -> None:
        if not self.square_micro <= self.sum_micro <= self.cases * MICRO:
            raise ValueError(f"{self.cases} cases cannot have the sum {self.sum_micro} and squares {self.square_micro}")
        if len(self.histogram) not in (0, BINS) or sum(self.histogram) > self.cases:
            raise ValueError(f"a histogram of {self.cases} cases is empty or has {BINS} bins of at most so many cases")

    @property
    def mean(self) -> float:
        """Mean Dice, NaN without cases."""
        return self.sum_micro / MICRO / self.cases if self.cases else float("nan")

    @property
    def value(self) -> float:
        return self.mean

    @property
    def deviation(self) -> float:
        """Standard deviation of Dice over the cases."""
        if not self.cases:
            return float("nan")
        return sqrt(max(0.0, self.square_micro / MICRO / self.cases - self.mean**2))


def merge(a: DiceCounts, b: DiceCounts) -> DiceCounts:
    """Counts of both; a histogram that one side withholds leaves the other's standing alone."""
    if a.histogram and b.histogram:
        histogram = tuple(x + y for x, y in zip(a.histogram, b.histogram, strict=True))
    else:
        histogram = a.histogram or b.histogram
    return DiceCounts(
        a.cases + b.cases,
        a.empty + b.empty,
        a.sum_micro + b.sum_micro,
        a.square_micro + b.square_micro,
        histogram,
        merge_surfaces(a.surface, b.surface),
    )


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_]) -> float | None:
    """Dice of one case over its `valid` voxels; None where neither side holds the label, 0 where one misses it."""
    predicted, truth = predicted & valid, truth & valid
    size = int(predicted.sum()) + int(truth.sum())
    return 2.0 * int((predicted & truth).sum()) / size if size else None


def counts(scores: Iterable[float | None], smallest_count: int = 1, surface: SurfaceCounts | None = None) -> DiceCounts:
    """The counts of one site; the histogram is withheld below `smallest_count` cases."""
    listed = list(scores)
    known = np.array([s for s in listed if s is not None], dtype=np.float64)
    bins = np.minimum((known * BINS).astype(int), BINS - 1)
    histogram: tuple[int, ...] = tuple(int(n) for n in np.bincount(bins, minlength=BINS)) if known.size else ()
    return DiceCounts(
        cases=int(known.size),
        empty=len(listed) - int(known.size),
        sum_micro=int(np.rint(known * MICRO).sum()),
        square_micro=int(np.rint(known**2 * MICRO).sum()),
        histogram=histogram if known.size >= smallest_count else (),
        surface=surface,
    )


def withheld(of: DiceCounts, smallest_count: int) -> DiceCounts:
    """`of`, with its histograms only where they are of `smallest_count` cases or more."""
    surface = of.surface
    if surface is not None and surface.cases < smallest_count:
        surface = replace(surface, distance=())
    return replace(of, histogram=of.histogram if of.cases >= smallest_count else (), surface=surface)


def as_row(part: DiceCounts) -> dict[str, Any]:
    """For JSON and tables: mean and deviation beside the counts they come from."""
    return {
        "measure": part.measure,
        "dice": None if not part.cases else round(part.mean, 6),
        "deviation": None if not part.cases else round(part.deviation, 6),
        "cases": part.cases,
        "empty": part.empty,
        "histogram": list(part.histogram),
        **({} if part.surface is None else surface_row(part.surface)),
    }
