"""The network of a release in PyTorch, for a GPU."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedclient.device_errors import LESS, predicting
from fedclient.predict.model import Through
from fedclient.training.device import device_named, gpus
from fedclient.training.micro import Room
from fedclient.training.windows import through
from shared_models.errors import WeightsInvalid
from shared_models.runtimes import network_from
from shared_models.study import Study


def network_on(study: Study, weights: bytes, device: str, threads: int) -> tuple[Through, str]:
    """The network in float32 (without TF32, so that its masks are those of a CPU), and its engine in words.

    Args:
        weights: model.safetensors; the bytes that were compared, so that a file that changes meanwhile changes nothing.

    Raises:
        WeightsInvalid: other weights than the study's, or a device that PyTorch does not see.
        OrderRefused, DeviceFailed: as `predicting` has it; so does the network.
    """
    where = device_named(device)
    if where is None:
        raise WeightsInvalid(f"{device}: PyTorch sees {gpus()} GPUs here. Use --device cpu.")
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    with predicting():
        net = network_from(study, weights).to(where)
    answered = through(net, where, Room(remedy=LESS))

    def guarded(images: NDArray[Any]) -> NDArray[np.float32]:
        """In parts where memory runs out; what a GPU's errors mean is told."""
        with predicting(), torch.inference_mode():
            return answered(images)

    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {threads} threads"
    return guarded, f"PyTorch {torch.__version__}, {name}"
