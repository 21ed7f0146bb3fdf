"""The local loop: what a site does with the weights of a round."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from math import cos, pi
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fedclient.data.dataset import Batch
from fedclient.training.device import undetermined
from fedclient.training.drift import Correction, Pull, proximal
from fedclient.training.micro import Room, gradients, splits
from fedclient.training.moments import Moments
from shared_models.errors import OrderRefused
from shared_models.study import Train
from shared_models.tasks.functions import Loss


@dataclass(frozen=True, slots=True)
class Fitted:
    """How training went.

    Attributes:
        losses: mean loss of ten equal stretches of the steps (fewer when there were fewer); None where not finite.
    """

    steps: int
    losses: tuple[float | None, ...]


Step: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # images, masks -> loss; changes the network that it was made for
Watch: TypeAlias = Callable[[Tensor, Tensor], object]  # the same of a batch, before `net` learns from it
Course: TypeAlias = Callable[[int], float]  # number of a step, from 1 -> share of the learning rate


def fit(
    net: nn.Module,
    batches: Iterable[Batch],
    loss_of: Loss,
    train: Train,
    device: torch.device,
    *,
    pulls: Sequence[Pull] = (),
    correct: Correction | None = None,
    only: Sequence[str] | None = None,
    rates: Mapping[str, float] | None = None,
    moments: Moments | None = None,
    course: Course | None = None,
    beside: Sequence[Watch] = (),
) -> Fitted:
    """Trains `net` in place on every batch, once, with FedProx's pull where `train` has one.

    Args:
        beside: what else learns from each batch, before `net` does.
        pulls, correct, only, rates, moments, course: see `stepper`.
    """
    pulled = [proximal(net, train.proximal_mu), *pulls]
    step = stepper(net, loss_of, train, device, pulled, correct, only, rates, moments, course)
    losses: list[Tensor] = []
    for images, masks in on_device(device, batches):
        for other in beside:
            other(images, masks)
        losses.append(step(images, masks))  # read once at the end: a look at each would stop a GPU each time
    values = torch.stack(losses).float().cpu().numpy() if losses else np.empty(0, np.float32)
    parts = np.array_split(values, min(10, len(losses))) if losses else []
    means = [float(part.mean()) for part in parts]
    return Fitted(len(losses), tuple(m if np.isfinite(m) else None for m in means))


def stepper(
    net: nn.Module,
    loss_of: Loss,
    train: Train,
    device: torch.device,
    pulls: Sequence[Pull] = (),
    correct: Correction | None = None,
    only: Sequence[str] | None = None,
    rates: Mapping[str, float] | None = None,
    moments: Moments | None = None,
    course: Course | None = None,
) -> Step:
    """Makes a function that trains `net` by one batch and returns the loss, with an optimizer of its own.

    Args:
        pulls: what is added to the loss.
        correct: what is done to the gradients once they are clipped.
        only: names of the parameters that are trained; left out, all are.
        rates: share of the learning rate of each parameter, 0 for what is frozen; left out, all learn alike.
        moments: what the optimizer begins with, and leaves; left out, it begins anew.
        course: of the learning rate over the steps; left out, it stays.

    Raises:
        OrderRefused: `NOT_DETERMINISTIC`: the study wants equal bits, and a part of `net` cannot have them on a GPU.
    """
    if train.deterministic and device.type == "cuda" and (part := undetermined(net)) is not None:
        raise OrderRefused(
            "NOT_DETERMINISTIC",
            f"train.deterministic: {part} of this network has no deterministic gradient on a GPU. Leave it out of the "
            f'study, or set device = "cpu" in site.toml.',
        )
    net.train()
    freeze(net, rates)
    named = {name: p for name, p in net.named_parameters() if only is None or name in only}
    parameters = [p for p in named.values() if p.requires_grad]
    optimizer = optimizer_of(named, train, rates, moments)
    most, numbers = [float(group["lr"]) for group in optimizer.param_groups], count(1)
    room = Room(splits=splits(net))

    def attempt(images: Tensor, masks: Tensor, parts: int) -> Tensor:
        forget()
        return gradients(net, images, masks, loss_of, pulls=pulls, parts=parts, cast=lambda: autocast(train, device))

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)

    def slopes(images: Tensor, masks: Tensor) -> Tensor:
        return room.within(len(images), lambda parts: attempt(images, masks, parts), forget)

    def step(images: Tensor, masks: Tensor) -> Tensor:
        loss = slopes(images, masks)
        if train.sharpness_rho:
            with _at_the_worst_near(parameters, train.sharpness_rho):
                slopes(images, masks)
        if train.clip_gradient is not None:
            nn.utils.clip_grad_norm_(parameters, train.clip_gradient)
        if correct is not None:
            correct(net)
        if course is not None:
            share = course(next(numbers))
            for group, rate in zip(optimizer.param_groups, most, strict=True):
                group["lr"] = rate * share
        optimizer.step()
        return loss

    return step


@contextmanager
def _at_the_worst_near(parameters: Sequence[nn.Parameter], rho: float) -> Iterator[None]:
    """Moves the weights by `rho` along their gradient, and back (Foret et al. 2021, equation 2)."""
    moved = [p for p in parameters if p.grad is not None]
    before = [p.detach().clone() for p in moved]
    norm = torch.stack([p.grad.norm() for p in moved if p.grad is not None]).norm()
    with torch.no_grad():
        for p in moved:
            assert p.grad is not None
            p.add_(p.grad * (rho / norm.clamp(min=1e-12)))
    yield
    with torch.no_grad():
        for p, was in zip(moved, before, strict=True):
            p.copy_(was)


def slanted(steps: int) -> Course:
    """Up over the first tenth of so many steps, then down to a 32nd (Howard & Ruder 2018, section 3.2).

    A model that is good already is neither thrown off by an optimizer that knows nothing yet, nor left where the noise
    of the last step has put it.
    """
    top = max(1, steps // 10)

    def share(step: int) -> float:
        height = step / top if step <= top else (steps - step) / (steps - top)
        return (1 + 31 * height) / 32

    return share


def scheduled(train: Train, round_number: int, rounds: int) -> Train:
    """`train` with the learning rate of a round, from 1 to `rounds`."""
    if train.schedule == "constant" or rounds == 1:
        return train
    done = (round_number - 1) / (rounds - 1)
    return replace(train, learning_rate=train.learning_rate * (0.05 + 0.95 * (1 + cos(pi * done)) / 2))


def autocast(train: Train, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the study allows and the GPU computes in it; float32 elsewhere.

    NVIDIA's do since Ampere; PyTorch's own question is answered for the first GPU, and calls emulation support.
    """
    if train.precision == "float32" or device.type != "cuda":
        return nullcontext()
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def freeze(net: nn.Module, rates: Mapping[str, float] | None) -> None:
    """Takes the gradient from each parameter whose share of the learning rate is 0, and gives it to the others."""
    for name, share in rates.items() if rates is not None else ():
        net.get_parameter(name).requires_grad_(share > 0)


def optimizer_of(
    named: Mapping[str, nn.Parameter],
    train: Train,
    rates: Mapping[str, float] | None = None,
    moments: Moments | None = None,
) -> torch.optim.Optimizer:
    """A new optimizer, as each round has one, of what of `named` wants a gradient.

    Args:
        rates: share of the learning rate of each parameter; the frozen ones move not at all.
        moments: those of the round before, which it goes on with.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            groups.setdefault(1.0 if rates is None else rates[name], []).append(parameter)
    found = [{"params": of, "lr": train.learning_rate * share} for share, of in groups.items()]
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(found, momentum=train.momentum, weight_decay=train.weight_decay)
    else:
        kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(found, weight_decay=train.weight_decay)
    if moments is not None:
        moments.take_up(optimizer, named)
    return optimizer


def on_device(device: torch.device, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as tensors on the device: images float32[B, C, *size] (they travel as float16), and the truth of each;
    what is still to be done to them is done there."""
    for batch in batches:
        images, truth = (_sent(torch.from_numpy(each), device) for each in (batch.images, batch.masks))
        yield (images.float(), truth) if batch.change is None else batch.change(images, truth)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """A copy to a GPU from pinned memory goes on beside what the GPU computes."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
