"""A released network in each form that it has: arrays in, logits out."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared_models import nets
from shared_models.errors import ReleaseInvalid, WeightsInvalid
from shared_models.onnx_session import cpu_session
from shared_models.study import Study
from shared_models.weights import Arrays, load, loaded

Runner: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # [N, C, *spatial] -> [N, L, ...]
INPUT, OUTPUT = "image", "logits"  # names in the ONNX graph
TABLE = "table"  # name of the input that is no image


def input_name(study: Study) -> str:
    return TABLE if study.table_only else INPUT


def network_of(study: Study, weights: Path) -> nn.Module:
    """The study's network with the tensors of a safetensors file, ready to predict.

    Raises:
        WeightsInvalid: tensors of another network, or not finite.
    """
    return _filled(study, load(weights))


def network_from(study: Study, weights: bytes) -> nn.Module:
    """As `network_of`, from the bytes of such a file."""
    return _filled(study, loaded(weights, "model.safetensors of the release"))


def _filled(study: Study, arrays: Arrays) -> nn.Module:
    net = nets.network(study)
    nets.load_arrays(net, arrays)
    return net.eval()


def torch_runner(net: nn.Module) -> Runner:
    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            answer: NDArray[np.float32] = net(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()
        return answer

    return run


def onnx_runner(network: Path | bytes, threads: int = 0) -> Runner:
    """By onnxruntime on the CPU, a file or its bytes; 0 threads are as many as there are cores."""
    try:
        session = cpu_session(str(network) if isinstance(network, Path) else network, threads)
    except Exception as error:  # its exceptions have no common base
        where = network if isinstance(network, Path) else "model.onnx"
        raise ReleaseInvalid(
            f"{where}: onnxruntime cannot read it ({type(error).__name__}). Make the release again.", "model.onnx"
        ) from error
    name = session.get_inputs()[0].name

    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run([OUTPUT], {name: inputs})[0], np.float32)

    return run


def torchscript_runner(network: Path | bytes) -> Runner:
    """TorchScript, a file or its bytes."""
    content = io.BytesIO(network.read_bytes() if isinstance(network, Path) else network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is what MONAI Deploy and Label load
        return torch_runner(torch.jit.load(content, map_location="cpu").eval())  # type: ignore[no-untyped-call]


def state_dict_runner(study: Study, network: Path | bytes) -> Runner:
    """What torch.save wrote, a file or its bytes, of which tensors alone are read."""
    net = nets.network(study)
    content = io.BytesIO(network.read_bytes() if isinstance(network, Path) else network)
    state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsInvalid("state dict: holds other tensors than the study's network. Make it again.") from error
    return torch_runner(net.eval())
