"""What keeps local training from drifting away from the federation, as functions added to the loss."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Pull: TypeAlias = Callable[[nn.Module], Tensor]


def proximal(net: nn.Module, mu: float) -> Pull:
    """FedProx's `mu / 2 * |w - w_received|^2` (Li et al. 2020, equation 2); nothing when `mu` is 0."""
    if mu == 0:
        return lambda _: torch.zeros((), device=next(net.parameters()).device)
    received = [p.detach().clone() for p in net.parameters()]

    def pull(trained: nn.Module) -> Tensor:
        squares = [((p - r) ** 2).sum() for p, r in zip(trained.parameters(), received, strict=True)]
        return 0.5 * mu * torch.stack(squares).sum()

    return pull
