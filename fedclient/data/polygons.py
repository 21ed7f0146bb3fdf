"""Which pixels lie inside drawn outlines."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def enclosed(outlines: Iterable[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """bool[shape]: the pixels whose centres lie inside an odd number of outlines.

    Holes and keyholes come out right by counting. A centre that lies exactly on an outline belongs to the side of
    the larger index, so that two outlines that share an edge never claim a pixel twice.

    Args:
        outlines: float[n, 2] each, finite; corners in index coordinates of the two axes, (0, 0) the centre of the
            first pixel. The last corner joins the first. What lies beyond the shape is cut off.
    """
    crossings = np.zeros((shape[0], shape[1] + 1), np.uint8)
    for corners in outlines:
        here, there = corners, np.roll(corners, -1, axis=0)
        ends = np.ceil(np.sort(np.stack([here[:, 0], there[:, 0]]), axis=0)).clip(0, shape[0]).astype(np.intp)
        lines = ends[1] - ends[0]  # that each edge crosses; none if it runs along them
        edge = np.repeat(np.arange(len(corners)), lines)
        line = np.arange(len(edge)) - np.repeat(np.cumsum(lines) - lines, lines) + ends[0][edge]
        share = (line - here[edge, 0]) / (there[edge, 0] - here[edge, 0])
        met = here[edge, 1] + share * (there[edge, 1] - here[edge, 1])
        np.bitwise_xor.at(crossings, (line, np.ceil(met).clip(0, shape[1]).astype(np.intp)), 1)
    return np.bitwise_xor.accumulate(crossings, axis=1)[:, :-1].astype(np.bool_)
