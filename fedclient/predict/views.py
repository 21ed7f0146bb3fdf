"""Planes as they are displayed: from the grid of a volume to the rows and columns of its slices."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.predict.blocks import Grid

# as radiologists look at an axial plane in RAS+: columns run to the patient's left, rows to the back
AXIAL = np.array([[-1, 0, 0], [0, -1, 0], [0, 0, 1]])


def shown(plane: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """A plane across K, [..., I, J], as it is displayed, [..., rows, columns]."""
    turn = AXIAL if grid.voxel_of_pixel is None or not grid.slices_along_k else grid.voxel_of_pixel[:3, :3]
    if turn[0, 0]:  # columns run along I
        by_column, by_row, rows_first = turn[0, 0], turn[1, 1], np.swapaxes(plane, -1, -2)
    else:
        by_column, by_row, rows_first = turn[1, 0], turn[0, 1], plane
    return rows_first[..., :: int(by_row), :: int(by_column)]


def pixel_mm(grid: Grid) -> tuple[float, float]:
    """Distance of rows and of columns of a plane as it is displayed."""
    i, j, _ = grid.spacing_mm
    turn = AXIAL if grid.voxel_of_pixel is None or not grid.slices_along_k else grid.voxel_of_pixel[:3, :3]
    return (j, i) if turn[0, 0] else (i, j)


def slice_order(grid: Grid) -> range:
    """Planes k in the order of the slices as they are stored, where a plane is one; else from the first to the last."""
    backwards = grid.slices_along_k and grid.voxel_of_pixel is not None and grid.voxel_of_pixel[2, 2] < 0
    return range(grid.shape[2])[:: -1 if backwards else 1]


def frames(planes: Iterable[NDArray[np.bool_]], grid: Grid) -> Iterator[NDArray[np.bool_]]:
    """bool[S, rows, columns] of each slice as it is stored, along DICOM's normal.

    Where slices lie across another axis than K all planes are put together first.

    Args:
        planes: bool[S, I, J] of each plane, in `slice_order`.
    """
    assert grid.voxel_of_pixel is not None
    if grid.slices_along_k:
        for plane in planes:
            yield shown(plane, grid)
        return
    turn = grid.voxel_of_pixel[:3, :3]
    axes = [int(np.abs(turn[:, n]).argmax()) for n in (2, 1, 0)]  # of slices, rows, columns
    flips = [int(turn[axis, n]) for axis, n in zip(axes, (2, 1, 0), strict=True)]
    turned = np.stack(list(planes), axis=3).transpose(0, *(1 + axis for axis in axes))
    yield from np.moveaxis(turned[:, :: flips[0], :: flips[1], :: flips[2]], 1, 0)
