"""Random changes of training examples, as `[augment]` of a study allows; all chance comes from the rng handed in.

The affine part is torch's `grid_sample`, 2 to 3 times faster here than scipy; so this file imports torch, and is
imported only when training begins.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be done to a batch, on whichever device it is.

    Attributes:
        left_right_axis, drawn, rng: see `changed`.
        with_masks: the truth is masks, which move with the images.
    """

    left_right_axis: NDArray[np.intp]
    drawn: Draw
    rng: np.random.Generator
    with_masks: bool

    def __call__(self, images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Images and truth as they are to be; those given may be written to."""
        if self.with_masks:
            return changed(images, truth, self.left_right_axis, self.drawn, self.rng)
        none = torch.zeros((len(images), *images.shape[2:]), dtype=torch.uint8, device=images.device)
        return changed(images, none, self.left_right_axis, self.drawn, self.rng)[0], truth

    def of_arrays(self, images: NDArray[Any], truth: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """The same of arrays."""
        seen, moved = self(torch.from_numpy(images), torch.from_numpy(truth))
        return seen.numpy(), moved.numpy()


def changed(
    given: Tensor, masks: Tensor, left_right_axis: NDArray[np.intp], drawn: Draw, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images float32[B, C, *size] and masks uint8[B, *size], changed together on the device that they are on; the
    tensors given may be written to.

    Args:
        left_right_axis: intp[B]; 0 where rows run between left and right, 1 where columns do.
        rng: for the noise alone; on a GPU it is its generator's, which `rng` sets: other noise than a CPU's.
    """
    images = given.float()
    for b in np.flatnonzero(drawn.flip).tolist():
        axis = int(left_right_axis[b])
        images[b] = images[b].flip(1 + axis)
        masks[b] = masks[b].flip(axis)
    if drawn.angle_rad.any() or (drawn.zoom != 1).any() or drawn.shift.any():
        images, masks = _affine(images, masks, drawn)

    def each(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(images.device).view(-1, *(1,) * (images.ndim - 1))

    if (drawn.gamma != 1).any():
        low, high = _extremes(images)
        span = (high - low).clamp_(min=1e-6)
        images.sub_(low).div_(span).pow_(each(drawn.gamma)).mul_(span).add_(low)
    if drawn.brightness.any():
        images += each(drawn.brightness)
    if drawn.noise.any():
        images += _grain(images, rng).mul_(each(drawn.noise))
    return images, masks


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel of each image, as [B, C, 1, ...]: channels may differ in their units."""
    low, high = torch.aminmax(images.flatten(2), dim=2)
    ones = (*low.shape, *(1,) * (images.ndim - 2))
    return low.view(ones), high.view(ones)


def _grain(like: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise of deviation 1."""
    if like.device.type == "cpu":
        return torch.from_numpy(rng.standard_normal(like.shape, dtype=np.float32))
    chance = torch.Generator(like.device).manual_seed(int(rng.integers(2**63)))
    return torch.randn(like.shape, generator=chance, device=like.device)


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


def _affine(images: Tensor, masks: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
    """Rotation, zoom and shift; what comes in from outside is the image's lowest value, and background.

    As preprocessing pads, so that a network meets nothing here that it never meets at a hospital.
    """
    matrices = _matrices(drawn, tuple(images.shape[2:])).to(images.device)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    low, _ = _extremes(images)
    moved = F.grid_sample(images.sub_(low), grid, align_corners=False).add_(low)
    labels = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return moved, labels[:, 0].to(torch.uint8)


def _matrices(drawn: Draw, size: tuple[int, ...]) -> Tensor:
    """float32[B, D, D + 1] for `affine_grid`: from output to input, in halves of the image, the last axis first."""
    dims = len(size)
    cos, sin = np.cos(drawn.angle_rad), np.sin(drawn.angle_rad)
    turn = np.tile(np.eye(dims), (len(drawn.zoom), 1, 1))
    turn[:, 0, 0], turn[:, 0, 1] = cos, -sin * size[1] / size[0]  # a rotation in pixels, not in shares of an edge
    turn[:, 1, 0], turn[:, 1, 1] = sin * size[0] / size[1], cos
    turn /= drawn.zoom[:, None, None]
    matrices = np.concatenate([turn[:, ::-1, ::-1], 2 * drawn.shift[:, ::-1, None]], axis=2)
    return torch.from_numpy(matrices.astype(np.float32))
