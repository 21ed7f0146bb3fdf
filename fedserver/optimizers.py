"""What the coordinator does with the mean update: server optimizers, tensor by tensor, so that memory stays flat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shared_models.study import Strategy
from shared_models.weights import BLOCK, Array

Slots: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """A server optimizer (Reddi et al. 2021, Algorithm 1).

    Attributes:
        slots: names of the arrays that it keeps for each tensor between rounds; they start at zero, float32.
        step: (weights, mean delta in float64, slots) -> (next weights, next slots), element by element, so that it may
            be given a tensor in pieces; changes nothing.
    """

    slots: tuple[str, ...]
    step: Callable[[Array, Array, Slots], tuple[Array, Slots]]


def fedavg(learning_rate: float = 1.0) -> Optimizer:
    """McMahan et al. 2017, Algorithm 1; `learning_rate` other than 1 is Reddi et al. 2021 with server SGD."""

    def step(weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
        return (weights.astype(np.float64) + learning_rate * delta).astype(weights.dtype), slots

    return Optimizer((), step)


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> Optimizer:
    """Hsu, Qi & Brown 2019, section 4.3."""

    def step(weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
        velocity = momentum * slots["velocity"].astype(np.float64) + delta
        moved = (weights.astype(np.float64) + learning_rate * velocity).astype(weights.dtype)
        return moved, {"velocity": velocity.astype(np.float32)}

    return Optimizer(("velocity",), step)


def optimizer_of(strategy: Strategy) -> Optimizer:
    if strategy.name == "fedavgm":
        return fedavgm(strategy.server_learning_rate, strategy.momentum)
    return fedavg(strategy.server_learning_rate)


def advance(optimizer: Optimizer, weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
    """One step, in blocks, so that its float64 temporaries stay small beside the model.

    Whole-number tensors (counters of a network) move by the rounded mean and know no momentum.
    """
    if weights.dtype.kind != "f":
        return (weights + delta).astype(weights.dtype), slots
    moved = np.empty(weights.shape, weights.dtype)
    kept = {name: np.empty(slot.shape, slot.dtype) for name, slot in slots.items()}
    flat = {name: slot.reshape(-1) for name, slot in slots.items()}
    for at in range(0, weights.size, BLOCK):
        part = slice(at, at + BLOCK)
        before = {name: slot[part] for name, slot in flat.items()}
        step, after = optimizer.step(weights.reshape(-1)[part], delta.reshape(-1)[part], before)
        moved.reshape(-1)[part] = step
        for name, slot in after.items():
            kept[name].reshape(-1)[part] = slot
    return moved, kept
