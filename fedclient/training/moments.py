"""What a local optimizer has learned of the slopes so far, carried from one round to the next at its site.

A new Adam takes steps of full length along the sign of its first gradients (Kingma & Ba 2015, section 2.1), which
rounds of few steps hardly get over; with its moments it goes on as if there had been no round between, but for the mean
that has moved the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from shared_models.weights import Array, Arrays

STEP = "step"  # Adam's count, which it keeps on the CPU


@dataclass(slots=True)
class Moments:
    """Of one round.

    Attributes:
        before: `SLOT/PARAMETER` -> array of the last counted round; nothing in the first.
    """

    before: Arrays
    _optimizer: Optimizer | None = field(default=None, init=False)
    _named: Mapping[str, nn.Parameter] = field(default_factory=dict, init=False)

    def take_up(self, optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        """Puts what was kept into a new optimizer; a parameter that was frozen until now begins without."""
        self._optimizer, self._named = optimizer, named
        for place, array in self.before.items():
            slot, _, name = place.partition("/")
            parameter = named.get(name)
            if parameter is None or not parameter.requires_grad:
                continue
            kept = torch.from_numpy(array.copy())
            state = optimizer.state[parameter]
            state[slot] = kept.reshape(()) if slot == STEP else kept.to(parameter.device)

    def left(self) -> dict[str, Array]:
        """What is to be kept, once the steps are done; frozen parameters keep what they had."""
        found = dict(self.before)
        if self._optimizer is None:
            return found
        for name, parameter in self._named.items():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{slot}/{name}"] = value.detach().cpu().reshape(value.shape or (1,)).numpy().copy()
        return found
