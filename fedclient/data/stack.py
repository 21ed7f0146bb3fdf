"""Slices into a grid: their order and distance from where they lie in the patient, and from nothing else.

File names, instance numbers and slice locations say what somebody meant; orientation and position say where the
pixels were (DICOM PS3.3 C.7.6.2.1.1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedclient.data.volume import LPS_TO_RAS
from shared_models.errors import ImageUnreadable

TOLERANCE = 0.01  # of the distance of slices
TOLERANCE_MM = 0.01
ROUNDING_MM = 0.02 + 1e-4  # a distance and the usual one, of positions written to 0.01 mm, and as float32
SIDEWAYS_MM = 0.1  # from a slice to the next
TILT_DEG = 1.0
COSINES = 1e-3  # of two orientations that are one, and of a right angle


@dataclass(frozen=True, slots=True)
class Plane:
    """Where one slice lies.

    Attributes:
        position_mm: centre of its first pixel, LPS.
        along_row, along_column: unit vectors, LPS; in the direction of growing columns, and of growing rows.
        spacing_mm: between its rows, and between its columns.
    """

    position_mm: tuple[float, ...]
    along_row: tuple[float, ...]
    along_column: tuple[float, ...]
    spacing_mm: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Slice:
    """One file of a series; the identifiers are for matching labels, not for logs.

    Attributes:
        where: None for an image without a place in the patient (radiographs), or of several frames.
    """

    path: Path = field(repr=False)
    sop_uid: str = field(repr=False)
    instance_number: int | None
    where: Plane | None


@dataclass(frozen=True, slots=True)
class Series:
    """Slices that make one image, along their normal where they have one.

    Attributes:
        frames: above 1 for one file that holds them all.
        patient: PatientID in capitals; `study_uid` and it are for splits, not for logs.
        image_type: in capitals (`ORIGINAL`, `PRIMARY`, `AXIAL`).
        sop_class: UID of the kind of image.
        siblings: how many other images of slices have its UID: of another kind, patient, orientation or take.
    """

    uid: str = field(repr=False)
    modality: str | None
    rows: int
    columns: int
    frames: int
    slices: tuple[Slice, ...]
    patient: str = field(repr=False, default="")
    study_uid: str = field(repr=False, default="")
    image_type: tuple[str, ...] = field(repr=False, default=())
    sop_class: str = field(repr=False, default="")
    siblings: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(each.path for each in self.slices)


@dataclass(frozen=True, slots=True)
class Grid:
    """Slices put in order.

    Attributes:
        order: indices of the planes along their normal.
        affine_ras: float64[4, 4]; (column, row, place in the order, 1) -> mm.
    """

    order: tuple[int, ...]
    affine_ras: NDArray[np.float64]


def plane(
    position_mm: tuple[float, ...] | None,
    cosines: tuple[float, ...] | None,
    spacing_mm: tuple[float, ...] | None,
) -> Plane:
    """The plane of ImagePositionPatient, ImageOrientationPatient and PixelSpacing.

    Raises:
        ImageUnreadable: GEOMETRY_MISSING where one of them is absent; GEOMETRY_INVALID where they make no plane.
    """
    named = {"ImagePositionPatient": position_mm, "ImageOrientationPatient": cosines, "PixelSpacing": spacing_mm}
    missing = [name for name, value in named.items() if value is None]
    if position_mm is None or cosines is None or spacing_mm is None:
        raise ImageUnreadable(
            f"DICOM: a slice lacks {' and '.join(missing)}, so nobody knows where or how large it is. "
            f"Export the series from the PACS again, unconverted.",
            code="GEOMETRY_MISSING",
        )
    row, column = cosines[:3], cosines[3:]
    long, high, across = math.hypot(*row), math.hypot(*column), sum(map(mul, row, column))
    if max(abs(long - 1), abs(high - 1), abs(across)) > COSINES:
        angle = math.degrees(math.acos(max(-1.0, min(1.0, across / max(long * high, 1e-9)))))
        raise ImageUnreadable(
            f"DICOM: rows and columns of a slice are no unit vectors at a right angle (lengths {long:.3f} and "
            f"{high:.3f}, {angle:.1f} degrees). Export it again.",
            code="GEOMETRY_INVALID",
        )
    if min(spacing_mm) <= 0:
        raise ImageUnreadable("DICOM: a PixelSpacing is not above 0. Export it again.", code="GEOMETRY_INVALID")
    return Plane(position_mm, cosines[:3], cosines[3:], (spacing_mm[0], spacing_mm[1]))


def parallel(a: Plane, b: Plane) -> bool:
    """Whether two slices have one orientation and one pixel size."""
    ours, theirs = a.along_row + a.along_column, b.along_row + b.along_column
    same_size = all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(a.spacing_mm, b.spacing_mm, strict=True))
    return same_size and all(abs(x - y) <= COSINES for x, y in zip(ours, theirs, strict=True))


def along_normal(planes: Sequence[Plane]) -> NDArray[np.float64]:
    """Position of each plane along the normal of the first, in mm."""
    positions = np.array([each.position_mm for each in planes])
    heights: NDArray[np.float64] = positions @ np.cross(planes[0].along_row, planes[0].along_column)
    return heights


def stack(planes: Sequence[Plane], thickness_mm: float) -> Grid:
    """The grid of slices that lie one behind the other at equal distances.

    Up to 1 degree between their normal and the way from the first to the last, the affine takes that way as it is.

    Args:
        thickness_mm: stands in for the distance where there is one slice only.

    Raises:
        ImageUnreadable: SERIES_MIXED, SERIES_DUPLICATE, SERIES_TILT, SERIES_GAP or SERIES_IRREGULAR.
    """
    first = planes[0]
    if not all(parallel(first, each) for each in planes[1:]):
        raise ImageUnreadable(
            "DICOM: slices of more than one orientation or pixel size. Give each stack as a series of its own.",
            code="SERIES_MIXED",
        )
    heights = along_normal(planes)
    order = np.argsort(heights, kind="stable")
    normal = np.cross(first.along_row, first.along_column)
    start = np.array(planes[order[0]].position_mm)
    step = normal * thickness_mm
    if len(planes) > 1:
        steps = np.diff(np.array([planes[n].position_mm for n in order]), axis=0)
        _check_distances(np.diff(heights[order]), steps, normal)
        step = steps.mean(axis=0)
    affine_lps = np.eye(4)
    affine_lps[:3, 0] = np.array(first.along_row) * first.spacing_mm[1]
    affine_lps[:3, 1] = np.array(first.along_column) * first.spacing_mm[0]
    affine_lps[:3, 2] = step
    affine_lps[:3, 3] = start
    return Grid(tuple(int(n) for n in order), LPS_TO_RAS @ affine_lps)


def even(apart_mm: NDArray[np.float64]) -> bool:
    """Whether the distances of slices are equal but for how positions are written."""
    usual_mm = float(np.median(apart_mm))
    rounding_mm = min(ROUNDING_MM, usual_mm / 4)  # so that of the thinnest slices a gap is one
    return bool(np.abs(apart_mm - usual_mm).max() <= max(TOLERANCE_MM, TOLERANCE * usual_mm, rounding_mm))


def _check_distances(apart_mm: NDArray[np.float64], steps: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    """`apart_mm` float64[N - 1] along the normal, `steps` float64[N - 1, 3] from slice to slice."""
    doubled = int((apart_mm < TOLERANCE_MM).sum())
    if doubled:
        raise ImageUnreadable(
            f"DICOM: {doubled} of {len(apart_mm) + 1} slices lie where another one lies: copies, or several time "
            f"points, echoes or reconstructions in one series. Export them as series of their own.",
            code="SERIES_DUPLICATE",
        )
    sideways = steps - np.outer(apart_mm, normal)
    drift_mm = float(np.linalg.norm(sideways.mean(axis=0)))
    tilt_deg = math.degrees(math.atan2(drift_mm, float(apart_mm.mean())))
    if tilt_deg > TILT_DEG or drift_mm > SIDEWAYS_MM:
        raise ImageUnreadable(
            f"DICOM: the gantry was tilted: the stack leans by {tilt_deg:.1f} degrees. Straighten it before training, "
            f"e.g. with dcm2niix (its file that ends in _Tilt), and give the NIfTI file instead.",
            code="SERIES_TILT",
        )
    jump_mm = float(np.linalg.norm(sideways, axis=1).max())
    if jump_mm > SIDEWAYS_MM:
        raise ImageUnreadable(
            f"DICOM: slices are shifted sideways against each other by up to {jump_mm:.2f} mm. Export it again.",
            code="SERIES_IRREGULAR",
        )
    if even(apart_mm):
        return
    multiples = apart_mm / apart_mm.min()
    whole = np.round(multiples)
    if np.abs(multiples - whole).max() < 0.05 * whole.max() ** 0.5 and whole.max() > 1:
        missing = int((whole - 1).sum())
        raise ImageUnreadable(
            f"DICOM: {missing} slices are missing between {len(apart_mm) + 1} that are there ({apart_mm.min():.3g} mm "
            f"apart, up to {apart_mm.max():.4g} mm at a gap). Export the series again, whole.",
            code="SERIES_GAP",
        )
    raise ImageUnreadable(
        f"DICOM: the distance of slices varies from {apart_mm.min():.4g} to {apart_mm.max():.4g} mm, by more than 1 % "
        f"and {ROUNDING_MM:.2f} mm. Export the reconstruction with equal distances.",
        code="SERIES_IRREGULAR",
    )
