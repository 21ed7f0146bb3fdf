"""RTSTRUCT as labels: closed planar contours, counted plane by plane, so that holes and keyholes come out right."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from fedclient.data.labels import Labels, Mapped, Overlap, Structure, choose, indices, paint, refused
from fedclient.data.objects import Referenced, opened, references
from fedclient.data.polygons import enclosed
from fedclient.data.volume import ON_GRID, Volume
from shared_models.errors import ImageUnreadable

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
WHAT = "RTSTRUCT"


def read_regions(path: Path) -> tuple[Referenced, tuple[Structure, ...]]:
    """The series that an RTSTRUCT was drawn on, and its regions of interest: what a mapping can name."""
    with opened(path, WHAT, (STRUCTURE_SET,)) as data:
        return references(data), _regions(data)


def read_rtstruct(
    path: Path, like: Volume, mapping: Mapped, *, overlap: Overlap = "refuse", empty_ok: bool = False
) -> Labels:
    """uint8[I, J, K]: the voxels whose centres lie inside an odd number of a region's contours on their plane.

    Args:
        mapping: `{name or number of a region: label value}`; two regions of one name are refused, as nobody knows
            which is the later version.
        overlap: whose a voxel of two regions is: nobody's (an error), or that of the first or last in the mapping.
        empty_ok: a region that the file lacks, or that has no voxel, is an organ that the patient lacks.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, LABEL_GEOMETRY_MISMATCH, LABEL_VALUES, LABEL_EMPTY.
    """
    with opened(path, WHAT, (STRUCTURE_SET,)) as data:
        chosen = choose(_regions(data), mapping, empty_ok)
        if any(len(numbers) > 1 for _, numbers in chosen):
            raise refused("LABEL_VALUES", f"{WHAT}: two regions bear one name of the mapping. Use their numbers.")
        shape = like.voxels.shape[1:]
        return paint(_masks(data, chosen, like), shape, overlap, empty_ok)


def _regions(data: Dataset) -> tuple[Structure, ...]:
    return tuple(Structure(int(i.ROINumber), str(i.get("ROIName") or "")) for i in data.StructureSetROISequence)


def _masks(
    data: Dataset, chosen: Sequence[tuple[int, tuple[int, ...]]], like: Volume
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    drawn = {int(i.ReferencedROINumber): i.get("ContourSequence") or () for i in data.get("ROIContourSequence") or ()}
    for value, numbers in chosen:
        contours = [_corners(item, like) for number in numbers for item in drawn.get(number, ())]
        yield value, _filled(contours, like.voxels.shape[1:])


def _corners(item: Dataset, like: Volume) -> NDArray[np.float64]:
    """float64[n, 3]: a contour in index coordinates of the image."""
    kind = item.get("ContourGeometricType")
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        raise refused(
            "LABEL_VALUES", f"{WHAT}: a contour is {kind}; only CLOSED_PLANAR ones enclose anything. Draw it closed."
        )
    stored = item.get_item("ContourData").value  # as bytes: pydicom would make an object of each of a million numbers
    numbers = stored.rstrip(b" \0").split(b"\\") if isinstance(stored, bytes) else stored
    points = np.array(numbers).astype(np.float64).reshape(-1, 3)
    if not np.isfinite(points).all():
        raise refused("LABEL_UNREADABLE", f"{WHAT}: a contour has corners that are no numbers. Export it again.")
    return indices(points, like.affine_ras)


def _filled(contours: Sequence[NDArray[np.float64]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, np.bool_)
    if not contours:
        return mask
    across = _normal(contours)
    planes: dict[int, list[NDArray[np.float64]]] = {}
    for corners in contours:
        height = float(corners[:, across].mean())
        plane = round(height)
        if np.abs(corners[:, across] - plane).max() > ON_GRID:
            raise _off(f"a contour lies {abs(height - plane):.2g} planes beside the image's")
        within = np.delete(corners, across, axis=1)
        inside = (within.min(axis=0) >= -1).all() and (within.max(axis=0) <= np.delete(shape, across)).all()
        if not (0 <= plane < shape[across] and inside):
            raise _off("a contour lies outside the image")
        planes.setdefault(plane, []).append(within)
    stack = np.moveaxis(mask, across, 0)
    for plane, outlines in planes.items():
        stack[plane] = enclosed(outlines, (stack.shape[1], stack.shape[2]))
    skipped = _skipped(stack, sorted(planes))
    if len(skipped) > 1:  # one may lie between two bodies, one above the other
        raise _off(
            f"over {len(skipped)} stretches there are contours on one of {min(skipped)} planes at most, so those "
            f"between would count as background until they are drawn or interpolated, or each body is a region of its "
            f"own"
        )
    return mask


def _skipped(stack: NDArray[np.bool_], drawn: Sequence[int]) -> list[int]:
    """The steps over planes without an outline where a structure is likely to go on: its outlines on both sides
    overlap, as those of islands seldom do, or all steps are alike."""
    steps = [(b - a, bool((stack[a] & stack[b]).any())) for a, b in pairwise(drawn)]
    alike = len({step for step, _ in steps}) == 1
    return [step for step, over in steps if step > 1 and (over or alike)]


def _normal(contours: Sequence[NDArray[np.float64]]) -> int:
    """The axis that all contours stand across; the last where several would do."""
    depth = np.max([np.ptp(corners, axis=0) for corners in contours], axis=0)
    flat = np.flatnonzero(depth <= 2 * ON_GRID)
    if not flat.size:
        raise _off("contours run askew to its planes")
    return int(flat[-1])


def _off(how: str) -> ImageUnreadable:
    return refused(
        "LABEL_GEOMETRY_MISMATCH",
        f"the contours do not lie in the image's planes: {how}. Export them on the series that they were drawn on.",
    )
