"""Boxes around findings, as rows of a table, and where they lie in their image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedclient.data.labels import refused
from fedclient.data.tables import Line
from fedclient.data.volume import Volume

EDGES = ("x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the stored image, x along columns, y down the rows, from the top left corner.

    Attributes:
        row: of the table.
        labels: what it holds; several where the table says `a|b`.
    """

    row: int
    labels: tuple[str, ...]
    x_min: float
    y_min: float
    x_max: float
    y_max: float


def box_indices(boxes: Sequence[Box], like: Volume, slice_number: int = 0) -> NDArray[np.float64]:
    """float64[n, 2, 3]: lowest and highest corner of each box in index coordinates of its image.

    A voxel reaches half an index to both sides; across the slice a box is as thick as the slice.

    Args:
        slice_number: in the order of the image's `voxel_of_pixel`; 0 for pictures.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, a box beyond its image, or an image that knows no rows and columns.
    """
    turn = _turn(like)
    columns, rows = (int(n) for n in np.abs(turn[:3, :2]).T @ np.array(like.voxels.shape[1:]))
    outside = [box.row for box in boxes if box.x_max > columns or box.y_max > rows]
    if outside:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH",
            f"{len(outside)} boxes (first: row {outside[0]}) reach beyond the {columns} x {rows} pixels of their "
            f"image. Was it scaled after they were drawn? Export both at one size.",
        )
    flat = [
        [(b.x_min - 0.5, b.y_min - 0.5, slice_number - 0.5, 1), (b.x_max - 0.5, b.y_max - 0.5, slice_number + 0.5, 1)]
        for b in boxes
    ]
    corners = np.array(flat, np.float64).reshape(-1, 2, 4) @ turn.T
    return np.sort(corners[:, :, :3], axis=1)


def across_one_slice(like: Volume) -> int:
    """The axis of I, J, K that leads from slice to slice, of an image that has one slice.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, an image of several slices, or that knows no rows and columns.
    """
    across = np.abs(_turn(like)[:3, 2])
    slices = round(float(across @ np.array(like.voxels.shape[1:])))
    if slices > 1:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH",
            f"boxes lie on one picture, and the image has {slices} slices: nobody knows on which. Tell lesions by "
            f"nodules.csv or a mask, or give each slice with boxes as an image of its own.",
        )
    return int(across.argmax())


def _turn(like: Volume) -> NDArray[np.float64]:
    if like.voxel_of_pixel is None:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH", "boxes in pixels fit pictures and DICOM only. Give the image that they are of."
        )
    return like.voxel_of_pixel


def box_of(line: Line) -> Box | None:
    """The box of a row, None if its edges and label are empty.

    Raises:
        ManifestInvalid: LABEL_VALUES.
    """
    if not any(line.values[column] for column in (*EDGES, "label")):
        return None
    named = tuple(dict.fromkeys(part.strip() for part in line.text("label").split("|")))
    left, top, right, bottom = (line.number_of(column) for column in EDGES)
    if min(left, top) < 0:
        raise line.wrong("x_min" if left < 0 else "y_min", "is below 0")
    if right <= left or bottom <= top:
        raise line.wrong("x_max" if right <= left else "y_max", "is not above its minimum")
    return Box(line.number, named, left, top, right, bottom)
