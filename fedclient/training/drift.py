"""What keeps local training from drifting away from the federation: terms of the loss, corrections of the gradient.

Each is a function of a network that is made once for a round; any of them go together.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared_models.weights import Array, Arrays

Correction: TypeAlias = Callable[[nn.Module], None]  # changes the gradients in place


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 0, of a batch that is cut into `of`; `share` of its examples are in it."""

    number: int = 0
    of: int = 1
    share: float = 1.0


WHOLE = Part()


class Pull(Protocol):
    """What is added to the loss of the batch that the network has just seen: of its parts, what adds up to that."""

    def __call__(self, net: nn.Module, part: Part = WHOLE, /) -> Tensor: ...


def proximal(net: nn.Module, mu: float, towards: Sequence[Tensor] | None = None) -> Pull:
    """FedProx's `mu / 2 * |w - w_received|^2` (Li et al. 2020, equation 2); nothing when `mu` is 0.

    Args:
        towards: the parameters that it pulls to; those that `net` has now, unless they are given.
    """
    if mu == 0:
        return lambda _, part=WHOLE: torch.zeros((), device=next(net.parameters()).device)
    received = [p.detach().clone() for p in (net.parameters() if towards is None else towards)]

    def pull(trained: nn.Module, part: Part = WHOLE) -> Tensor:
        squares = [((p - r) ** 2).sum() for p, r in zip(trained.parameters(), received, strict=True)]
        return part.share * 0.5 * mu * torch.stack(squares).sum()

    return pull


def contrast(
    net: nn.Module, features: nn.Module, previous: nn.Module, before: nn.Module, mu: float, temperature: float
) -> Pull:
    """MOON's contrast of features (Li et al. 2021, equations 3 and 4): near to those of the received weights, far from
    those of the site's last ones.

    Args:
        features: the layer of `net` whose output, averaged over space, is the feature vector.
        previous: a network with the site's weights of its last round.
        before: the same layer in it.
    """
    received = copy.deepcopy(net).eval()
    names = {module: name for name, module in net.named_modules()}
    seen: dict[str, Tensor] = {}
    net.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("images", inputs[0]))
    for who, layer in (("now", features), ("last", before), ("global", received.get_submodule(names[features]))):
        layer.register_forward_hook(lambda _, __, out, who=who: seen.__setitem__(who, out.flatten(2).mean(2).float()))
    previous.eval()

    def pull(_: nn.Module, part: Part = WHOLE) -> Tensor:
        with torch.no_grad():
            received(seen["images"])
            previous(seen["images"])
        near = F.cosine_similarity(seen["now"], seen["global"]) / temperature
        far = F.cosine_similarity(seen["now"], seen["last"]) / temperature
        return part.share * mu * F.softplus(far - near).mean()  # -log(e^near / (e^near + e^far))

    return pull


def corrected(names: Sequence[str], control: Arrays, own: Arrays, learning_rate: float) -> Correction:
    """SCAFFOLD's `g - c_i + c` (Karimireddy et al. 2020, Algorithm 1, line 10) for the parameters of `names`.

    Args:
        control, own: `learning_rate * c` and `learning_rate * c_i` of each; one that is missing is 0.
    """
    shifts: dict[str, Tensor] = {}

    def correct(net: nn.Module) -> None:
        for name, parameter in net.named_parameters():
            if name not in names or parameter.grad is None:
                continue
            if name not in shifts:
                shift = (_or_zero(control, name, parameter) - _or_zero(own, name, parameter)) / learning_rate
                shifts[name] = torch.from_numpy(shift).to(parameter.device)
            parameter.grad.add_(shifts[name])

    return correct


def next_control(
    control: Arrays,
    own: Arrays,
    received: Arrays,
    trained: Arrays,
    names: Sequence[str],
    steps: int,
    scale: float,
) -> dict[str, Array]:
    """SCAFFOLD's `c_i - c + (x - y) / (steps * rate)` (Algorithm 1, line 12, option II), times the study's rate.

    Args:
        scale: the study's learning rate over that of the round.
    """
    made = {}
    for name in names:
        moved = (received[name].astype(np.float64) - trained[name]) * (scale / max(1, steps))
        before = own[name].astype(np.float64) if name in own else 0.0
        made[name] = (before - control[name].astype(np.float64) + moved).astype(received[name].dtype)
    return made


def _or_zero(arrays: Mapping[str, Array], name: str, like: Tensor) -> Array:
    return arrays[name] if name in arrays else np.zeros(tuple(like.shape), np.float32)
