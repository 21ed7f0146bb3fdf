"""What the coordinator does with the mean update: server optimizers, tensor by tensor, so that memory stays flat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shared_models.strategy import Strategy
from shared_models.weights import BLOCK, Array

Slots: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """A server optimizer (Reddi et al. 2021, Algorithm 1).

    Attributes:
        slots: names of the arrays that it keeps for each tensor between rounds, float32, and the number that each
            starts at.
        step: (weights, mean delta in float64, slots) -> (next weights, next slots), element by element, so that it may
            be given a tensor in pieces; changes nothing.
    """

    slots: Mapping[str, float]
    step: Callable[[Array, Array, Slots], tuple[Array, Slots]]


def fedavg(learning_rate: float = 1.0) -> Optimizer:
    """McMahan et al. 2017, Algorithm 1; `learning_rate` other than 1 is Reddi et al. 2021 with server SGD."""

    def step(weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
        return (weights.astype(np.float64) + learning_rate * delta).astype(weights.dtype), slots

    return Optimizer({}, step)


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> Optimizer:
    """Hsu, Qi & Brown 2019, section 4.3."""

    def step(weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
        velocity = momentum * slots["velocity"].astype(np.float64) + delta
        moved = (weights.astype(np.float64) + learning_rate * velocity).astype(weights.dtype)
        return moved, {"velocity": velocity.astype(np.float32)}

    return Optimizer({"velocity": 0.0}, step)


Second: TypeAlias = Callable[[Array, Array], Array]  # second moment, squared mean delta -> next second moment


def adaptive(learning_rate: float, beta1: float, tau: float, second: Second) -> Optimizer:
    """Reddi et al. 2021, Algorithm 2: `m = beta1 m + (1 - beta1) delta`, `w += rate m / (sqrt(v) + tau)`.

    As the paper has it: no bias correction, and v starts at tau^2. (Flower 1.41 starts it at 0, and its FedAdam alone
    corrects the rate as Kingma & Ba 2015 do, one round ahead.)
    """

    def step(weights: Array, delta: Array, slots: Slots) -> tuple[Array, Slots]:
        first = beta1 * slots["first"].astype(np.float64) + (1 - beta1) * delta
        squares = second(slots["second"].astype(np.float64), np.square(delta))
        moved = weights.astype(np.float64) + learning_rate * first / (np.sqrt(squares) + tau)
        kept = {"first": first.astype(np.float32), "second": squares.astype(np.float32)}
        return moved.astype(weights.dtype), kept

    return Optimizer({"first": 0.0, "second": tau**2}, step)


def fedadagrad(learning_rate: float = 0.01, beta1: float = 0.0, tau: float = 1e-3) -> Optimizer:
    """Reddi et al. 2021, Algorithm 2, line 11."""
    return adaptive(learning_rate, beta1, tau, lambda v, square: v + square)


def fedyogi(learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """Reddi et al. 2021, Algorithm 2, line 12."""
    return adaptive(learning_rate, beta1, tau, lambda v, square: v - (1 - beta2) * square * np.sign(v - square))


def fedadam(learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """Reddi et al. 2021, Algorithm 2, line 13."""
    return adaptive(learning_rate, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def optimizer_of(strategy: Strategy) -> Optimizer:
    rate, beta1, beta2, tau = strategy.rate, strategy.beta1, strategy.beta2, strategy.tau
    match strategy.name:
        case "fedavg":
            return fedavg(rate)
        case "fedavgm":
            return fedavgm(rate, strategy.momentum)
        case "fedadagrad":
            return fedadagrad(rate, beta1, tau)
        case "fedyogi":
            return fedyogi(rate, beta1, beta2, tau)
        case "fedadam":
            return fedadam(rate, beta1, beta2, tau)


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
