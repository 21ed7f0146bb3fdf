"""Dice of a network at a site: per case, over the whole case, told as counts."""

from collections.abc import Mapping

import torch
from torch import nn

from fedclient.data.dataset import DataSet
from fedclient.training.trainer import autocast
from fedclient.training.windows import logits
from shared_models.metrics import IGNORE, DiceCounts, counts, dice
from shared_models.study import Study


def case_scores(net: nn.Module, cases: DataSet, study: Study, device: torch.device) -> dict[str, list[float | None]]:
    """Label -> Dice of each case, in the order of the data set; all examples of a case count as one volume.

    On the grid of the study's plan, over the whole image where patches are trained on; ignored voxels left out.
    """
    net.eval()
    scores: dict[str, list[float | None]] = {label: [] for label in study.task.labels}
    with torch.inference_mode(), autocast(study.train, device):
        for _, images, masks, _ in cases.by_case():
            predicted = torch.sigmoid(logits(net, images, study, device)).numpy() > study.evaluate.threshold
            for k, label in enumerate(study.task.labels):
                scores[label].append(dice(predicted[:, k], masks == k + 1, masks != IGNORE))
    return scores


def evaluate(
    net: nn.Module, cases: DataSet, study: Study, device: torch.device, smallest_count: int
) -> Mapping[str, DiceCounts]:
    return {label: counts(s, smallest_count) for label, s in case_scores(net, cases, study, device).items()}
