"""Four readers into one label: whose outlines mean the same nodule, and where half of them see it.

Everything happens on the stored slices, in columns and rows as the readers' workstation showed them; only the last
step turns the result onto the image's grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from fedclient.data.labels import Labels, place, refused
from fedclient.data.lidc import READERS, WHAT, Nodule, Outline, Reads
from fedclient.data.polygons import enclosed
from fedclient.data.stack import Series
from fedclient.data.volume import Volume

Verdict = Literal["benign", "indeterminate", "malignant", "unrated"]
ALL_NODULES: Mapping[Verdict, int] = {"benign": 1, "indeterminate": 1, "malignant": 1, "unrated": 1}
INDETERMINATE = 3
SHRINK, LEAST_MM = 0.9, 0.1  # of the tolerance, while more outlines than readers hang together


@dataclass(frozen=True, slots=True)
class StoredSeries:
    """One CT series as it is stored, for marks that name its slices.

    Attributes:
        sop_uids, z_mm: of each slice, by ImagePositionPatient: its third number, in mm.
        columns, rows: of each slice.
        affine_ras: float64[4, 4]; (column, row, position in `sop_uids`, 1) -> mm, RAS+.
        thickness_mm: how far outlines of one nodule may be apart.
    """

    series_uid: str = field(repr=False)
    sop_uids: tuple[str, ...] = field(repr=False)
    z_mm: tuple[float, ...]
    columns: int
    rows: int
    affine_ras: NDArray[np.float64]
    thickness_mm: float


@dataclass(frozen=True, slots=True)
class Lesion:
    """One nodule as all readers of the series see it.

    Attributes:
        origin: column, row and slice of the first voxel of `votes`.
        votes: uint8[columns, rows, slices]; readers who count the voxel in.
        marked: readers who drew it; present: readers who read the series.
        scores: of each outline, in no particular order.
    """

    origin: tuple[int, int, int]
    votes: NDArray[np.uint8]
    marked: int
    present: int
    scores: tuple[dict[str, int], ...]

    @property
    def malignancy(self) -> float | None:
        """Median of the readers' scores, 1 (surely benign) to 5; None if nobody gave one."""
        given = [scores["malignancy"] for scores in self.scores if "malignancy" in scores]
        return float(np.median(given)) if given else None

    @property
    def verdict(self) -> Verdict:
        score = self.malignancy
        if score is None:
            return "unrated"
        return "indeterminate" if score == INDETERMINATE else "malignant" if score > INDETERMINATE else "benign"

    @property
    def agreed(self) -> NDArray[np.bool_]:
        """Voxels that at least half of the readers present count in."""
        return (self.votes > 0) & (self.votes >= 0.5 * self.present)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A reader's nodule as voxels, and its outlines' points in mm, float64[n, 3]."""

    nodule: Nodule
    origin: NDArray[np.intp]
    voxels: NDArray[np.bool_]
    edge_mm: NDArray[np.float64]


def stored_series(series: Series, volume: Volume) -> StoredSeries:
    """What a series that was found in a folder, and the volume that was read from it, say about its slices."""
    if volume.voxel_of_pixel is None or any(each.where is None for each in series.slices):
        raise refused("LABEL_GEOMETRY_MISMATCH", f"{WHAT}: its image is no series of DICOM slices. Give that series.")
    return StoredSeries(
        series_uid=series.uid,
        sop_uids=tuple(each.sop_uid for each in series.slices),
        z_mm=tuple(each.where.position_mm[2] for each in series.slices if each.where is not None),
        columns=series.columns,
        rows=series.rows,
        affine_ras=volume.affine_ras @ volume.voxel_of_pixel,
        thickness_mm=volume.provenance.slice_thickness_mm or volume.spacing_mm[2],
    )


def lesions(reads: Reads, series: StoredSeries) -> tuple[Lesion, ...]:
    """Outlines of different readers joined into lesions: those nearer than a slice's thickness are one.

    While a lesion has more outlines than there are readers, the tolerance shrinks by a tenth, for all.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, marks of another series, or on slices that this one has not.
    """
    if reads.series_uid != series.series_uid:
        raise refused("LABEL_GEOMETRY_MISMATCH", f"{WHAT}: it was drawn on another series. Join them by the UID in it.")
    drawn = [_drawn(nodule, slices, series) for nodule, slices in _found(reads, series)]
    groups = _groups([each.edge_mm for each in drawn], series.thickness_mm)
    return tuple(_lesion([drawn[n] for n in group], reads.readers) for group in groups)


def lidc_labels(
    found: Sequence[Lesion],
    series: StoredSeries,
    like: Volume,
    *,
    values: Mapping[Verdict, int] = ALL_NODULES,
) -> Labels:
    """uint8[I, J, K]: the voxels on which at least half of the readers present agree.

    Args:
        values: label of each verdict on malignancy; 127 leaves those nodules out of loss and metrics, 0 forgets them.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, see `labels.place`.
    """
    labels = np.zeros(like.voxels.shape[1:], np.uint8)
    for lesion in found:
        place(lesion.agreed * np.uint8(values[lesion.verdict]), _way(lesion, series, like), labels)
    return labels


def _way(lesion: Lesion, series: StoredSeries, like: Volume) -> NDArray[np.float64]:
    shift = np.eye(4)
    shift[:3, 3] = lesion.origin
    return np.asarray(np.linalg.solve(like.affine_ras, series.affine_ras @ shift), np.float64)


def _found(reads: Reads, series: StoredSeries) -> list[tuple[Nodule, list[int]]]:
    """The nodules, each with the slices of its outlines: by SOP UID, else by height, half a slice apart at most."""
    by_uid = {uid: n for n, uid in enumerate(series.sop_uids)}
    heights = np.array(series.z_mm)
    apart = np.abs(np.diff(np.sort(heights)))
    reach_mm = 0.5 * float(np.median(apart)) if len(apart) else 0.5 * series.thickness_mm

    def slice_of(outline: Outline) -> int | None:
        if outline.sop_uid in by_uid:
            return by_uid[outline.sop_uid]
        nearest = int(np.abs(heights - outline.z_mm).argmin())
        return nearest if abs(heights[nearest] - outline.z_mm) < reach_mm else None

    places = [(nodule, [slice_of(outline) for outline in nodule.outlines]) for nodule in reads.nodules]
    lost = sum(n is None for _, slices in places for n in slices)
    if lost:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH",
            f"{WHAT}: {lost} outlines lie on slices that the series lacks. Fetch the series again, whole.",
        )
    return [(nodule, [n for n in slices if n is not None]) for nodule, slices in places]


def _drawn(nodule: Nodule, slices: Sequence[int], series: StoredSeries) -> _Drawn:
    """Fills each outline and takes its own pixels away again: it runs through the first pixels outside."""
    points = np.concatenate([outline.points for outline in nodule.outlines])
    low, high = np.append(points.min(axis=0), min(slices)), np.append(points.max(axis=0), max(slices))
    if (low < 0).any() or (high >= (series.columns, series.rows, len(series.sop_uids))).any():
        raise refused("LABEL_GEOMETRY_MISMATCH", f"{WHAT}: an outline lies outside its slice. Fetch the series again.")
    voxels = np.zeros(tuple(high - low + 1), np.bool_)
    for inclusion in (True, False):  # holes last: they cut through all that is included
        for outline, n in zip(nodule.outlines, slices, strict=True):
            if outline.inclusion is inclusion:
                edge = outline.points - low[:2]
                inside = enclosed([edge.astype(np.float64)], voxels.shape[:2])
                inside[edge[:, 0], edge[:, 1]] = False
                voxels[:, :, n - low[2]][inside] = inclusion
    on = np.repeat(slices, [len(outline.points) for outline in nodule.outlines])
    indices = np.concatenate([points, on[:, None], np.ones((len(points), 1))], axis=1)
    return _Drawn(nodule, low, voxels, (indices @ series.affine_ras.T)[:, :3])


def _groups(edges_mm: Sequence[NDArray[np.float64]], tolerance_mm: float) -> list[list[int]]:
    """Indices of the outlines that hang together; the least distance between two decides."""
    if not edges_mm:
        return []
    trees = [KDTree(edge) for edge in edges_mm]
    apart_mm = np.array([[tree.query(edge)[0].min() for edge in edges_mm] for tree in trees])
    while True:
        count, group = connected_components(apart_mm <= tolerance_mm + 1e-6, directed=False)
        if np.bincount(group).max() <= READERS or tolerance_mm < LEAST_MM:
            return [np.flatnonzero(group == n).tolist() for n in range(count)]
        tolerance_mm *= SHRINK


def _lesion(members: Sequence[_Drawn], present: int) -> Lesion:
    low = np.min([each.origin for each in members], axis=0)
    high = np.max([each.origin + each.voxels.shape for each in members], axis=0)
    votes = np.zeros(tuple(high - low), np.uint8)
    readers = {each.nodule.reader for each in members}
    for reader in readers:  # who drew it in two pieces still has one vote
        seen = np.zeros(votes.shape, np.bool_)
        for each in members:
            if each.nodule.reader == reader:
                begin = each.origin - low
                seen[tuple(slice(b, b + s) for b, s in zip(begin, each.voxels.shape, strict=True))] |= each.voxels
        votes += seen
    column, row, n = (int(v) for v in low)
    return Lesion((column, row, n), votes, len(readers), present, tuple(each.nodule.scores for each in members))
