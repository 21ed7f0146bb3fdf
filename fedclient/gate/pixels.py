"""What an image looks like, in few numbers: which one it is, which way it lies, and a small picture of it."""

import base64
import hashlib
import hmac
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedclient.data.pictures import png_bytes
from fedclient.data.volume import Volume

EDGE = 16  # of the perceptual hash and the projections
BAND = 8  # steps in one part of the hash: noise spoils parts, not the whole
LAYERS = 4  # of a volume, along K
FLAT = 0.02  # of the range of grey values: smaller steps are noise
CT_HU = (-1000.0, 1000.0)
TINT = np.array([255, 80, 60], np.float32)
PICTURE_EDGE = 112


def sealed(secret: str, kind: str, content: bytes) -> str:
    """32 hex digits of HMAC-SHA256: equal for equal content, and without the secret it says nothing."""
    return hmac.digest(secret.encode(), kind.encode() + b"\0" + content, "sha256").hex()[:32]


def pixel_seal(volume: Volume, secret: str) -> str:
    """Of the grid and each voxel."""
    content = hashlib.sha256(repr(volume.voxels.shape).encode())
    for channel in volume.voxels:
        content.update(np.ascontiguousarray(channel).data)
    return sealed(secret, "pixels", content.digest())


def mask_seal(labels: NDArray[np.uint8], secret: str) -> str:
    """Of the labels on their grid; empty where nothing is drawn."""
    if not labels.any():
        return ""
    content = hashlib.sha256(repr(labels.shape).encode())
    content.update(np.ascontiguousarray(labels).data)
    return sealed(secret, "mask", content.digest())


def sample(voxels: NDArray[np.float32], most: int = 1 << 20) -> NDArray[np.float32]:
    """At most about so many of the voxels [I, J, K], evenly spread."""
    step = max(1, round((voxels.size / most) ** (1 / max(1, sum(n > 1 for n in voxels.shape)))))
    return voxels[tuple(slice(None, None, step if n > step else 1) for n in voxels.shape)]


def clipped(volume: Volume, ct: bool) -> NDArray[np.float32]:
    """The first channel in 0 to 1: a fixed window for CT, else between its 1st and 99th percentile."""
    voxels = volume.voxels[0]
    low, high = CT_HU if ct else np.percentile(sample(voxels), (1, 99)).tolist()
    grey: NDArray[np.float32] = np.clip((voxels - np.float32(low)) / np.float32(max(high - low, 1e-6)), 0, 1)
    return grey


def shrunk(values: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """Means of the boxes that a grid of `shape` cuts the values into; boxes may cut through voxels.

    Where there are many voxels to a box, they are first averaged in whole ones, which is faster and hardly differs.
    """
    for axis, count in enumerate(shape):
        size = values.shape[axis]
        if size > 16 * count:
            edges = np.linspace(0, size, 8 * count + 1).astype(np.intp)
            sums = np.add.reduceat(values, edges[:-1], axis=axis, dtype=np.float32)
            wide = np.diff(edges).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
            values = np.asarray(sums / wide, np.float32)
            size = 8 * count
        upto = np.concatenate([np.zeros_like(values.take([0], axis)), np.cumsum(values, axis, dtype=np.float64)], axis)
        at = np.linspace(0, size, count + 1)
        low = np.minimum(np.floor(at).astype(np.intp), size - 1)
        part = (at - low).reshape([-1 if n == axis else 1 for n in range(values.ndim)])
        reached = upto.take(low, axis) * (1 - part) + upto.take(low + 1, axis) * part
        values = np.asarray(np.diff(reached, axis=axis) * (count / size), np.float32)
    return values


def bands(grey: NDArray[np.float32], secret: str) -> tuple[str | None, ...]:
    """HMACs of half rows of a difference hash: whether it grows brighter from box to box (Krawetz's dHash).

    Two images are alike where most of them agree; those whose grey values hardly change say nothing and are None.
    """
    layers = min(LAYERS, grey.shape[2])
    small = shrunk(grey, (EDGE + 1, EDGE, layers))
    steps = np.diff(small, axis=0).reshape(-1, BAND, EDGE, layers)
    told = (np.abs(steps) > FLAT).sum(axis=1) >= BAND // 4
    return tuple(
        sealed(secret, f"band {half} {j} {k}", np.packbits(steps[half, :, j, k] > FLAT).tobytes())[:12]
        if told[half, j, k]
        else None
        for k in range(layers)
        for j in range(EDGE)
        for half in range(EDGE // BAND)
    )


def projections(grey: NDArray[np.float32]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Means along K and, where there are planes enough, along J: 16 x 16 values of 0 to 255, first axis first.

    Each is cut to what is not background first, so that fields of view of unlike size can be compared.
    """
    axial = shrunk(_body(grey.mean(axis=2)), (EDGE, EDGE))
    enough = grey.shape[2] >= EDGE // 2
    coronal = shrunk(_body(grey.mean(axis=1)), (EDGE, EDGE)) if enough else np.zeros(0, np.float32)
    first, second = (np.rint(each * 255).astype(int).ravel().tolist() for each in (axial, coronal))
    return tuple(first), tuple(second)


def _body(view: NDArray[np.float32]) -> NDArray[np.float32]:
    """The box of [I, J] in which lines are brighter than a sixth of the way from the darkest to the brightest one."""
    ends = []
    for axis in (1, 0):
        lines = view.mean(axis=axis)
        inside = np.flatnonzero(lines >= lines.min() + np.ptp(lines) / 6)
        ends.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return view[ends[0], ends[1]]


def small_picture(grey: NDArray[np.float32], labels: NDArray[np.uint8] | None, displayed: bool) -> str:
    """A PNG in base64: the plane with most of the label, tinted there, or the middle one.

    Args:
        grey: float32[I, J, K] in 0 to 1.
        displayed: rows and columns are already as on a screen; a volume is turned as radiologists look at it.
    """
    plane = grey.shape[2] // 2
    mask = None
    if labels is not None:
        drawn = (labels > 0) & (labels != 127)
        counts = drawn.sum(axis=(0, 1))
        plane = int(counts.argmax()) if counts.any() else plane
        mask = drawn[:, :, plane]
    flat = grey[:, :, plane]
    if not displayed:
        flat, mask = flat.T[::-1, ::-1], None if mask is None else mask.T[::-1, ::-1]
    step = max(1, -(-max(flat.shape) // PICTURE_EDGE))
    flat, mask = flat[::step, ::step], None if mask is None else mask[::step, ::step]
    rgb = np.repeat(flat[..., None] * 255, 3, axis=2)
    if mask is not None and mask.any():
        rgb[mask] = 0.65 * rgb[mask] + 0.35 * TINT
    return base64.b64encode(png_bytes(np.rint(rgb).astype(np.uint8))).decode()
