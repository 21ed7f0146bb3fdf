"""A network moved over whole images: overlapping windows, each counting most where it sees most around."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedclient.training.micro import Room
from shared_models.study import Study

OVERLAP = 0.5  # share of a window's edge, where the study says nothing
PLANES = 32  # in one pass through the network; volumes go by the batches that training takes
SIGMA = 1 / 8  # of a window's edge (Isensee et al. 2021, online methods, inference)


def logits(net: nn.Module, images: NDArray[Any], study: Study, device: torch.device) -> Tensor:
    """float32[N, L, *whole] on the CPU, from examples [N, C, *whole] of one case.

    Where the study trains on patches, windows of their size are moved over them and averaged with Gaussian weights
    (Isensee et al. 2021).
    """
    size = study.preprocess.size
    together, room = PLANES if len(size) == 2 else study.train.batch_size, Room()
    if study.preprocess.fit != "patches" or images.shape[2:] == size:
        parts = np.array_split(images, max(1, math.ceil(len(images) / together)))
        return torch.cat([_through(net, part, device, room).cpu() for part in parts])
    overlap = OVERLAP if study.evaluate.overlap is None else study.evaluate.overlap
    corners = list(product(*map(begins, images.shape[2:], size, [overlap] * len(size))))
    # planes of a case in turn, so that what is added up stays small
    step = max(1, together // len(corners))
    pieces = [images[n : n + step] for n in range(0, len(images), step)]
    return torch.cat([_moved(net, piece, corners, study, device, room) for piece in pieces])


def begins(whole: int, edge: int, overlap: float) -> list[int]:
    """Where windows begin along an axis: evenly, the first at its beginning and the last at its end."""
    count = math.ceil((whole - edge) / max(1.0, edge * (1 - overlap))) + 1
    return [round(at) for at in np.linspace(0, whole - edge, count)]


@lru_cache(maxsize=4)
def weights(size: tuple[int, ...]) -> Tensor:
    """float32[*size]: a Gaussian around the middle, not less than a thousandth in the corners."""
    shape = torch.ones(())
    for edge in size:
        away = (torch.arange(edge, dtype=torch.float32) - (edge - 1) / 2) / (edge * SIGMA)
        shape = shape[..., None] * torch.exp(-(away**2) / 2)
    return shape.clamp(min=1e-3)


def _moved(
    net: nn.Module,
    images: NDArray[Any],
    corners: Sequence[tuple[int, ...]],
    study: Study,
    device: torch.device,
    room: Room,
) -> Tensor:
    size = study.preprocess.size
    share = weights(size).to(device)
    total = seen = torch.zeros(())
    together = max(1, (PLANES if len(size) == 2 else study.train.batch_size) // len(images))
    for begin in range(0, len(corners), together):
        windows = [
            tuple(slice(at, at + edge) for at, edge in zip(corner, size, strict=True))
            for corner in corners[begin : begin + together]
        ]
        found = _through(net, np.concatenate([images[(slice(None), slice(None), *w)] for w in windows]), device, room)
        if begin == 0:
            total = torch.zeros((len(images), found.shape[1], *images.shape[2:]), device=device)
            seen = torch.zeros(images.shape[2:], device=device)
        for window, part in zip(windows, torch.split(found, len(images)), strict=True):
            total[(slice(None), slice(None), *window)] += part * share
            seen[window] += share
    return (total / seen).cpu()


def _through(net: nn.Module, images: NDArray[Any], device: torch.device, room: Room) -> Tensor:
    """Answers float32; in smaller parts where memory runs out."""

    def attempt(parts: int) -> Tensor:
        pieces = torch.from_numpy(np.ascontiguousarray(images)).tensor_split(parts)
        return torch.cat([net(piece.to(device).float()).float() for piece in pieces])

    return room.within(len(images), attempt, lambda: None)
