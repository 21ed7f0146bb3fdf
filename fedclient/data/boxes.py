"""Boxes around findings: a CSV table of many images, or an XML file in PASCAL VOC's form beside each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray

from fedclient.data.labels import refused
from fedclient.data.safe_xml import read_xml
from fedclient.data.tables import Line, each_row, read_table
from fedclient.data.volume import Volume
from shared_models.errors import ManifestInvalid

EDGES = ("x_min", "y_min", "x_max", "y_max")
VOC = "box XML"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the stored image, x along columns, y down the rows, from the top left corner.

    Attributes:
        row: of the table; the number of the object in an XML file.
        labels: what it holds; several where the table says `a|b`.
    """

    row: int
    labels: tuple[str, ...]
    x_min: float
    y_min: float
    x_max: float
    y_max: float


@dataclass(frozen=True, slots=True)
class Boxed:
    """One image of a box table; without boxes, somebody looked and found nothing."""

    image: str = field(repr=False)
    boxes: tuple[Box, ...]


def read_boxes(path: Path, labels: Sequence[str]) -> tuple[Boxed, ...]:
    """`image,x_min,y_min,x_max,y_max,label`: a row for each box, or one with these empty for an image without.

    Args:
        labels: those that may occur.

    Raises:
        ManifestInvalid: LABEL_UNREADABLE, see `read_table`; LABEL_VALUES, an unknown label, edges that are no numbers,
            below 0 or the wrong way round, or an image both with boxes and without.
    """
    lines = read_table(path, "box table", ["image", *EDGES, "label"])
    parsed = each_row(lines, lambda line: (line.text("image"), box_of(line, labels)))
    found: dict[str, list[Box]] = {}
    bare: dict[str, int] = {}
    for line, (image, box) in zip(lines, parsed, strict=True):
        boxes = found.setdefault(image, [])
        if box is None:
            bare[image] = line.number
        else:
            boxes.append(box)
    torn = [row for image, row in bare.items() if found[image]]
    if torn:
        raise ManifestInvalid(
            f"box table: row {torn[0]} says that an image has no box, another row gives it one. Remove one of them.",
            code="LABEL_VALUES",
        )
    return tuple(Boxed(image, tuple(boxes)) for image, boxes in found.items())


def read_voc(path: Path, labels: Sequence[str]) -> tuple[Box, ...]:
    """The boxes of one image from `<annotation><object><name/><bndbox>...`, as Lung-PET-CT-Dx has them.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, no such XML; LABEL_VALUES, an unknown label, or edges that cannot be.
    """
    root = read_xml(path, VOC)
    if root.tag != "annotation":
        raise refused("LABEL_UNREADABLE", f"{VOC}: the file is XML of another kind. Choose PASCAL VOC's.")
    boxes: list[Box] = []
    for number, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        edges = _edges(element)
        if name not in labels or edges is None:
            raise refused(
                "LABEL_VALUES",
                f"{VOC}: object {number} has a label that is none of {', '.join(labels)}, or edges that cannot be. "
                f"Mend it, or add its label to the study.",
            )
        boxes.append(Box(number, (name,), *edges))
    return tuple(boxes)


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


def box_of(line: Line, labels: Sequence[str] | None = None) -> Box | None:
    """The box of a row, None if its edges and label are empty; of any label where none are given.

    Raises:
        ManifestInvalid: LABEL_VALUES.
    """
    if not any(line.values[column] for column in (*EDGES, "label")):
        return None
    named = tuple(dict.fromkeys(part.strip() for part in line.text("label").split("|")))
    if labels is not None and not set(named) <= set(labels):
        raise line.wrong("label", f"is none that the study knows ({', '.join(labels)})")
    left, top, right, bottom = (line.number_of(column) for column in EDGES)
    if min(left, top) < 0:
        raise line.wrong("x_min" if left < 0 else "y_min", "is below 0")
    if right <= left or bottom <= top:
        raise line.wrong("x_max" if right <= left else "y_max", "is not above its minimum")
    return Box(line.number, named, left, top, right, bottom)


def _edges(element: Element) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom; None if they are no box."""
    try:
        left, top, right, bottom = (
            float(element.findtext(f"bndbox/{edge}") or "") for edge in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    return (left, top, right, bottom) if 0 <= left < right < 1e9 and 0 <= top < bottom < 1e9 else None
