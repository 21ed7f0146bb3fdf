"""Scores of each case of a site under one model, for comparisons that stay at the site."""

from collections.abc import Iterable, Mapping
from functools import reduce

import numpy as np

from fedclient.worth import AnyScores, CaseScores, FrocScores, mean_scores, ranked_scores
from shared_models.class_counts import BINS
from shared_models.detection_counts import binned, detection_counts
from shared_models.metrics import DiceCounts, withheld
from shared_models.restored_counts import RestoredCounts
from shared_models.scores import Score, merge
from shared_models.study import Task
from shared_models.tasks.detection import scan_marks
from shared_models.tasks.functions import CaseAnswer, TaskFunctions


def scored(
    task: Task, functions: TaskFunctions, answers: Iterable[CaseAnswer], threshold: float, smallest_count: int
) -> tuple[Mapping[str, Score], AnyScores]:
    """Counts by answer as they may leave; and case by case, for the first of them, what a resample is scored by.

    Dice of each case, what is restored of it, what its marks came to (CPM), or which pairs of cases the model orders
    rightly (AUROC, C-index). One image is in memory at a time where answers are as large as images.
    """
    if task.kind in ("segmentation", "reconstruction"):
        each = [functions.scores(iter([case]), threshold, 1) for case in answers]
        if not each:
            return functions.scores(iter(()), threshold, smallest_count), mean_scores([])
        counts = {name: _together([of[name] for of in each], smallest_count) for name in each[0]}
        return counts, _by_case([of[next(iter(counts))] for of in each])
    if task.kind == "detection":
        return _found(task, answers, smallest_count)
    listed = list(answers)
    return functions.scores(listed, threshold, smallest_count), _ranked(task, task.answers[0], listed)


def _together(scores: list[Score], smallest_count: int) -> Score:
    merged = reduce(merge, scores)
    return withheld(merged, smallest_count) if isinstance(merged, DiceCounts) else merged


def _by_case(scores: list[Score]) -> CaseScores:
    """Of the counts of single cases. What is restored of all is a ratio of sums, and no mean of the cases' ratios."""
    restored = [score for score in scores if isinstance(score, RestoredCounts)]
    if not restored:
        return mean_scores([score.value for score in scores])
    error, blank = (
        np.array([getattr(of, key) for of in restored], np.float64) for key in ("error_micro", "blank_micro")
    )
    return CaseScores(blank - error, blank)


def _found(task: Task, answers: Iterable[CaseAnswer], smallest_count: int) -> tuple[Mapping[str, Score], FrocScores]:
    scans = [dict(scan_marks(task, case)) for case in answers]
    counts = {label: detection_counts([of[label] for of in scans], smallest_count) for label in task.labels}
    first = [of[task.labels[0]] for of in scans]
    pairs = [binned(of) for of in first]
    hits, false = (np.array([pair[side] for pair in pairs], np.float64).reshape(len(pairs), BINS) for side in (0, 1))
    return counts, FrocScores(hits, false, np.array([float(len(of.best)) for of in first]))


def _ranked(task: Task, answer: str, cases: list[CaseAnswer]) -> CaseScores:
    if task.kind == "classification":
        k = task.labels.index(answer)
        shown = np.array([case.truth[0][k] > 0 for case in cases], dtype=bool)
        chances = np.array([case.chances.mean(axis=0, dtype=np.float64)[k] for case in cases])
        return ranked_scores(chances, shown[:, None] & ~shown[None])
    survival = np.array([np.cumprod(1 - c.chances.astype(np.float64), axis=1).mean(axis=0).sum() for c in cases])
    time = np.array([case.truth[0][0] for case in cases], dtype=np.float64)
    event = np.array([case.truth[0][1] > 0 for case in cases], dtype=bool)
    later = (time[None] > time[:, None]) | ((time[None] == time[:, None]) & ~event[None])
    return ranked_scores(-survival, event[:, None] & later)
