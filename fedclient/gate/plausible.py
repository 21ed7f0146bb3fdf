"""Whether labels lie where their image says: on its edges rather than on their mirror image, and left on the left.

A mask whose header was mirrored lies on the very grid of its image, so that no comparison of geometry finds it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedclient.data.volume import Volume

REACH, OF_EDGE = 2, 64  # voxels from a border, on either side, where grey values are compared; or that part of an edge
FEWEST, MOST = 60, 200_000  # places along a border: fewer say nothing, more are thinned out
CLEARLY, CONTRAST = 1.3, 0.12  # how many times more contrast a mirrored mask has, and how much of 0 to 1 in all
AXES = ("left to right", "front to back", "head to feet")
FILM = ("top to bottom", "left to right")


def misplaced(grey: NDArray[np.float32], labels: NDArray[np.uint8], value: int, picture: bool) -> str:
    """Which way the mask of one label must be mirrored to lie on edges of the image; empty where it lies well as it is.

    Args:
        grey: float32[I, J, K] in 0 to 1.
        picture: I and J are rows and columns as displayed.
    """
    inner, outer = _border(labels == value)
    if len(inner) < FEWEST:
        return ""
    here = _contrast(grey, inner, outer, None)
    names = FILM if picture else AXES
    found = {axis: _contrast(grey, inner, outer, axis) for axis in range(len(names)) if grey.shape[axis] > 1}
    best = max(found, key=lambda axis: found[axis], default=0)
    if found and found[best] >= CONTRAST and found[best] >= CLEARLY * here:
        return names[best]
    return ""


def exchanged(volume: Volume, labels: NDArray[np.uint8], names: Sequence[str]) -> Iterator[str]:
    """Pairs of labels (`left-lung`, `right-lung`) of which the left one lies further to the patient's right."""
    for value, name in enumerate(names, start=1):
        partner = f"right-{name[5:]}"
        if not name.startswith("left-") or partner not in names:
            continue
        left, right = (_middle_mm(volume, labels == n) for n in (value, names.index(partner) + 1))
        if left is not None and right is not None and left > right:
            yield name[5:]


def _middle_mm(volume: Volume, mask: NDArray[np.bool_]) -> float | None:
    """Towards the patient's right."""
    counts = [mask.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    total = int(counts[0].sum())
    if total == 0:
        return None
    middle = [float((np.arange(len(each)) * each).sum()) / total for each in counts]
    return float(volume.affine_ras[0] @ [*middle, 1.0])


def _border(mask: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices [N, 3] just inside and just outside of the mask, across its border along I or J."""
    inner: list[NDArray[np.intp]] = []
    outer: list[NDArray[np.intp]] = []
    for axis in (0, 1):
        low, high = (mask.take(range(*ends), axis) for ends in ((0, mask.shape[axis] - 1), (1, mask.shape[axis])))
        reach = max(REACH, mask.shape[axis] // OF_EDGE)
        at = np.argwhere(low != high)
        at = at[:: -(-len(at) // MOST) or 1]
        begins = low[tuple(at.T)]  # the mask ends between here and the next
        for side, ends in ((inner, begins), (outer, ~begins)):
            moved = at.copy()
            moved[:, axis] += np.where(ends, 1 - reach, reach)
            side.append(moved)
    size = np.array(mask.shape)
    first, second = np.concatenate(inner), np.concatenate(outer)
    inside = ((first >= 0) & (first < size) & (second >= 0) & (second < size)).all(axis=1)
    return first[inside], second[inside]


def _contrast(grey: NDArray[np.float32], inner: NDArray[np.intp], outer: NDArray[np.intp], axis: int | None) -> float:
    """Mean difference of grey values across the border; of the border mirrored along an axis, if one is given."""

    def seen(at: NDArray[np.intp]) -> NDArray[np.float32]:
        where = [at[:, n] if n != axis else grey.shape[n] - 1 - at[:, n] for n in range(3)]
        values: NDArray[np.float32] = grey[tuple(where)]
        return values

    return abs(float((seen(inner) - seen(outer)).mean(dtype=np.float64)))
