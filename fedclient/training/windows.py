"""A network of PyTorch moved over whole images, by windows where the study trains on patches."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedclient.training.micro import Room
from fedclient.windows import Through, moved
from shared_models.study import Study


def logits(net: nn.Module, images: NDArray[Any], study: Study, device: torch.device) -> Tensor:
    """float32[N, L, *whole] on the CPU, from examples [N, C, *whole] of one case.

    Windows are added up in the CPU's memory, so that a whole volume's answers need no room on a GPU.
    """
    return torch.from_numpy(moved(through(net, device, Room()), images, study))


def through(net: nn.Module, device: torch.device, room: Room) -> Through:
    """Examples through a network on a device, in smaller parts where memory runs out."""

    def answered(images: NDArray[Any]) -> NDArray[np.float32]:
        def attempt(parts: int) -> Tensor:
            pieces = torch.from_numpy(np.ascontiguousarray(images)).tensor_split(parts)
            return torch.cat([net(piece.to(device).float()).float() for piece in pieces])

        return room.within(len(images), attempt, lambda: None).cpu().numpy()

    return answered
