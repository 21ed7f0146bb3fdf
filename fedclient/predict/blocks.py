"""A source as runs of planes: a DICOM series of any length a few slices at a time, everything else in one piece.

Planes can come in runs where the network looks at each alone and intensities are mapped without a look at the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import read_case
from fedclient.data.formats import PICTURES
from fedclient.data.provenance import MEASURED, UNKNOWN, Provenance
from fedclient.data.stack import Series, Slice, stack
from fedclient.data.volume import PICTURE_PIXELS, Volume, turn_to_ras
from fedclient.predict.inputs import Source
from shared_models.errors import ImageUnreadable
from shared_models.study import Study

PLANES = 16  # in a run


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the voxels of a source lie.

    Attributes:
        shape: voxels I, J, K.
        affine_ras, voxel_of_pixel: as those of a `Volume`.
        picture: the file states no place in the patient and no millimetres.
    """

    shape: tuple[int, int, int]
    affine_ras: NDArray[np.float64] = field(repr=False)
    voxel_of_pixel: NDArray[np.float64] | None = field(repr=False)
    modality: str | None
    picture: bool
    provenance: Provenance = field(repr=False, default=UNKNOWN)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        i, j, k = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def measured(self) -> bool:
        """Whether millimetres mean something along all three axes: neither in a picture nor in a radiograph."""
        flat = self.voxel_of_pixel is not None and np.array_equal(self.voxel_of_pixel, PICTURE_PIXELS)
        return not self.picture and not (flat and self.modality not in MEASURED)

    @property
    def slices_along_k(self) -> bool:
        """Whether a plane across K is a slice as it was stored."""
        return self.voxel_of_pixel is not None and abs(self.voxel_of_pixel[2, 2]) == 1


def grid_of(volume: Volume, picture: bool = False) -> Grid:
    i, j, k = volume.voxels.shape[1:]
    return Grid((i, j, k), volume.affine_ras, volume.voxel_of_pixel, volume.modality, picture, volume.provenance)


def opened(source: Source, study: Study) -> tuple[Grid | None, Iterator[Volume]]:
    """Its grid, where that is known before it is read, and its planes in runs along K.

    Raises:
        ImageUnreadable: what the readers refuse, now or as the runs are drawn.
    """
    series = source.series
    grid = None if series is None else _streamed(series, study)
    if series is None or grid is None:
        return None, iter([read_case(source.case, study.channels)])
    return grid, _runs(series, grid)


def _streamed(series: Series, study: Study) -> Grid | None:
    """The grid of a series that can come in runs, each of which is turned to RAS+ as the whole is."""
    plan = study.preprocess
    alone = plan.intensity == "window" or plan.mean is not None  # else each image is measured as a whole
    if series.frames > 1 or len(series.slices) <= PLANES or len(plan.size) != 2 or not alone:
        return None
    planes = [each.where for each in series.slices if each.where is not None]
    if len(planes) < len(series.slices):
        return None
    found = stack(planes, 1.0)
    shape = (series.columns, series.rows, len(planes))
    turn = turn_to_ras(found.affine_ras, shape)
    if turn.axes[2] != 2 or found.order != tuple(range(len(planes))):
        return None
    i, j, k = (shape[axis] for axis in turn.axes)
    affine_ras = found.affine_ras @ turn.stored_of_voxel
    grid = Grid((i, j, k), affine_ras, turn.voxel_of_stored, series.modality, picture=False)
    for run in _split(series.slices, grid):
        try:
            own = turn_to_ras(stack([each.where for each in run if each.where is not None], 1.0).affine_ras, shape)
        except ImageUnreadable:  # of distances that are equal enough among all, and not in the run
            return None
        if (own.axes, own.flips) != (turn.axes, turn.flips):  # planes at 45 degrees, where rounding decides
            return None
    return grid


def _split(slices: Sequence[Slice], grid: Grid) -> Iterator[Sequence[Slice]]:
    """Runs along K, of nearly equal length: none of one."""
    upwards = slices if grid.voxel_of_pixel is not None and grid.voxel_of_pixel[2, 2] > 0 else slices[::-1]
    for part in np.array_split(np.arange(len(slices)), -(-len(slices) // PLANES)):
        yield upwards[part[0] : part[-1] + 1]


def _runs(series: Series, grid: Grid) -> Iterator[Volume]:
    from fedclient.data.dicom import read_series

    for run in _split(series.slices, grid):
        volume = read_series([each.path for each in run])
        if volume.voxels.shape[1:] != (*grid.shape[:2], len(run)):
            raise ImageUnreadable("DICOM: slices of more than one size or orientation.", "SERIES_MIXED")
        yield volume


def is_picture(source: Source) -> bool:
    return source.kind in PICTURES
