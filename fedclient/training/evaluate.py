"""What a network answers for each case at a site, and how good that is, told as counts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from fedclient.data.dataset import CaseExamples, DataSet
from fedclient.data.lesions import in_mm
from fedclient.training.trainer import autocast
from fedclient.training.windows import logits
from shared_models.errors import OrderRefused
from shared_models.preprocess import restore
from shared_models.scores import Score
from shared_models.seeds import rng
from shared_models.study import Study
from shared_models.tasks.functions import CaseAnswer, TaskFunctions
from shared_models.tasks.reconstruction import hidden


def answers(
    net: nn.Module,
    cases: DataSet,
    study: Study,
    task: TaskFunctions,
    device: torch.device,
    go_on: Callable[[], None] = lambda: None,
) -> Iterator[CaseAnswer]:
    """Probabilities beside the truth, case by case, in the order of the data set.

    On the grid of the study's plan, over the whole image where patches are trained on; where surfaces are measured, on
    the image's own; lesions in its millimetres.

    Args:
        go_on: called before each case; raises where the work may not go on.

    Raises:
        OrderRefused: `ANSWERS_NONFINITE`: the model answers a case with NaN or infinity, which no score counts.
    """
    net.eval()
    with torch.inference_mode(), autocast(study.train, device):
        for case in cases.by_case():
            go_on()
            if study.task.kind == "reconstruction":  # the same parts of a case are hidden whenever it is scored
                seen, truth = hidden(case.images, study.task, rng("hidden", study.name, case.key))
                yield CaseAnswer(_chances(net, seen, case.key, study, task, device), truth)
                continue
            yield _answer(case, _chances(net, case.images, case.key, study, task, device), task)


def _chances(
    net: nn.Module, images: NDArray[Any], key: str, study: Study, task: TaskFunctions, device: torch.device
) -> NDArray[Any]:
    found = logits(net, images, study, device)
    if not all(bound.isfinite() for bound in found.aminmax()):
        raise OrderRefused(
            "ANSWERS_NONFINITE",
            f"case {key}: the model's answer is not finite, as its training has diverged. Lower train.learning_rate in "
            f"the study.",
        )
    chances: NDArray[Any] = task.chances(found).numpy()
    return chances


def _answer(case: CaseExamples, chances: NDArray[Any], task: TaskFunctions) -> CaseAnswer:
    if task.located is not None and case.native is not None:
        spacing = case.geometry.spacing_mm
        return CaseAnswer(task.located(chances, case.geometry), in_mm(case.native, spacing), spacing)
    if case.native is None:
        return CaseAnswer(chances, case.masks)
    native, spacing = restore(chances, case.geometry), case.geometry.spacing_mm
    if case.native.shape[2] == 1:  # a single plane has lines for edges, not two faces
        return CaseAnswer(native[None, ..., 0], case.native[None, ..., 0], spacing[:2])
    return CaseAnswer(native[None], case.native[None], spacing)


def evaluate(
    net: nn.Module,
    cases: DataSet,
    study: Study,
    task: TaskFunctions,
    device: torch.device,
    smallest_count: int,
    go_on: Callable[[], None] = lambda: None,
) -> Mapping[str, Score]:
    """Counts by label (or region) of the task; `go_on` as of `answers`."""
    return task.scores(answers(net, cases, study, task, device, go_on), study.evaluate.threshold, smallest_count)
