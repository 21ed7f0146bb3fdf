"""SCAFFOLD's control variate, which travels in the file of the weights: what it is called, and how to tell it apart.

Karimireddy et al. 2020: the server's `c` is the mean of the sites' `c_i`, mean gradients of their local steps. Kept and
sent here as `learning_rate * c`, with the study's own rate: how far a step goes, which lies in the range of a delta.
"""

import numpy as np

from shared_models.weights import Array, Arrays

CONTROL = "control/"


def with_control(weights: Arrays) -> Arrays:
    """`weights` and, for each tensor that has a gradient, a control variate of zero."""
    return {**weights, **filed({name: np.zeros_like(a) for name, a in weights.items() if a.dtype.kind == "f"})}


def filed(control: Arrays) -> dict[str, Array]:
    """A control variate under the names that it travels by."""
    return {CONTROL + name: a for name, a in control.items()}


def without_control(tensors: Arrays) -> Arrays:
    return {name: a for name, a in tensors.items() if not name.startswith(CONTROL)}


def control_of(tensors: Arrays) -> Arrays:
    """Name of the tensor -> its control variate."""
    return {name.removeprefix(CONTROL): a for name, a in tensors.items() if name.startswith(CONTROL)}
