"""LUNA16's tables: where nodules are, in LPS mm, and what they become on an image's grid.

annotations.csv holds the nodules of 3 mm and more that at least three of four readers accepted,
annotations_excluded.csv what counts neither way: smaller, doubtful, or no nodule. candidates_V2.csv, where detectors
found something, is not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclient.data.images import IGNORE
from fedclient.data.labels import Labels, indices, refused, renumber
from fedclient.data.tables import Line, each_row, read_table
from fedclient.data.volume import Volume

PLACE = ("coordX", "coordY", "coordZ")
UNMEASURED_MM = 10.0  # what the challenge's own evaluation takes for a negative diameter (its radius: 5 mm)
LEFT_LUNG, RIGHT_LUNG, TRACHEA = 3, 4, 5  # in seg-lungs-LUNA16; the lungs are the patient's


@dataclass(frozen=True, slots=True)
class Mark:
    """One row.

    Attributes:
        centre_lps_mm: x to the patient's left, y to the back, z to the head.
        diameter_mm: None for what nobody measured (negative in the file).
        label: what it is called where a table says so.
    """

    row: int
    series_uid: str = field(repr=False)
    centre_lps_mm: tuple[float, float, float]
    diameter_mm: float | None = None
    label: str = "nodule"


def read_annotations(path: Path) -> tuple[Mark, ...]:
    """annotations.csv: `seriesuid,coordX,coordY,coordZ,diameter_mm`.

    Raises:
        ManifestInvalid: see `read_table`; LABEL_VALUES, a place or a diameter that cannot be.
    """

    def parse(line: Line) -> Mark:
        diameter_mm = line.number_of("diameter_mm")
        if not 0 < diameter_mm < 200:
            raise line.wrong("diameter_mm", "is not above 0 and below 200 mm")
        return Mark(line.number, line.text("seriesuid"), _centre(line), diameter_mm)

    return each_row(read_table(path, "annotations.csv", ["seriesuid", *PLACE, "diameter_mm"]), parse)


def read_excluded(path: Path) -> tuple[Mark, ...]:
    """annotations_excluded.csv: as annotations.csv, with negative diameters for what nobody measured.

    Raises:
        ManifestInvalid: as `read_annotations`.
    """

    def parse(line: Line) -> Mark:
        diameter_mm = line.number_of("diameter_mm")
        return Mark(line.number, line.text("seriesuid"), _centre(line), diameter_mm if diameter_mm > 0 else None)

    return each_row(read_table(path, "annotations_excluded.csv", ["seriesuid", *PLACE, "diameter_mm"]), parse)


def mark_indices(marks: Sequence[Mark], like: Volume) -> NDArray[np.float64]:
    """float64[n, 3]: the centres in index coordinates of the image, whatever its directions.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, a centre outside the image.
    """
    if not marks:
        return np.zeros((0, 3))
    found = indices(np.array([mark.centre_lps_mm for mark in marks]), like.affine_ras)
    outside = np.any((found < -0.5) | (found > np.array(like.voxels.shape[1:]) - 0.5), axis=1)
    rows = [marks[n].row for n in np.flatnonzero(outside).tolist()]
    if rows:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH",
            f"{len(rows)} marks of the series (first: row {rows[0]}) lie outside its image. Are they of this series, "
            f"and does its header hold the true directions?",
        )
    return found


def spheres(nodules: Sequence[Mark], like: Volume, *, value: int = 1, excluded: Sequence[Mark] = ()) -> Labels:
    """uint8[I, J, K]: balls around the nodules, and balls to leave out (127) around the excluded marks.

    The voxels whose centres are within the radius, and the nearest one in any case; nodules win. A ball is no
    outline: train detection on it, not measurement.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, a centre outside the image.
    """
    labels = np.zeros(like.voxels.shape[1:], np.uint8)
    for marks, painted in ((excluded, IGNORE), (nodules, value)):
        for mark, centre in zip(marks, mark_indices(marks, like), strict=True):
            _ball(labels, centre, (mark.diameter_mm or UNMEASURED_MM) / 2, like, painted)
    return labels


def lungs(stored: Labels, values: Mapping[int, int]) -> Labels:
    """seg-lungs-LUNA16's labels as the study's: `{LEFT_LUNG: 1, RIGHT_LUNG: 1, TRACHEA: 0}` makes lung of both.

    Raises:
        ImageUnreadable: LABEL_VALUES, a value that `values` does not name.
    """
    return renumber(stored, values)


def _ball(labels: Labels, centre: NDArray[np.float64], radius_mm: float, like: Volume, value: int) -> None:
    steps = like.affine_ras[:3, :3]
    reach = radius_mm * np.linalg.norm(np.linalg.inv(steps), axis=1)  # of the ball along each index axis
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, labels.shape).astype(int)
    box = tuple(slice(b, e) for b, e in zip(low, high, strict=True))
    away = np.stack(np.meshgrid(*(np.arange(b, e) for b, e in zip(low, high, strict=True)), indexing="ij"), axis=-1)
    labels[box][np.linalg.norm((away - centre) @ steps.T, axis=-1) <= radius_mm] = value
    i, j, k = np.rint(centre).astype(int).clip(0, np.array(labels.shape) - 1)
    labels[i, j, k] = value


def _centre(line: Line) -> tuple[float, float, float]:
    x, y, z = (line.number_of(column) for column in PLACE)
    return x, y, z
