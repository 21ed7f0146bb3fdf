"""Prognosis in discrete time: the hazard of each interval, given that the event has not come before.

The truth of an example is float32[2]: days followed, and 1 where the event came then. A loss that is a sum over
patients adds up over sites, as Cox's partial likelihood does not (Gensheimer & Narasimhan 2019, equation 2).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared_models.scores import Score
from shared_models.study import Task
from shared_models.survival_counts import survival_counts
from shared_models.tasks.functions import CaseAnswer, TaskFunctions


def functions_of(task: Task) -> TaskFunctions:
    ends = torch.tensor(task.intervals_days)
    return TaskFunctions(loss=partial(hazard, ends=ends), chances=torch.sigmoid, scores=partial(scores, task))


def hazard(logits: Tensor, truth: Tensor, ends: Tensor) -> Tensor:
    """Minus the log-likelihood of discrete time, mean over patients.

    An interval counts for who was followed to its end or had the event in it; who is censored within one says nothing
    of it, and an event after the last interval is a patient who survived them all.
    """
    time, event = truth[:, :1], truth[:, 1:] > 0
    ends = ends.to(time)
    begins = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    came = event & (time > begins) & (time <= ends)
    survived = (time >= ends) & ~came
    known = (came | survived).to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, came.to(logits), reduction="none")
    return (losses * known).sum(dim=1).mean()


def scores(task: Task, cases: Iterable[CaseAnswer], threshold: float, smallest_count: int) -> Mapping[str, Score]:
    """Pairs, squares and curves of all cases; a case of many planes has the mean of their survival."""
    listed = list(cases)
    ends = np.array(task.intervals_days)
    survival = np.array([np.cumprod(1 - case.chances.astype(np.float64), axis=1).mean(axis=0) for case in listed])
    truth = np.array([case.truth[0] for case in listed], dtype=np.float64).reshape(len(listed), 2)
    counted = survival_counts(
        survival.reshape(len(listed), len(ends)), truth[:, 0], truth[:, 1] > 0, ends, smallest_count
    )
    return {task.labels[0]: counted}
