"""Whether a federation was worth it at one site: differences between two models, with an interval over its patients.

All of it happens in the site's own process. What is made from it names no patient and holds no score of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared_models.detection_counts import cpm, froc

Floats = NDArray[np.float64]
Verdict = Literal["gains", "harmed", "no clear difference", "too few patients"]
RESAMPLES = 2000
LEVEL = 0.95
FEWEST_PATIENTS = 5  # below, resamples of them are too alike for an interval
FEWEST_DEFINED = 0.9  # share of the resamples that must have a value


@dataclass(frozen=True, slots=True)
class CaseScores:
    """One model on a site's cases, in the form in which a resample of them can be scored at once.

    With w how often each of n cases counts the measure is w·top / w·bottom (a mean over cases, or a ratio of sums:
    float64[n]), or w·top·w / w·bottom·w (over pairs of cases, as AUROC and C-index are: float64[n, n]).
    """

    top: Floats
    bottom: Floats


@dataclass(frozen=True, slots=True)
class FrocScores:
    """One detector on a site's scans, likewise: CPM of a resample follows from the sums over its scans.

    Attributes:
        hits, false: float64[n, bins]: lesions by the bin of their best mark, and false marks by theirs.
        lesions: float64[n].
        part: intp[n]: which of several detectors was on a scan, whose marks have no threshold in common; None is one.
    """

    hits: Floats
    false: Floats
    lesions: Floats
    part: NDArray[np.intp] | None = None


AnyScores: TypeAlias = CaseScores | FrocScores


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its percentile interval at 95 % over patients (Efron & Tibshirani 1993, section 13.3).

    Attributes:
        low, high: NaN where there are too few patients.
        patients: with a score.
    """

    value: float
    low: float
    high: float
    patients: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One model less another, in the task's headline measure, mean over the runs of several seeds; as `Interval`."""

    value: float
    low: float
    high: float
    patients: int

    @property
    def verdict(self) -> Verdict:
        """A site is harmed where the whole interval lies below 0, and gains where it lies above."""
        if not np.isfinite([self.value, self.low, self.high]).all():
            return "too few patients"
        return "harmed" if self.high < 0 else "gains" if self.low > 0 else "no clear difference"


def mean_scores(values: Sequence[float] | Floats) -> CaseScores:
    """Of a measure of each case; NaN leaves one out."""
    known = np.isfinite(values)
    return CaseScores(np.where(known, values, 0.0), known.astype(np.float64))


def ranked_scores(risks: Floats, before: NDArray[np.bool_]) -> CaseScores:
    """Of a measure over pairs: `before[i, j]` where i should have the higher risk; equal ones count half."""
    wins = (risks[:, None] > risks[None]) + 0.5 * (risks[:, None] == risks[None])
    return CaseScores(np.where(before, wins, 0.0), before.astype(np.float64))


def measure(scores: AnyScores, counts: Floats) -> Floats:
    """float64[B]: the measure where the cases count as each row of float64[B, n] says; NaN without any."""
    if isinstance(scores, FrocScores):
        return _cpm(scores, counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        if scores.top.ndim == 1:
            found: Floats = (counts @ scores.top) / (counts @ scores.bottom)
        else:
            found = ((counts @ scores.top) * counts).sum(axis=1) / ((counts @ scores.bottom) * counts).sum(axis=1)
    return found


def _cpm(scores: FrocScores, counts: Floats) -> Floats:
    """float64[B]: CPM of each part, weighted by its lesions; NaN without any."""
    total, weight = np.zeros(len(counts)), np.zeros(len(counts))
    parts = _parts(scores)
    for part in np.unique(parts):
        mine = parts == part
        hits, false, times = scores.hits[mine], scores.false[mine], counts[:, mine]
        seen = hits.any(axis=0) | false.any(axis=0)  # few of the bins hold anything
        lesions, scans = times @ scores.lesions[mine], times.sum(axis=1)
        rows = zip(times @ hits[:, seen], times @ false[:, seen], lesions, scans, strict=True)
        found = np.array([cpm(*froc(h, f, n, m)) for h, f, n, m in rows])
        total += np.where(lesions > 0, found * lesions, 0.0)
        weight += lesions
    with np.errstate(invalid="ignore"):
        return total / weight


def _parts(scores: FrocScores) -> NDArray[np.intp]:
    return np.zeros(len(scores.lesions), np.intp) if scores.part is None else scores.part


def difference(
    ours: Sequence[AnyScores],
    theirs: Sequence[AnyScores],
    patients: Sequence[str],
    draw: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Difference:
    """`ours` less `theirs`, one of each for every seed, over the same cases; patients are drawn with all their cases.

    Args:
        patients: of each case.
    """
    of = _interval(partial(_mean_difference, ours, theirs), [*ours, *theirs], patients, draw, resamples)
    return Difference(of.value, of.low, of.high, of.patients)


def interval(
    scores: Sequence[AnyScores], patients: Sequence[str], draw: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """The measure of a model at its site, mean over the runs of several seeds; arguments as of `difference`."""

    def mean(counts: Floats) -> Floats:
        over: Floats = np.mean([measure(each, counts) for each in scores], axis=0)
        return over

    return _interval(mean, scores, patients, draw, resamples)


def _interval(
    figure: Callable[[Floats], Floats],
    scores: Sequence[AnyScores],
    patients: Sequence[str],
    draw: np.random.Generator,
    resamples: int,
) -> Interval:
    """`figure` of all cases, and how it varies when patients are drawn anew."""
    names = sorted(set(patients))
    whose = np.array([names.index(patient) for patient in patients], dtype=np.intp)
    scored = np.zeros(len(whose), bool)
    for each in scores:
        scored |= _with_score(each)
    known = len(set(whose[scored].tolist()))
    value = float(figure(np.ones((1, len(whose))))[0])
    if known < FEWEST_PATIENTS:
        return Interval(value, np.nan, np.nan, known)
    times = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).astype(np.float64)
    drawn = figure(times[:, whose])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < FEWEST_DEFINED * resamples:
        return Interval(value, np.nan, np.nan, known)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), known)


def _with_score(scores: AnyScores) -> NDArray[np.bool_]:
    """bool[n]: which cases the measure depends on; every scan counts in false marks a scan."""
    if isinstance(scores, FrocScores):
        return np.ones(len(scores.lesions), bool)
    if scores.bottom.ndim == 1:
        return np.asarray(scores.bottom > 0)
    return np.asarray((scores.bottom + scores.bottom.T).any(axis=1))


def _mean_difference(ours: Sequence[AnyScores], theirs: Sequence[AnyScores], counts: Floats) -> Floats:
    each = [measure(a, counts) - measure(b, counts) for a, b in zip(ours, theirs, strict=True)]
    mean: Floats = np.mean(each, axis=0)
    return mean


def worst_tenth(scores: Sequence[AnyScores]) -> float | None:
    """The score that one case in ten does not reach, mean over seeds; None for a measure that a case has not alone."""
    of_cases = [each for each in scores if isinstance(each, CaseScores) and each.top.ndim == 1 and each.bottom.any()]
    if not scores or len(of_cases) < len(scores):
        return None
    known = [(each.top[each.bottom > 0], each.bottom[each.bottom > 0]) for each in of_cases]
    return float(np.mean([np.quantile(top / bottom, 0.1) for top, bottom in known]))


def joined(parts: Sequence[AnyScores]) -> AnyScores:
    """The same of the cases of all parts, each scored by a model of its own, which is not compared with another's.

    Raises:
        ValueError: scores of two kinds of measure.
    """
    scans = [each for each in parts if isinstance(each, FrocScores)]
    cases = [each for each in parts if isinstance(each, CaseScores)]
    if len(scans) == len(parts):
        return FrocScores(
            np.concatenate([each.hits for each in scans]),
            np.concatenate([each.false for each in scans]),
            np.concatenate([each.lesions for each in scans]),
            np.repeat(np.arange(len(scans)), [len(each.lesions) for each in scans]),
        )
    if len(cases) < len(parts) or len({each.top.ndim for each in cases}) > 1:
        raise ValueError("scores of several measures cannot be joined")
    together = np.concatenate if cases[0].top.ndim == 1 else _along_the_diagonal
    return CaseScores(together([each.top for each in cases]), together([each.bottom for each in cases]))


def _along_the_diagonal(squares: Sequence[Floats]) -> Floats:
    whole = np.zeros((sum(map(len, squares)),) * 2)
    start = 0
    for square in squares:
        end = start + len(square)
        whole[start:end, start:end] = square
        start = end
    return whole


def part_of(scores: AnyScores, cases: NDArray[np.intp]) -> AnyScores:
    """The same of some of the cases."""
    if isinstance(scores, FrocScores):
        return FrocScores(scores.hits[cases], scores.false[cases], scores.lesions[cases], _parts(scores)[cases])
    if scores.top.ndim == 1:
        return CaseScores(scores.top[cases], scores.bottom[cases])
    return CaseScores(scores.top[np.ix_(cases, cases)], scores.bottom[np.ix_(cases, cases)])
