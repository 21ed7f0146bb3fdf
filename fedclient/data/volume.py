"""What every reader gives: voxels, where they lie in the patient, and what may be known of how they were made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedclient.data.provenance import UNKNOWN, Provenance
from shared_models.errors import ImageUnreadable

MAX_PIXELS = 64 * 1024**2  # of a picture or a slice; the largest mammograms have 27 million
MAX_VOXELS = 1024**3  # of a volume: 4 GiB as float32
# A picture has no patient frame: it gets the one of a frontal radiograph as it is displayed, its rows running to the
# feet and its columns to the patient's left, one millimetre a pixel.
FRONTAL_RAS = np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
PLANES = 8  # of DICOM, put in place at a time
ON_GRID = 0.1  # of a voxel; positions are written with two or three decimals, and a series may breathe by 1 %
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
PICTURE_PIXELS = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
_orientations: Any = nibabel.orientations  # has no types


@dataclass(frozen=True, slots=True)
class Volume:
    """One image on its grid.

    Attributes:
        voxels: float32[C, I, J, K], contiguous. Volumes: I runs to the patient's right, J to the front, K
            to the head (RAS+), in Hounsfield units for CT, as stored (times slope) for the others. Pictures and
            radiographs: [1, rows, columns, 1], in the file's own grey levels.
        affine_ras: float64[4, 4]; index (i, j, k, 1) -> patient position in mm, RAS+.
        modality: `CT`, `MR`, `DX`, ... where the file says so.
        voxel_of_pixel: float64[4, 4]; (column, row, slice, 1) as displayed -> (i, j, k, 1); slices are counted along
            DICOM's normal. None for files that know no rows and columns (NIfTI, MetaImage, NRRD).
    """

    voxels: NDArray[np.float32]
    affine_ras: NDArray[np.float64]
    modality: str | None = None
    provenance: Provenance = UNKNOWN
    voxel_of_pixel: NDArray[np.float64] | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along I, J, K; 1 for pictures, whose pixel size nobody states reliably."""
        i, j, k = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def left_right_axis(self) -> int:
        """0 if I runs between the patient's left and right (volumes), 1 if J does (pictures)."""
        return left_right_axis(self.affine_ras)


def voxels_apart(shape: Sequence[int], affine_ras: NDArray[np.float64], like: NDArray[np.float64]) -> float:
    """How far the corners of a grid of that shape lie apart under two affines, in voxels of `like`, along an axis."""
    corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])])
    return float(np.abs(corners @ (np.linalg.solve(like, affine_ras) - np.eye(4)).T).max())


def check_resampled(volume: Volume, spacing_mm: Sequence[float] | None) -> None:
    """Raises ImageUnreadable (INPUT_TOO_LARGE) for an image that is too large to be kept whole at a study's voxel size,
    as one is whose header says metres."""
    larger = math.prod(mm / wanted for mm, wanted in zip(volume.spacing_mm, spacing_mm or (), strict=False))
    count = math.prod(volume.voxels.shape[1:]) * larger
    if count > MAX_VOXELS:
        own, wanted = (" x ".join(f"{mm:.4g}" for mm in each) for each in (volume.spacing_mm, spacing_mm or ()))
        raise ImageUnreadable(
            f"its voxels are of {own} mm; at the study's {wanted} mm it would have {count:.2g} of them, and "
            f"{MAX_VOXELS} can be kept. Is the unit in its header right? Mend that, or leave the case out.",
            code="INPUT_TOO_LARGE",
        )


def left_right_axis(affine_ras: NDArray[np.float64]) -> int:
    """Which of I and J runs between the patient's left and right.

    J where neither does: that is a film taken from the side, whose rows run from head to feet.
    """
    sideways = np.abs(affine_ras[0, :2] / np.linalg.norm(affine_ras[:3, :2], axis=0))
    return int(sideways.argmax()) if sideways.any() else 1


@dataclass(frozen=True, slots=True)
class Turn:
    """How a stored grid is brought to RAS+ by swapping and flipping whole axes.

    Attributes:
        axes: stored axis that becomes I, J, K.
        flips: for each stored axis: 1, or -1 if it is reversed.
        stored_of_voxel: float64[4, 4]; index (i, j, k, 1) -> stored index.
    """

    axes: tuple[int, int, int]
    flips: tuple[int, int, int]
    stored_of_voxel: NDArray[np.float64]

    @property
    def voxel_of_stored(self) -> NDArray[np.float64]:
        return np.linalg.inv(self.stored_of_voxel).round().astype(np.float64)


def turn_to_ras(affine_ras: NDArray[np.float64], shape: tuple[int, ...]) -> Turn:
    """The turn for a grid of that stored affine and shape; affine_ras @ turn.stored_of_voxel is the new affine."""
    to_ras = _orientations.io_orientation(affine_ras)
    i, j, k = (int(axis) for axis in np.argsort(to_ras[:, 0]))
    a, b, c = (int(flip) for flip in to_ras[:, 1])
    return Turn((i, j, k), (a, b, c), _orientations.inv_ornt_aff(to_ras, shape))


def turned(values: NDArray[Any], turn: Turn) -> NDArray[Any]:
    """A view of a stored grid along I, J, K."""
    return values[tuple(slice(None, None, flip) for flip in turn.flips)].transpose(turn.axes)


def contiguous(values: NDArray[Any], dtype: type[Any] = np.float32) -> NDArray[Any]:
    """[I, J, K] in that order of memory, which what comes after is 4 times faster on, from any other.

    A piece at a time along J, so that cache lines are filled whole: 256 x 256 x 64 in 11 ms, numpy's own copy 60.
    """
    voxels = np.empty(values.shape, dtype)
    if values.flags.c_contiguous:
        voxels[...] = values
        return voxels
    for j in range(values.shape[1]):
        voxels[:, j] = np.ascontiguousarray(values[:, j].T).T
    return voxels
