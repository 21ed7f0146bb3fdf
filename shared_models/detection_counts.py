"""How well lesions are found, as counts that add up across sites: FROC and CPM at 1/8 to 8 false marks a scan.

Scores are counted in the bins of `class_counts` (1000, even in the logit); marks of one bin rise together, as equal
scores do. The counts of sites together give the very curve of their pooled marks with scores told in bins; against
scores as they are, CPM is off by no more than the share of lesions in the fullest bin (tests/test_detection_counts.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared_models.class_counts import BINS, bin_of, least_of
from shared_models.parse import STRICT

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false marks a scan (Setio et al. 2017, section 3.4)
Count = Annotated[int, Field(ge=0, lt=2**53)]
Histogram = Annotated[tuple[Count, ...], Field(max_length=BINS, fail_fast=True)]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScanMarks:
    """One scan: what its marks came to under LUNA16's rules.

    Attributes:
        best: float64[lesions]: highest score of the marks in each lesion; NaN where there is none.
        false: float64[n]: scores of the marks in no lesion and in nothing irrelevant.
        ignored: marks in something irrelevant alone.
        off_mm: float64[found]: how far the diameter of the best mark is off, of each lesion that is found.
    """

    best: Floats
    false: Floats
    ignored: int
    off_mm: Floats


@dataclass(frozen=True, slots=True)
class DetectionCounts:
    """One label over the scans of one site, or of several merged.

    Attributes:
        scans: with lesions and without.
        lesions: in them, what is irrelevant left out.
        found: lesions with a mark in them, whatever its score.
        marks: that are false, whatever their score.
        ignored: marks in what counts neither way.
        off_um: sum over the found lesions of how far the mark's diameter is off, in µm.
        hits, false: lesions by the bin of their best mark, and false marks by theirs; empty where the site withholds
            them for want of scans, or of scans with lesions.
        told_scans, told_lesions: scans and lesions behind `hits` and `false`.

    Raises:
        ValueError: counts that no scans can give; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    measure: Literal["cpm"] = "cpm"
    scans: Count = 0
    lesions: Count = 0
    found: Count = 0
    marks: Count = 0
    ignored: Count = 0
    off_um: Count = 0
    hits: Histogram = ()
    false: Histogram = ()
    told_scans: Count = 0
    told_lesions: Count = 0

    def __post_init__(self) -> None:
        if self.found > self.lesions or (self.lesions and not self.scans):
            raise ValueError(f"{self.scans} scans cannot have {self.found} found of {self.lesions} lesions")
        if (len(self.hits), len(self.false)) not in ((0, 0), (BINS, BINS)):
            raise ValueError(f"histograms are withheld together or have {BINS} bins")
        if self.told_scans > self.scans or self.told_lesions > self.lesions:
            raise ValueError("the histograms count more than there is")
        if not self.hits and (self.told_scans or self.told_lesions):
            raise ValueError("the histograms are withheld and yet count scans")
        if sum(self.hits) > min(self.found, self.told_lesions) or sum(self.false) > self.marks:
            raise ValueError("the histograms hold more lesions or marks than there are")

    @property
    def cases(self) -> int:
        return self.scans

    @property
    def value(self) -> float:
        """CPM; NaN without lesions, or where the histograms are withheld."""
        return cpm(*froc(np.array(self.hits), np.array(self.false), self.told_lesions, self.told_scans))


def merge(a: DetectionCounts, b: DetectionCounts) -> DetectionCounts:
    """Counts of both; histograms that one side withholds leave the other's standing alone, with its own scans."""
    return DetectionCounts(
        scans=a.scans + b.scans,
        lesions=a.lesions + b.lesions,
        found=a.found + b.found,
        marks=a.marks + b.marks,
        ignored=a.ignored + b.ignored,
        off_um=a.off_um + b.off_um,
        hits=_sum(a.hits, b.hits),
        false=_sum(a.false, b.false),
        told_scans=a.told_scans + b.told_scans,
        told_lesions=a.told_lesions + b.told_lesions,
    )


def _sum(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else tuple(a or b)


def judged(marks: Floats, lesions: Floats, irrelevant: Floats) -> ScanMarks:
    """The marks of one scan under LUNA16's rules (its evaluation script, and Setio et al. 2017, section 3.4).

    A mark is a hit if it lies nearer to a lesion's centre than its radius; where extents differ by axis, within the
    ellipsoid. Of several in one lesion the highest score counts and the others nothing; one in two lesions finds both.
    A mark in something irrelevant and in no lesion counts nothing.

    Args:
        marks: float64[m, 7]: score, centre and half-extents along three axes in mm.
        lesions, irrelevant: float64[n, 6]: centre and half-extents in mm.
    """
    inside = _inside(marks[:, 1:4], lesions)  # [m, n]
    beside = _inside(marks[:, 1:4], irrelevant).any(axis=1)
    hit = inside.any(axis=1)
    best = np.where(inside, marks[:, :1], -np.inf).max(axis=0, initial=-np.inf)
    found = np.isfinite(best)
    chosen = np.where(inside, marks[:, :1], -np.inf).argmax(axis=0)[found] if len(marks) else np.empty(0, np.intp)
    widths = 2 * marks[chosen, 4:7].mean(axis=1)
    return ScanMarks(
        best=np.where(found, best, nan),
        false=marks[~hit & ~beside, 0],
        ignored=int((beside & ~hit).sum()),
        off_mm=np.abs(widths - 2 * lesions[found, 3:6].mean(axis=1)),
    )


def _inside(centres_mm: Floats, lesions: Floats) -> NDArray[np.bool_]:
    away = (centres_mm[:, None] - lesions[None, :, :3]) / lesions[None, :, 3:6]
    within: NDArray[np.bool_] = (away**2).sum(axis=2) < 1
    return within


def binned(scan: ScanMarks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64[BINS] each: lesions by the bin of their best mark, and false marks by theirs."""
    found = scan.best[np.isfinite(scan.best)]
    return np.bincount(bin_of(found), minlength=BINS), np.bincount(bin_of(scan.false), minlength=BINS)


def detection_counts(scans: Sequence[ScanMarks], smallest_count: int = 1) -> DetectionCounts:
    """The counts of one site; histograms are withheld below `smallest_count` scans, or of scans with lesions where
    there are any."""
    hits, false = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for scan in scans:
        of_scan = binned(scan)
        hits += of_scan[0]
        false += of_scan[1]
    lesions, with_lesions = sum(len(scan.best) for scan in scans), sum(len(scan.best) > 0 for scan in scans)
    kept = least_of(len(scans), with_lesions) >= max(1, smallest_count)
    return DetectionCounts(
        scans=len(scans),
        lesions=lesions,
        found=int(hits.sum()),
        marks=int(false.sum()),
        ignored=sum(scan.ignored for scan in scans),
        off_um=sum(int(np.rint(scan.off_mm * 1000).sum()) for scan in scans),
        hits=tuple(hits.tolist()) if kept else (),
        false=tuple(false.tolist()) if kept else (),
        told_scans=len(scans) if kept else 0,
        told_lesions=lesions if kept else 0,
    )


def froc(hits: NDArray[Any], false: NDArray[Any], lesions: float, scans: float) -> tuple[Floats, Floats]:
    """False marks a scan and sensitivity, float64[bins + 1] each, from no mark to all; empty without lesions.

    Lesions that no mark lies in stay in the denominator, and scans without lesions in that of the false marks.
    """
    if not lesions or not scans or not len(hits):
        return np.empty(0), np.empty(0)
    rates = np.concatenate([[0.0], np.cumsum(false[::-1]) / scans])
    return rates, np.concatenate([[0.0], np.cumsum(hits[::-1]) / lesions])


def cpm(rates: Floats, sensitivity: Floats) -> float:
    """Mean sensitivity at the seven rates, linear between thresholds, and beyond the last as it is there."""
    return float(np.mean(np.interp(RATES, rates, sensitivity))) if len(rates) else nan


def as_row(of: DetectionCounts) -> dict[str, Any]:
    """For JSON and tables: the figures beside the counts that they come from; None where one is not known."""
    rates, sensitivity = froc(np.array(of.hits), np.array(of.false), of.told_lesions, of.told_scans)
    at = np.interp(RATES, rates, sensitivity).tolist() if len(rates) else [nan] * len(RATES)
    figures = {
        "cpm": of.value,
        "at_1": at[RATES.index(1.0)],
        "sensitivity": of.found / of.lesions if of.lesions else nan,
        "false_per_scan": of.marks / of.scans if of.scans else nan,
        "off_mm": of.off_um / 1000 / of.found if of.found else nan,
    }
    return {
        "measure": of.measure,
        **{name: round(value, 6) if np.isfinite(value) else None for name, value in figures.items()},
        "cases": of.scans,
        "lesions": of.lesions,
        "ignored": of.ignored,
        "froc": [[rate, round(s, 6)] for rate, s in zip(RATES, at, strict=True)] if len(rates) else [],
    }
