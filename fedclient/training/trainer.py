"""The local loop: what a site does with the weights of a round."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.data.dataset import Batch
from fedclient.training.drift import proximal
from shared_models.study import Train
from shared_models.tasks.segmentation import Loss


@dataclass(frozen=True, slots=True)
class Fitted:
    """How training went.

    Attributes:
        losses: mean loss of ten equal stretches of the steps (fewer when there were fewer); None where not finite.
    """

    steps: int
    losses: tuple[float | None, ...]


def fit(net: nn.Module, batches: Iterable[Batch], loss_of: Loss, train: Train, device: torch.device) -> Fitted:
    """Trains `net` in place on every batch, once."""
    net.train()
    optimizer = _optimizer(net, train)
    pull = proximal(net, train.proximal_mu)
    scaler = torch.amp.GradScaler(device.type, enabled=_half(train, device) is torch.float16)
    losses: list[Tensor] = []
    for images, masks in _on(device, batches):
        with autocast(train, device):
            loss = loss_of(net(images).float(), masks) + pull(net)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if train.clip_gradient is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), train.clip_gradient)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())  # read once at the end: a look at each would stop a GPU each time
    values = torch.stack(losses).float().cpu().numpy() if losses else np.empty(0, np.float32)
    parts = np.array_split(values, min(10, len(losses))) if losses else []
    means = [float(part.mean()) for part in parts]
    return Fitted(len(losses), tuple(m if np.isfinite(m) else None for m in means))


def scheduled(train: Train, round_number: int, rounds: int) -> Train:
    """`train` with the learning rate of a round, from 1 to `rounds`."""
    if train.schedule == "constant" or rounds == 1:
        return train
    done = (round_number - 1) / (rounds - 1)
    return replace(train, learning_rate=train.learning_rate * (0.05 + 0.95 * (1 + cos(pi * done)) / 2))


def autocast(train: Train, device: torch.device) -> AbstractContextManager[Any]:
    """Half precision where the study allows and the device has it; float32 elsewhere."""
    half = _half(train, device)
    return nullcontext() if half is None else torch.autocast(device.type, half)


def _half(train: Train, device: torch.device) -> torch.dtype | None:
    if train.precision == "float32" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _optimizer(net: nn.Module, train: Train) -> torch.optim.Optimizer:
    """A new optimizer each round: its moments belong to weights that the mean has replaced."""
    rate, decay = train.learning_rate, train.weight_decay
    if train.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=decay)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), rate, weight_decay=decay)
    return torch.optim.Adam(net.parameters(), rate, weight_decay=decay)


def _on(device: torch.device, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as tensors on the device: images float32[B, C, *size] (they travel as float16), masks uint8[B, *size]."""
    for batch in batches:
        images, masks = torch.from_numpy(batch.images), torch.from_numpy(batch.masks)
        yield images.to(device, non_blocking=True).float(), masks.to(device, non_blocking=True)
