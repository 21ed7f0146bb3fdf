"""What a site's cases are like and what a network answers on them: the counts by which a release's users tell drift."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclient.data.cases import Case, read_case
from fedclient.data.manifest import Progress, usable
from fedclient.training.trainer import autocast
from fedclient.training.windows import logits
from shared_models.drift import Profile, answered, cells_of, profile_of
from shared_models.preprocess import preprocess, restore
from shared_models.study import Study
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.segmentation import predicted_of


def site_profile(
    net: nn.Module, cases: Sequence[Case], study: Study, device: torch.device, progress: Progress | None
) -> Profile:
    """The profile of some cases, each read anew from its files, as a release does.

    Raises:
        ImageUnreadable: files that cannot be used, by their rows.
    """
    net.eval()
    with torch.inference_mode(), autocast(study.train, device):
        return profile_of(study, usable(cases, lambda case: _cells(net, case, study, device), progress))


def _cells(net: nn.Module, case: Case, study: Study, device: torch.device) -> dict[str, int]:
    volume = read_case(case, study.channels)
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
    chances = functions_of(study.task).chances(logits(net, examples.images, study, device)).numpy()
    marked: NDArray[np.bool_] | None = None
    if study.task.kind == "segmentation":
        chances = restore(chances, examples.geometry)
        marked = predicted_of(study.task, chances[None], study.evaluate.threshold)[0]
    told = answered(study.task, chances, marked)
    return cells_of(study, volume.voxels, volume.spacing_mm, examples.images, told, marked)
