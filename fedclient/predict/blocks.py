"""A source as runs of planes: a DICOM series of any length a few slices at a time, everything else in one piece.

Planes can come in runs where the network looks at each alone and intensities are mapped without a look at the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import read_case
from fedclient.data.formats import PICTURES
from fedclient.data.provenance import MEASURED, UNKNOWN, Provenance
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
    grid = _streamed(source, study)
    if grid is None:
        return None, iter([read_case(source.case, study.channels)])
    return grid, _runs(source, grid)


def _streamed(source: Source, study: Study) -> Grid | None:
    from fedclient.data.stack import stack

    series, plan = source.series, study.preprocess
    alone = plan.intensity == "window" or plan.mean is not None  # else each image is measured as a whole
    if series is None or series.frames > 1 or len(series.slices) <= PLANES or len(plan.size) != 2 or not alone:
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
    return Grid((i, j, k), affine_ras, turn.voxel_of_stored, series.modality, picture=False)


def _runs(source: Source, grid: Grid) -> Iterator[Volume]:
    from fedclient.data.dicom import read_series

    files = source.files if grid.voxel_of_pixel is not None and grid.voxel_of_pixel[2, 2] > 0 else source.files[::-1]
    for part in np.array_split(np.arange(len(files)), -(-len(files) // PLANES)):  # of nearly equal length: none of one
        volume = read_series([files[n] for n in part])
        if volume.voxels.shape[1:] != (*grid.shape[:2], len(part)):
            raise ImageUnreadable("DICOM: slices of more than one size or orientation.", "SERIES_MIXED")
        yield volume


def is_picture(source: Source) -> bool:
    return source.kind in PICTURES
