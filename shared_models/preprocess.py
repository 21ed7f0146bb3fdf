"""From voxels to what a network sees, and its answer back onto the voxels: training, evaluation and the release alike.

Every axis is one straight line: pixel `o` of an example lies at native index `start + step * o`. So scaling, cropping
and padding are one separable gather (10 times faster than a general affine), and the way back is its inverse. It goes
plane by plane, so that what it works on stays in the processor's cache; no copy of the volume is made on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import csr_array

if TYPE_CHECKING:  # a released MONAI bundle carries a copy of this file, and not of the package
    from shared_models.study import Preprocess

Plane = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the examples of one image lie on its own grid.

    Attributes:
        shape: native voxels I, J, K.
        spacing_mm: of the native grid, along I, J, K.
        size: of one example: (rows, columns) of a plane, or (rows, columns, planes); of the whole image, where
            patches of it are trained on.
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
        images: [N, C, rows, columns], one for each plane k; or [1, C, rows, columns, planes].
        geometry: for labels, and for the way back.
    """

    images: NDArray[Any]
    geometry: Geometry


class _Line(NamedTuple):
    """One axis of a gather: pixels `first` up to `last` lie on the image.

    Attributes:
        taps, weights: [last - first, taps]; the native voxels that make each of them, and their shares.
        whole: a pixel is a voxel; then there is one tap.
    """

    first: int
    last: int
    taps: NDArray[np.intp]
    weights: NDArray[np.float32]
    whole: bool

    @property
    def matrix(self) -> csr_array:
        rows, each = self.taps.shape
        ends = np.arange(0, rows * each + 1, each, dtype=np.int32)
        taps = self.taps.ravel().astype(np.int32)
        return csr_array((self.weights.ravel(), taps, ends), shape=(rows, int(taps.max(initial=0)) + 1))


def preprocess(
    voxels: NDArray[np.float32],
    spacing_mm: tuple[float, float, float],
    plan: Preprocess,
    dtype: DTypeLike = np.float32,
) -> Examples:
    """The examples of one image float32[C, I, J, K].

    Rows are axis I and columns axis J, never transposed: for pictures as they are displayed; for CT and MR in RAS+
    rows run to the patient's right and columns to the front (an axial plane as displayed, turned by a quarter).
    2-D plans make an example of each plane k and never mix planes. Intensities are mapped before scaling, so that a
    padding of -2000 HU does not bleed into its neighbours; what lies outside the image gets its lowest value.
    """
    i, j, k = voxels.shape[1:]
    return sampled(voxels, plan_geometry((i, j, k), spacing_mm, plan), plan, dtype)


def sampled(
    voxels: NDArray[np.float32], geometry: Geometry, plan: Preprocess, dtype: DTypeLike = np.float32
) -> Examples:
    """The examples of an image at the places that `geometry` says."""
    count = geometry.examples
    images = np.empty((count, len(voxels), *geometry.size), dtype)
    # [C, rows, columns, planes]
    to = np.moveaxis(images, 0, -1) if len(geometry.size) == 2 else images[0]
    lines = [
        _line(n, start, step, edge)
        for n, start, step, edge in zip(geometry.shape, geometry.start, geometry.step, geometry.size, strict=False)
    ]
    if len(lines) == 2:
        lines.append(_line(geometry.shape[2], 0.0, 1.0, geometry.shape[2]))
    sources, scale, low = _intensity(voxels, plan)
    for channel, source in enumerate(sources):
        if any((line.first, line.last) != (0, n) for line, n in zip(lines, to.shape[1:], strict=True)):
            to[channel] = low[channel]
        _gather(source, lines, scale, to[channel])
    return Examples(images, geometry)


def _gather(source: NDArray[np.float32], lines: list[_Line], scale: Callable[[Plane], Plane], to: NDArray[Any]) -> None:
    """Puts the mapped and resampled `source` [I, J, K] into `to` [rows, columns, planes], a plane of I at a time."""
    across, along, up = lines
    columns, planes = (None if line.whole else line.matrix for line in (along, up))
    inner = to[:, along.first : along.last, up.first : up.last]
    if not inner.size:
        return
    ready: dict[int, Plane] = {}  # the planes that the next pixels may need again
    for pixel, (taps, weights) in enumerate(zip(across.taps.tolist(), across.weights, strict=True), across.first):
        ready = {at: ready[at] if at in ready else scale(source[at]) for at in taps}
        if across.whole:
            plane = ready[taps[0]]
        else:
            plane = ready[taps[0]] * weights[0]
            for at, weight in zip(taps[1:], weights[1:], strict=True):
                plane += ready[at] * weight
        if columns is None:
            plane = plane[along.taps[0, 0] : along.taps[-1, 0] + 1]
        else:
            plane = columns @ plane[: columns.shape[1]]
        if planes is None:
            inner[pixel] = plane[:, up.taps[0, 0] : up.taps[-1, 0] + 1]
        else:
            inner[pixel] = (planes @ np.ascontiguousarray(plane.T[: planes.shape[1]])).T


def preprocess_labels(labels: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """uint8[N, *size] from uint8[I, J, K] by nearest neighbour; 0 outside the image."""
    small = labels
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.size, strict=True)):
        n = geometry.shape[axis]
        if (start, step, count) == (0, 1, n):
            continue
        at = start + step * np.arange(count)
        index = np.clip(np.floor(at + 0.5).astype(np.intp), 0, n - 1)
        small = small.take(index, axis=axis)
        np.moveaxis(small, axis, 0)[~_inside(at, n)] = 0
    return np.ascontiguousarray(np.moveaxis(small, -1, 0) if len(geometry.size) == 2 else small[None])


def restore(prediction: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Probabilities float32[N, L, *size] on the native grid, float32[L, I, J, K]: linear, 0 where nothing was seen."""
    native = np.moveaxis(prediction, 0, -1) if len(geometry.size) == 2 else prediction[0]
    for axis, (start, step, count) in enumerate(zip(geometry.start, geometry.step, geometry.shape, strict=False), 1):
        native = _resample(native, axis, -start / step, 1 / step, count)
    return np.ascontiguousarray(native, dtype=np.float32)


def plan_geometry(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], plan: Preprocess) -> Geometry:
    """Where the plan's examples lie on a grid: centred on the image, by its voxel size or its extent in mm.

    Where the plan trains on patches this is the whole image, with room around it for a patch that is larger.
    """
    dims = len(plan.size)
    if plan.fit == "letterbox":  # one scale for all axes, in mm, that just holds the longest
        pixel_mm = max(n * mm / size for n, mm, size in zip(shape, spacing_mm, plan.size, strict=False))
        steps = [pixel_mm / mm for mm in spacing_mm[:dims]]
    elif plan.spacing_mm is not None:
        steps = [wanted / mm for wanted, mm in zip(plan.spacing_mm, spacing_mm, strict=False)]
    else:
        steps = [1.0] * dims
    steps = [1.0 if abs(step - 1) < 1e-4 else step for step in steps]  # rounding of a header is no reason to blur
    sizes = plan.size
    if plan.fit == "patches":  # every voxel of the image has a pixel, and every patch fits in
        sizes = tuple(max(edge, math.ceil(n / step - 1e-6)) for n, edge, step in zip(shape, sizes, steps, strict=False))
    starts = [
        # a half voxel of shift would blur as well
        float((n - size) // 2) if step == 1 else (n - 1) / 2 - step * (size - 1) / 2
        for n, size, step in zip(shape, sizes, steps, strict=False)
    ]
    return Geometry(shape, spacing_mm, sizes, tuple(starts), tuple(steps))


def _intensity(
    voxels: NDArray[np.float32], plan: Preprocess
) -> tuple[NDArray[np.float32], Callable[[Plane], Plane], NDArray[np.float32]]:
    """Voxels, what is still to be done to each plane of them, and the lowest value of each channel afterwards."""
    low, high = plan.window_hu
    if plan.intensity == "window":
        factor = np.float32(1 / (high - low))

        def windowed(plane: Plane) -> Plane:
            mapped = np.clip(plane, low, high)
            mapped -= np.float32(low)
            mapped *= factor
            return mapped

        return voxels, windowed, np.zeros(len(voxels), np.float32)
    if plan.intensity == "zscore" and plan.mean is not None and plan.deviation is not None:
        # CT by the mean and deviation of all sites' labelled voxels, other images each by its own (as nnU-Net does)
        mean, deviation = plan.mean, plan.deviation

        def standardised(plane: Plane) -> Plane:
            mapped = np.clip(plane, low, high)
            mapped -= np.float32(mean)
            mapped /= np.float32(deviation)
            return mapped

        return voxels, standardised, np.full(len(voxels), (low - mean) / deviation, np.float32)
    mapped, lowest = _zscore(voxels, plan.nonzero) if plan.intensity == "zscore" else _percentile(voxels)
    return mapped, _as_it_is, lowest


def _as_it_is(plane: Plane) -> Plane:
    return plane


def _percentile(voxels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bounds = np.percentile(voxels.reshape(len(voxels), -1), (0.5, 99.5), axis=1).astype(np.float32)
    low_of, high_of = bounds.reshape(2, -1, 1, 1, 1)
    mapped = np.clip(voxels, low_of, high_of)
    mapped -= mapped.mean(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    deviation = mapped.std(axis=(1, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    mapped /= np.where(deviation > 0, deviation, 1)  # an image of one value stays 0
    return mapped, mapped.min(axis=(1, 2, 3))


def _zscore(voxels: NDArray[np.float32], nonzero: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each channel of each image by its own mean and deviation."""
    mapped = voxels.copy()
    for channel in mapped:
        seen = channel[channel != 0] if nonzero else channel
        if seen.size:
            mean, deviation = seen.mean(dtype=np.float64), seen.std(dtype=np.float64)
            scaled = (channel - np.float32(mean)) / np.float32(deviation or 1)
            channel[...] = np.where(channel == 0, 0, scaled) if nonzero else scaled
    return mapped, np.zeros(len(voxels), np.float32) if nonzero else mapped.min(axis=(1, 2, 3))


def _line(source: int, start: float, step: float, count: int) -> _Line:
    """`count` pixels at `start + step * o` along an axis of `source` voxels: linear, and where it shrinks a triangle
    that keeps fine lines from turning into false ones. Outside the image its edge goes on."""
    at = start + step * np.arange(count)
    on = np.flatnonzero(_inside(at, source))
    first, last = (int(on[0]), int(on[-1]) + 1) if on.size else (0, 0)
    at = at[first:last]
    if step == 1 and start == int(start):
        return _Line(first, last, at.astype(np.intp)[:, None], np.ones((len(at), 1), np.float32), True)
    width = max(1.0, step)
    taps = np.floor(at - width).astype(np.intp)[:, None] + 1 + np.arange(math.ceil(2 * width))
    weights = np.clip(1 - np.abs(taps - at[:, None]) / width, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return _Line(first, last, np.clip(taps, 0, source - 1), weights.astype(np.float32), False)


def _resample(data: NDArray[np.float32], axis: int, start: float, step: float, count: int) -> NDArray[np.float32]:
    """`data` along one axis; 0 outside."""
    line = _line(data.shape[axis], start, step, count)
    out = np.zeros((*data.shape[:axis], count, *data.shape[axis + 1 :]), np.float32)
    if line.last > line.first:
        moved, to = np.moveaxis(data, axis, 0), np.moveaxis(out, axis, 0)[line.first : line.last]
        if line.whole:
            to[...] = moved[line.taps[0, 0] : line.taps[-1, 0] + 1]
        else:
            weights = line.matrix
            rows = np.ascontiguousarray(moved[: weights.shape[1]]).reshape(weights.shape[1], -1)
            to[...] = (weights @ rows).reshape(to.shape)
    return out


def _inside(at: NDArray[np.floating[Any]], count: int) -> NDArray[np.bool_]:
    """Whether native positions lie on the image, whose first and last voxels reach half a voxel out."""
    return (at > -0.5 - 1e-6) & (at < count - 0.5 + 1e-6)
