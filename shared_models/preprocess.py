"""From voxels to what a network sees, and its answer back onto the voxels: training, evaluation and the release alike.

Every axis is one straight line: pixel `o` of an example lies at native index `start + step * o`. So scaling, cropping
and padding are one separable gather (10 times faster than a general affine), and the way back is its inverse.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_models.study import Preprocess


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the examples of one image lie on its own grid.

    Attributes:
        shape: native voxels I, J, K.
        spacing_mm: of the native grid, along I, J, K.
        size: of one example: (rows, columns) of a plane, or (rows, columns, planes).
        start, step: native index of pixel 0, and native voxels per pixel, for each axis of `size`.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    size: tuple[int, ...]
    start: tuple[float, ...]
    step: tuple[float, ...]

    @property
    def examples(self) -> int:
        """Examples of the image: its planes if each is one (2-D), else 1."""
        return self.shape[2] if len(self.size) == 2 else 1

    def plain(self) -> dict[str, Any]:
        """For JSON; `geometry_from` is the inverse."""
        return asdict(self)


def geometry_from(plain: dict[str, Any]) -> Geometry:
    return Geometry(**{name: tuple(values) for name, values in plain.items()})


@dataclass(frozen=True, slots=True)
class Examples:
    """One image as examples.

    Attributes:
        images: float32[N, C, rows, columns], one for each plane k; or float32[1, C, rows, columns, planes].
        geometry: for labels, and for the way back.
    """

    images: NDArray[np.float32]
    geometry: Geometry


def preprocess(voxels: NDArray[np.float32], spacing_mm: tuple[float, float, float], plan: Preprocess) -> Examples:
    """The examples of one image float32[C, I, J, K].

    Rows are axis I and columns axis J, never transposed: for pictures as they are displayed; for CT and MR in RAS+
    rows run to the patient's right and columns to the front (an axial plane as displayed, turned by a quarter).
    2-D plans make an example of each plane k and never mix planes. Intensities are mapped before scaling, so that a
    padding of -2000 HU does not bleed into its neighbours; what lies outside the image gets its lowest value.
    """
    i, j, k = voxels.shape[1:]
    geometry = plan_geometry((i, j, k), spacing_mm, plan)
    images, low = _intensity(voxels, plan)
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.size, strict=True), 1):
        images = _resample(images, axis, start, step, count)
    _pad(images, geometry, low)
    return Examples(_as_examples(images, geometry), geometry)


def preprocess_labels(labels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """uint8[N, *size] from uint8[I, J, K] by nearest neighbour; 0 outside the image."""
    small = labels
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.size, strict=True)):
        at = start + step * np.arange(count)
        index = np.clip(np.floor(at + 0.5).astype(np.intp), 0, geometry.shape[axis] - 1)
        small = small.take(index, axis=axis)
        np.moveaxis(small, axis, 0)[~_inside(at, geometry.shape[axis])] = 0
    return _as_examples(small[None], geometry)[:, 0]


def restore(prediction: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Probabilities float32[N, L, *size] on the native grid, float32[L, I, J, K]: linear, 0 where nothing was seen."""
    native = np.moveaxis(prediction, 0, -1) if len(geometry.size) == 2 else prediction[0]
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.shape, strict=False), 1):
        native = _resample(native, axis, -start / step, 1 / step, count)
        seen = _inside((np.arange(count) - start) / step, geometry.size[axis - 1])
        np.moveaxis(native, axis, 0)[~seen] = 0
    return np.ascontiguousarray(native, dtype=np.float32)


def plan_geometry(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], plan: Preprocess) -> Geometry:
    """Where the plan's examples lie on a grid: centred on the image, by its voxel size or its extent in mm."""
    dims = len(plan.size)
    if plan.fit == "letterbox":  # one scale for all axes, in mm, that just holds the longest
        pixel_mm = max(n * mm / size for n, mm, size in zip(shape, spacing_mm, plan.size, strict=False))
        steps = [pixel_mm / mm for mm in spacing_mm[:dims]]
    elif plan.spacing_mm is not None:
        steps = [wanted / mm for wanted, mm in zip(plan.spacing_mm, spacing_mm, strict=False)]
    else:
        steps = [1.0] * dims
    steps = [1.0 if abs(step - 1) < 1e-4 else step for step in steps]  # rounding of a header is no reason to blur
    starts = [
        # a half voxel of shift would blur as well
        float((n - size) // 2) if step == 1 else (n - 1) / 2 - step * (size - 1) / 2
        for n, size, step in zip(shape, plan.size, steps, strict=False)
    ]
    return Geometry(shape, spacing_mm, plan.size, tuple(starts), tuple(steps))


def _intensity(voxels: NDArray[np.float32], plan: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mapped voxels, and the lowest value of each channel."""
    if plan.intensity == "zscore":
        return _zscore(voxels, plan)
    if plan.intensity == "window":
        low, high = plan.window_hu
        mapped = np.clip(voxels, low, high)
        mapped -= np.float32(low)
        mapped *= np.float32(1 / (high - low))
        return mapped, np.zeros(len(voxels), np.float32)
    bounds = np.percentile(voxels.reshape(len(voxels), -1), (0.5, 99.5), axis=1).astype(np.float32)
    low_of, high_of = bounds.reshape(2, -1, 1, 1, 1)
    mapped = np.clip(voxels, low_of, high_of)
    mapped -= mapped.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    deviation = mapped.std(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    mapped /= np.where(deviation > 0, deviation, 1)  # an image of one value stays 0
    return mapped, mapped.min(axis=(1, 2, 3))


def _zscore(voxels: NDArray[np.float32], plan: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """CT by the mean and deviation of all sites' labelled voxels, other images each by its own (as nnU-Net does)."""
    if plan.mean is not None and plan.deviation is not None:
        low, high = plan.window_hu
        mapped = np.clip(voxels, low, high)
        mapped -= np.float32(plan.mean)
        mapped /= np.float32(plan.deviation)
        return mapped, np.full(len(voxels), (low - plan.mean) / plan.deviation, np.float32)
    mapped = voxels.copy()
    for channel in mapped:
        seen = channel[channel != 0] if plan.nonzero else channel
        if seen.size:
            mean, deviation = seen.mean(dtype=np.float64), seen.std(dtype=np.float64)
            scaled = (channel - np.float32(mean)) / np.float32(deviation or 1)
            channel[...] = np.where(channel == 0, 0, scaled) if plan.nonzero else scaled
    return mapped, np.zeros(len(voxels), np.float32) if plan.nonzero else mapped.min(axis=(1, 2, 3))


def _resample(data: NDArray[np.float32], axis: int, start: float, step: float, count: int) -> NDArray[np.float32]:
    """`data` at `start + step * o` along one axis: linear, and where it shrinks a triangle that keeps fine lines from
    turning into false ones. Outside the data its edge goes on."""
    source = data.shape[axis]
    if step == 1 and start == int(start):
        return data.take(np.clip(np.arange(count) + int(start), 0, source - 1), axis=axis)
    at = start + step * np.arange(count)
    width = max(1.0, step)
    taps = np.floor(at - width).astype(np.intp)[:, None] + 1 + np.arange(math.ceil(2 * width))
    weights = np.clip(1 - np.abs(taps - at[:, None]) / width, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    taps = np.clip(taps, 0, source - 1)
    along = (count,) + (1,) * (data.ndim - axis - 1)
    out = np.zeros((*data.shape[:axis], count, *data.shape[axis + 1 :]), np.float32)
    for tap in range(taps.shape[1]):
        out += data.take(taps[:, tap], axis=axis) * weights[:, tap].astype(np.float32).reshape(along)
    return out


def _inside(at: NDArray[np.floating[Any]], count: int) -> NDArray[np.bool_]:
    """Whether native positions lie on the image, whose first and last voxels reach half a voxel out."""
    return (at > -0.5 - 1e-6) & (at < count - 0.5 + 1e-6)


def _pad(images: NDArray[np.float32], geometry: Geometry, low: NDArray[np.float32]) -> None:
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.size, strict=True), 1):
        outside = ~_inside(start + step * np.arange(count), geometry.shape[axis - 1])
        for channel, lowest in zip(images, low, strict=True):
            np.moveaxis(channel, axis - 1, 0)[outside] = lowest


def _as_examples(data: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """[C, rows, columns, planes] as [N, C, *size]."""
    return np.ascontiguousarray(np.moveaxis(data, -1, 0) if len(geometry.size) == 2 else data[None])
