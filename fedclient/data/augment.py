"""Random changes of training examples, as `[augment]` of a study allows; all chance comes from the rng handed in.

The affine part is torch's `grid_sample`, 2 to 3 times faster here than scipy; so this file imports torch, and is
imported only when training begins.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from shared_models.study import Augment


@dataclass(frozen=True, slots=True)
class Draw:
    """The parameters of a batch of B examples.

    Attributes:
        flip: bool[B]; mirror left and right.
        angle_rad, zoom: float64[B]; in-plane rotation, and how much larger things get.
        shift: float64[B, D]; along each axis, as a share of its length.
        gamma, brightness, noise: float64[B]; exponent, added value, standard deviation.
    """

    flip: NDArray[np.bool_]
    angle_rad: NDArray[np.float64]
    zoom: NDArray[np.float64]
    shift: NDArray[np.float64]
    gamma: NDArray[np.float64]
    brightness: NDArray[np.float64]
    noise: NDArray[np.float64]


def draw(augment: Augment, examples: int, dims: int, rng: np.random.Generator) -> Draw:
    """Parameters for a batch; as many numbers are drawn whatever is switched off, so that the others stay the same."""
    even = rng.uniform(-1, 1, size=(examples, 9))
    return Draw(
        flip=(even[:, 0] < 0) & augment.flip_left_right,
        angle_rad=np.deg2rad(augment.rotate_deg) * even[:, 1],
        zoom=1 + augment.scale * even[:, 2],
        gamma=1 + augment.gamma * even[:, 3],
        brightness=augment.brightness * even[:, 4],
        noise=augment.noise * np.abs(even[:, 5]),
        shift=augment.shift * even[:, 6 : 6 + dims],
    )


def apply(
    given: NDArray[np.float16] | NDArray[np.float32],
    masks: NDArray[np.uint8],
    left_right_axis: NDArray[np.intp],
    drawn: Draw,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Images float32[B, C, *size] and masks uint8[B, *size], changed together; the arrays given may be written to.

    Args:
        left_right_axis: intp[B]; 0 where rows run between left and right, 1 where columns do.
        rng: for the noise alone.
    """
    images: NDArray[np.float32] = torch.from_numpy(given).float().numpy()  # 8 times faster than numpy's
    for b in np.flatnonzero(drawn.flip):
        axis = left_right_axis[b]
        images[b] = np.flip(images[b], axis=1 + axis)
        masks[b] = np.flip(masks[b], axis=axis)
    if drawn.angle_rad.any() or (drawn.zoom != 1).any() or drawn.shift.any():
        images, masks = _affine(images, masks, drawn)
    each = (-1,) + (1,) * (images.ndim - 1)
    if (drawn.gamma != 1).any():
        low = images.min(axis=tuple(range(1, images.ndim)), keepdims=True)
        span = np.maximum(images.max(axis=tuple(range(1, images.ndim)), keepdims=True) - low, np.float32(1e-6))
        images -= low
        images /= span
        np.power(images, drawn.gamma.reshape(each).astype(np.float32), out=images)
        images *= span
        images += low
    if drawn.brightness.any():
        images += drawn.brightness.reshape(each).astype(np.float32)
    if drawn.noise.any():
        grain = rng.standard_normal(images.shape, dtype=np.float32)
        grain *= drawn.noise.reshape(each).astype(np.float32)
        images += grain
    return images, masks


def move_lesions(
    lesions: NDArray[np.float32], size: tuple[int, ...], left_right_axis: NDArray[np.intp], drawn: Draw
) -> NDArray[np.float32]:
    """Lesions float32[B, M, 1 + 2 D] where `apply` takes what they are on; a turned lesion has the extents of the box
    around its ellipse."""
    dims = len(size)
    moved = lesions.copy()
    centre, half = moved[:, :, 1 : 1 + dims], moved[:, :, 1 + dims :]
    for b in np.flatnonzero(drawn.flip):
        axis = left_right_axis[b]
        centre[b, :, axis] = size[axis] - 1 - centre[b, :, axis]
    edges = np.array(size)
    matrices = _matrices(drawn, size).numpy().astype(np.float64)
    inward = matrices[:, ::-1, dims - 1 :: -1] * (edges[None, :, None] / edges[None, None, :])  # [from axis, to axis]
    outward = np.linalg.inv(inward)
    middle = (edges - 1) / 2
    away = centre - middle - matrices[:, None, ::-1, dims] * edges / 2
    centre[...] = np.einsum("bij,bmj->bmi", outward, away) + middle
    half[...] = np.sqrt(np.einsum("bij,bmj->bmi", outward**2, half.astype(np.float64) ** 2))
    return moved


def _affine(
    images: NDArray[np.float32], masks: NDArray[np.uint8], drawn: Draw
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Rotation, zoom and shift; what comes in from outside is the image's lowest value, and background.

    As preprocessing pads, so that a network meets nothing here that it never meets at a hospital.
    """
    grid = F.affine_grid(_matrices(drawn, images.shape[2:]), list(images.shape), align_corners=False)
    low = images.min(axis=tuple(range(1, images.ndim)), keepdims=True)
    images -= low
    moved = F.grid_sample(torch.from_numpy(images), grid, align_corners=False).numpy()
    moved += low
    labels = torch.from_numpy(masks[:, None].astype(np.float32))
    moved_labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)
    return moved, moved_labels.numpy()[:, 0].astype(np.uint8)


def _matrices(drawn: Draw, size: tuple[int, ...]) -> torch.Tensor:
    """float32[B, D, D + 1] for `affine_grid`: from output to input, in halves of the image, the last axis first."""
    dims = len(size)
    cos, sin = np.cos(drawn.angle_rad), np.sin(drawn.angle_rad)
    turn = np.tile(np.eye(dims), (len(drawn.zoom), 1, 1))
    turn[:, 0, 0], turn[:, 0, 1] = cos, -sin * size[1] / size[0]  # a rotation in pixels, not in shares of an edge
    turn[:, 1, 0], turn[:, 1, 1] = sin * size[0] / size[1], cos
    turn /= drawn.zoom[:, None, None]
    matrices = np.concatenate([turn[:, ::-1, ::-1], 2 * drawn.shift[:, ::-1, None]], axis=2)
    return torch.from_numpy(matrices.astype(np.float32))
