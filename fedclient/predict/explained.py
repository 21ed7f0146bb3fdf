"""Why a release answers so on an image: maps of its network in PyTorch over the plane that has most of an answer.

CASE/explained-1-grad-cam.png    numbered as the labels of result.json are; no name of a patient in it
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedclient.device_errors import predicting
from fedclient.predict.blocks import opened
from fedclient.predict.case import Prediction
from fedclient.predict.model import Model, Released
from fedclient.predict.outputs import Explanation
from fedclient.training.explaining import example_of, picture_of
from fedclient.training.maps import Method, channel_of, explain
from fedclient.training.uncertainty import augmented
from shared_models.errors import ExplanationFailed, ImageUnreadable
from shared_models.preprocess import preprocess
from shared_models.runtimes import network_from
from shared_models.seeds import rng
from shared_models.tasks.chosen import functions_of

MOST_ANSWERS = 3  # of a case that are explained, the likeliest first


@dataclass(frozen=True, slots=True)
class Explainer:
    """A release's network in PyTorch, opened once for all cases.

    Attributes:
        methods: a picture each.
    """

    model: Model
    net: nn.Module
    device: torch.device
    methods: Sequence[Method]

    @property
    def stamp(self) -> str:
        return f"{self.model.name} {self.model.version}, sha256 {self.model.digest[:16]}"

    def __call__(self, prediction: Prediction) -> list[Explanation]:
        """A map by each method of each answer that is called, `MOST_ANSWERS` at most, or of the likeliest class where
        none is; where a method draws none it is said why.

        Raises:
            ImageUnreadable: the image, which is read again, has gone or changed.
            OrderRefused, DeviceFailed: as `predicting` has it.
        """
        wanted = _wanted(prediction)
        seen = dict(_seen(prediction, {prediction.places[n] for n in wanted}))
        if missing := {prediction.places[n] for n in wanted} - seen.keys():
            raise ImageUnreadable(f"{len(missing)} planes of it are not there any more.", "FILE_MISSING")
        with predicting():
            return [self._one(prediction, n, seen, method) for n in wanted for method in self.methods]

    def _one(
        self, prediction: Prediction, n: int, seen: Mapping[int, tuple[NDArray[np.float32], int]], method: Method
    ) -> Explanation:
        study, answer, place = self.model.study, prediction.answers[n].name, prediction.places[n]
        images, left_right_axis = seen[place]
        image, _ = example_of(self.net, images, study, answer, None, self.device)
        channel = channel_of(study, answer)
        told = Explanation(n + 1, answer, method, place if len(study.preprocess.size) == 2 else None)
        try:
            found = explain(self.net, image, study, answer, method)
        except ExplanationFailed as error:
            return replace(told, why=str(error))
        answering = _Calibrated(self.net, self.model.temperatures)
        draw = rng(study.seed, study.name, "explain", answer)
        sure = augmented(answering, image, study, draw, left_right_axis)
        if study.task.kind == "classification":
            with torch.no_grad():
                logits = answering(image[None].to(self.device).float())
            found = replace(found, chance=float(functions_of(study.task).chances(logits)[0, channel]))
        picture = picture_of(found, image, sure, study, self.stamp, left_right_axis)
        deviation = float(sure.deviation[channel].mean())
        return replace(told, chance=found.chance, deviation=deviation, layer=found.layer, picture=picture)


class _Calibrated(nn.Module):
    """A network whose logits are divided by the temperatures of its release."""

    def __init__(self, net: nn.Module, temperatures: NDArray[np.float32] | None) -> None:
        super().__init__()
        self.net = net
        self.by = None if temperatures is None else torch.from_numpy(temperatures).to(next(net.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits if self.by is None else logits / self.by.reshape(-1, *[1] * (logits.ndim - 2))


def explainer_of(release: Released, model: Model, device: str, methods: Sequence[Method]) -> Explainer:
    """Opens the network of a release, of the bytes that were compared, for explanations.

    Raises:
        ExplanationFailed: a release that foretells, or sees a table: maps are of what an image shows.
    """
    if model.study.table_only:
        raise ExplanationFailed(f"{model.name}: its network sees a table and no image, so there is nothing to draw on.")
    channel_of(model.study, model.study.task.answers[0])
    with predicting():
        net = network_from(model.study, release.content(release.weights.name)).to(torch.device(device))
    return Explainer(model, net, torch.device(device), tuple(methods))


def _wanted(prediction: Prediction) -> list[int]:
    """Numbers of the answers that are explained."""
    order = sorted(range(len(prediction.answers)), key=lambda n: -prediction.answers[n].chance)
    called = [n for n in order if prediction.answers[n].called]
    if not called and prediction.marks is None:
        return order[:1]
    return called[:MOST_ANSWERS]


def _seen(prediction: Prediction, places: Collection[int]) -> Iterator[tuple[int, tuple[NDArray[np.float32], int]]]:
    """Plane -> what the network sees of it, float32[1, C, *size], and along which axis left and right lie; of a network
    that sees volumes the whole."""
    assert prediction.source is not None, "explanations are of files"
    study, begin = prediction.model.study, 0
    _, runs = opened(prediction.source, study)
    for volume in runs:
        end = begin + volume.voxels.shape[3]
        here = [place for place in places if begin <= place < end]
        if here:
            images = np.asarray(preprocess(volume.voxels, volume.spacing_mm, study.preprocess).images, np.float32)
            flat = len(study.preprocess.size) == 2
            for place in here:
                yield place, (images[place - begin][None] if flat else images, volume.left_right_axis)
        begin = end
