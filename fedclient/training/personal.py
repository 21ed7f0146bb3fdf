"""What makes a site's model its own: layers that stay, or a second model beside the federation's."""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedclient.training.drift import proximal
from fedclient.training.micro import Room, gradients, splits
from fedclient.training.moments import Moments
from fedclient.training.trainer import Step, autocast, freeze, optimizer_of, stepper
from shared_models import nets
from shared_models.study import Study, Train
from shared_models.tasks.functions import Loss
from shared_models.weights import Array, Arrays

LOCAL, OWN, PREVIOUS, CONTROL_OF_SITE, MIXTURE = "local/", "own/", "previous/", "control/", "mixture"
MOMENTS, MOMENTS_OF_OWN, MOMENTS_OF_HEAD = "moments/", "own-moments/", "head-moments/"


def part(memory: Arrays, prefix: str) -> dict[str, Array]:
    """What stands in a site's memory under `prefix`, by the names of the model's tensors."""
    return {name.removeprefix(prefix): a for name, a in memory.items() if name.startswith(prefix)}


def filed(arrays: Arrays, prefix: str) -> dict[str, Array]:
    return {prefix + name: a for name, a in arrays.items()}


def staying(net: nn.Module, study: Study) -> frozenset[str]:
    """Names of the tensors that stay at the site."""
    kinds: dict[str, Callable[[nn.Module], frozenset[str]]] = {"norm": nets.norm_names, "head": nets.head_names}
    return frozenset[str]().union(*(kinds[kind](net) for kind in study.personal.keep))


def own_weights(received: Arrays, memory: Arrays) -> dict[str, Array] | None:
    """The site's own model by what it remembers, and the received weights; None where it has none yet."""
    own, local = part(memory, OWN), part(memory, LOCAL)
    if not own and not local:
        return None
    if MIXTURE not in memory:
        return {**received, **local, **own}
    share = float(memory[MIXTURE][0])
    return {
        name: (share * own[name] + (1 - share) * a).astype(a.dtype) if a.dtype.kind == "f" else own[name]
        for name, a in received.items()
    }


def ditto(
    own: nn.Module,
    received: Iterable[Tensor],
    pull: float,
    loss_of: Loss,
    train: Train,
    device: torch.device,
    rates: Mapping[str, float] | None = None,
    moments: Moments | None = None,
) -> Step:
    """One step of the site's own model on each batch, pulled towards the received parameters (Li et al. 2021).

    Args:
        rates, moments: see `stepper`.
    """
    return stepper(own, loss_of, train, device, [proximal(own, pull, list(received))], rates=rates, moments=moments)


def mixing(
    net: nn.Module,
    own: nn.Module,
    share: Tensor,
    adaptive: bool,
    loss_of: Loss,
    train: Train,
    device: torch.device,
    rates: Mapping[str, float] | None = None,
    moments: Moments | None = None,
) -> Step:
    """One step of APFL's `v` on each batch, before `net` takes its own (Deng et al. 2020, Algorithm 1).

    Args:
        own: the network of `v`; it and `share` (float64, alpha) are changed.
        rates, moments: see `stepper`.
    """
    own.train()
    freeze(own, rates)
    mixed = copy.deepcopy(own)
    triples = list(zip(mixed.parameters(), own.parameters(), net.parameters(), strict=True))
    optimizer = optimizer_of(dict(own.named_parameters()), train, rates, moments)
    room = Room(splits=splits(mixed))

    def attempt(images: Tensor, masks: Tensor, parts: int) -> Tensor:
        return gradients(mixed, images, masks, loss_of, parts=parts, cast=lambda: autocast(train, device))

    def step(images: Tensor, masks: Tensor) -> Tensor:
        alpha = float(share)
        with torch.no_grad():
            for m, v, w in triples:
                m.copy_(alpha * v + (1 - alpha) * w)
        mixed.zero_grad(set_to_none=True)
        loss = room.within(len(images), lambda parts: attempt(images, masks, parts), mixed.zero_grad)
        slope = 0.0
        for m, v, w in triples:
            if m.grad is None:
                continue
            if adaptive:
                slope += float(((v.detach() - w.detach()).double() * m.grad.double()).sum())
            v.grad = alpha * m.grad
        if train.clip_gradient is not None:
            nn.utils.clip_grad_norm_([v for _, v, _ in triples], train.clip_gradient)
        optimizer.step()
        if adaptive:
            share.copy_((share - train.learning_rate * slope).clamp(0, 1))  # equation 10
        return loss

    return step


def moving(net: nn.Module, names: Iterable[str]) -> tuple[Step, Callable[[], float | None]]:
    """Watches the steps of `net`: a function to call before each, and one for the variance of their mean.

    The sampling variance of the mean of K steps u_k, summed over the parameters of `names`:
    sum |u_k - mean u|^2 / (K (K - 1)); None below two steps, and where nothing moved.
    """
    wanted = set(names)
    watched = [p for name, p in net.named_parameters() if name in wanted]
    start = [p.detach().clone() for p in watched]
    last = [p.clone() for p in start]
    squares: list[Tensor] = []

    def note() -> None:
        moves = [((p.detach() - was) ** 2).sum(dtype=torch.float64) for p, was in zip(watched, last, strict=True)]
        squares.append(torch.stack(moves).sum())
        for p, was in zip(watched, last, strict=True):
            was.copy_(p.detach())

    def step(images: Tensor, masks: Tensor) -> Tensor:
        note()  # the first call sees no move at all
        return squares[-1]

    def variance() -> float | None:
        note()
        steps = len(squares) - 1
        if steps < 2:
            return None
        way = sum(((p.detach() - was) ** 2).sum(dtype=torch.float64) for p, was in zip(watched, start, strict=True))
        found = float((torch.stack(squares).sum() - way / steps) / (steps * (steps - 1)))
        return found if 0 < found <= 1e30 else None

    return step, variance
