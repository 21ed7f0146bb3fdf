"""The device that trains: what may be taken of it, and whether it works."""

import gc
import os
import re
import resource
from dataclasses import dataclass

import torch
from torch import nn

from fedclient.device_errors import first_words
from fedclient.limits import Limits
from shared_models.errors import StateInvalid

GIB = 2**30
# what has no deterministic gradient on a GPU; the pools among them that go down to one voxel are means, which have
UNDETERMINED = (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.FractionalMaxPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as PyTorch sees it."""

    name: str
    free_bytes: int
    total_bytes: int


def free_memory() -> None:
    """Gives back what PyTorch keeps of a GPU's memory for later, where this process has used one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()  # 0.3 s; an optimizer's first step in a process leaves it and its tensors in a cycle
        torch.cuda.empty_cache()


def limit(limits: Limits, device: torch.device) -> None:
    """Bounds what this process takes from now on: beyond it, its allocations fail.

    RLIMIT_DATA counts private memory that may be written to (Linux 4.7): heap, tensors, and not the images mapped from
    the cache. Without `memory_gib` the bound of whoever started the process holds (systemd's, a container's).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard
    if limits.memory_gib is not None:
        wanted = int(limits.memory_gib * GIB)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(limits.gpu_memory_share, device)


def gpus() -> int:
    """How many GPUs PyTorch can compute on: none where the driver is too old or may not be used, though one is seen.

    They are numbered as NVIDIA's own tool numbers them, by their place on the bus, not by their speed.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # before CUDA is asked for the first time
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_named(name: str) -> torch.device | None:
    """`auto` is the first GPU, or the CPU where there is none; `cpu`, `cuda`, `cuda:N`. None where that is not there.

    A GPU has its number, without which PyTorch bounds no memory.
    """
    there = gpus()
    if name == "auto":
        name = "cuda" if there else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None or int(found[1] or 0) >= there:
        return None
    return torch.device("cuda", int(found[1] or 0))


def undetermined(net: nn.Module) -> str | None:
    """The first module that has no deterministic gradient on a GPU (PyTorch's `use_deterministic_algorithms`)."""
    for module in net.modules():
        if isinstance(module, UNDETERMINED) or (isinstance(module, ADAPTIVE) and not _is_mean(module)):
            return type(module).__name__
    return None


def _is_mean(module: nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d) -> bool:
    size = module.output_size
    return set(size if isinstance(size, tuple) else (size,)) == {1}


def build() -> str:
    """Which PyTorch this is: `2.13.0 for CUDA 12.8`, `2.13.0 without CUDA`."""
    made_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{torch.__version__.partition('+')[0]} {made_for}"


def try_gpu(number: int) -> Gpu:
    """Computes something small on a GPU, and tells what it is.

    Raises:
        StateInvalid: it cannot be computed with.
    """
    try:
        device = torch.device("cuda", number)
        if float(torch.ones(8, device=device).sum()) != 8.0:
            raise RuntimeError("it adds wrongly")
        free, total = torch.cuda.mem_get_info(device)
        return Gpu(torch.cuda.get_device_name(device), free, total)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        raise StateInvalid(
            f"cuda:{number}: PyTorch {build()} cannot compute on it ({first_words(error)}). Install the driver "
            'that this PyTorch wants, end what fills the GPU, or set device = "cpu" under [compute] in site.toml.'
        ) from error
