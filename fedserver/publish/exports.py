"""A trained network as files for other runtimes: ONNX, TorchScript, and the state dict that MONAI wants."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.model_table import PIXELWISE
from shared_models.parity import TOLERANCE
from shared_models.runtimes import OUTPUT, input_name, onnx_runner, torch_runner
from shared_models.study import Study

OPSET = 17  # group norm as plain operators, which every runtime of the last years reads


def example_of(study: Study, count: int = 1, grown: bool = False) -> Tensor:
    """What a network of the study may be shown: float32[count, C, *size]; larger along each axis if `grown`."""
    drawn = torch.Generator().manual_seed(0)
    if study.table_only:
        return torch.randn((count, len(study.task.covariates)), generator=drawn)
    size = study.preprocess.size
    if grown:
        size = tuple(n + step for n, step in zip(size, study.model.divisors, strict=True))
    return torch.randn((count, max(1, len(study.channels)), *size), generator=drawn)


def to_onnx(net: nn.Module, study: Study, to: Path) -> bool:
    """Writes `net` as ONNX; the batch is free, and where it is true that is returned the edges of the image are too.

    By the exporter that traces: the one by dynamo takes 20 to 110 s for the same graph.
    """
    free = not study.table_only and study.model.name in PIXELWISE
    _onnx(net, study, to, free)
    if not free:
        return False
    larger = example_of(study, 2, grown=True).numpy()
    try:
        held = float(np.abs(onnx_runner(to)(larger) - torch_runner(net)(larger)).max()) <= TOLERANCE
    except Exception:  # onnxruntime's exceptions have no common base; a graph that is fixed raises any of them
        held = False
    if not held:
        _onnx(net, study, to, free=False)
    return held


def _onnx(net: nn.Module, study: Study, to: Path, free: bool) -> None:
    name, example = input_name(study), example_of(study, 2)  # of one example, a batch of one may be taken for granted
    axes: dict[int, str] = {0: "batch"}
    if free:
        axes |= {axis: f"edge_{axis - 2}" for axis in range(2, example.ndim)}
    answers = {0: "batch"} | ({k: v for k, v in axes.items() if k} if free else {})
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of tracing: sizes that become constants, which `to_onnx` then looks for
        torch.onnx.export(
            net, (example,), str(to), dynamo=False, opset_version=OPSET, input_names=[name], output_names=[OUTPUT],
            dynamic_axes={name: axes, OUTPUT: answers},
        )  # fmt: skip


def to_torchscript(net: nn.Module, study: Study, to: Path) -> None:
    """Writes `net` as TorchScript."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, example_of(study, 2), check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(to))


def to_state_dict(net: nn.Module, to: Path) -> None:
    """Writes the state dict by torch.save, which MONAI's format demands; nothing here reads it but as tensors."""
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}, to)
