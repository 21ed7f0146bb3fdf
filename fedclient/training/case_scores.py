"""Scores of each case of a site under one model, for comparisons that stay at the site."""

from collections.abc import Iterable, Mapping

import numpy as np

from fedclient.worth import CaseScores, mean_scores, ranked_scores
from shared_models.scores import Score, total
from shared_models.study import Task
from shared_models.tasks.functions import CaseAnswer, TaskFunctions


def scored(
    task: Task, functions: TaskFunctions, answers: Iterable[CaseAnswer], threshold: float, smallest_count: int
) -> tuple[Mapping[str, Score], CaseScores]:
    """Counts by answer as they may leave; and case by case, for the first answer, what a resample is scored by.

    Dice of each case, or which pairs of cases the model orders rightly (AUROC, C-index). One image is in memory at a
    time where answers are as large as images.
    """
    first = task.answers[0]
    if task.kind == "segmentation":
        each = [functions.scores(iter([case]), threshold, smallest_count) for case in answers]
        if not each:
            return functions.scores(iter(()), threshold, smallest_count), mean_scores([])
        counts = {name: total(of[name] for of in each) for name in each[0]}
        return {name: of for name, of in counts.items() if of is not None}, mean_scores([s[first].value for s in each])
    listed = list(answers)
    return functions.scores(listed, threshold, smallest_count), _ranked(task, first, listed)


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
