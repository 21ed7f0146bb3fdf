"""Image and label files into arrays, whatever their format, and which way a patient lies in them.

No message of a reader holds a path, because file names often hold patient numbers; whoever calls adds the manifest's
row.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.formats import PICTURES, format_of
from fedclient.data.metaimage import read_metaimage
from fedclient.data.nifti import nifti_values, read_nifti
from fedclient.data.nrrd import read_nrrd
from fedclient.data.pictures import picture_values, read_picture
from fedclient.data.volume import MAX_PIXELS as MAX_PIXELS
from fedclient.data.volume import MAX_VOXELS as MAX_VOXELS
from fedclient.data.volume import ON_GRID, PICTURE_PIXELS, contiguous, voxels_apart
from fedclient.data.volume import Volume as Volume
from shared_models.errors import ImageUnreadable

IGNORE = 127  # mask value of pixels that count neither in the loss nor in a metric


def is_picture(path: Path) -> bool:
    """Whether a file states no place in the patient."""
    return path.is_file() and format_of(path) in PICTURES


def read_image(path: Path) -> Volume:
    """The image in a file, or in a folder that holds one DICOM series.

    Raises:
        ImageUnreadable: another format, a broken file, or one whose content could be misread; its `code` says which.
    """
    if path.is_dir():
        return _read_folder(path)
    kind = format_of(path)
    if kind == "dicom":
        from fedclient.data.dicom import read_series  # half a second of codecs, for those who need them

        return read_series([path])
    readers = {"nifti": read_nifti, "metaimage": read_metaimage, "nrrd": read_nrrd}
    return readers.get(kind, read_picture)(path)


def read_labels(path: Path, like: Volume | None = None, one_label: bool = True) -> NDArray[np.uint8]:
    """uint8[I, J, K] label map of whole numbers; 0 is background, k the study's k-th label, 127 is left out.

    A picture that holds nothing but 0, 127 and 255 is a black-and-white mask: its 255 becomes 1, if there is but
    `one_label` that white could mean. All other values stay. A picture states no place, so it lies on the pixels of
    `like` as they are displayed, be they a picture or DICOM.

    Raises:
        ImageUnreadable: LABEL_VALUES: not whole numbers from 0 to 255, a coloured or JPEG mask;
            LABEL_GEOMETRY_MISMATCH: not on the grid of `like`.
    """
    kind = "dicom" if path.is_dir() else format_of(path)
    if kind == "jpeg":
        raise ImageUnreadable("JPEG blurs labels. Save them as PNG, NIfTI, MetaImage or NRRD.", "LABEL_VALUES")
    if kind in PICTURES:
        return _picture_labels(path, like, one_label)
    if kind == "nifti":
        values, affine_ras = nifti_values(path)
    else:
        volume = read_image(path)
        values, affine_ras = volume.voxels[0], volume.affine_ras
    labels = _whole(values)
    if like is not None:
        _check_grid(labels.shape, affine_ras, like)
    return labels


def _read_folder(folder: Path) -> Volume:
    from fedclient.data.dicom import find_series, read_series

    found = find_series(folder)
    if large := [str(error) for error in found.unreadable.values() if error.code == "INPUT_TOO_LARGE"]:
        raise ImageUnreadable(large[0], "INPUT_TOO_LARGE")
    if found.unreadable:
        raise ImageUnreadable(
            f"DICOM: {len(found.unreadable)} files of the folder are broken. Copy or export the series again.",
            code="DICOM_UNREADABLE",
        )
    if len(found.series) != 1:
        raise ImageUnreadable(
            f"the folder holds {len(found.series)} DICOM series of images (and {len(found.objects)} DICOM objects of "
            f"other kinds); one is read. Give each series a folder of its own.",
            code="SERIES_MIXED" if found.series else "DICOM_UNREADABLE",
        )
    return read_series(found.series[0].files)


def _picture_labels(path: Path, like: Volume | None, one_label: bool) -> NDArray[np.uint8]:
    labels = _whole(picture_values(path))
    if one_label and not np.setdiff1d(np.unique(labels), (0, IGNORE, 255)).size:
        labels = np.where(labels == 255, 1, labels).astype(np.uint8)
    voxel_of_pixel = PICTURE_PIXELS if like is None else like.voxel_of_pixel
    if voxel_of_pixel is None:
        raise ImageUnreadable(
            "the mask is a picture, and its image a volume without rows and columns: nobody knows how one lies on the "
            "other. Export the mask in the format of its image.",
            code="LABEL_GEOMETRY_MISMATCH",
        )
    from_axes = np.abs(voxel_of_pixel[:3, :3]).argmax(axis=1)
    turned = labels.T[:, :, None].transpose(from_axes)  # columns, rows, slices -> I, J, K
    turned = np.flip(turned, tuple(to for to, axis in enumerate(from_axes) if voxel_of_pixel[to, axis] < 0))
    if like is not None:
        _check_grid(turned.shape, like.affine_ras, like)
    return np.ascontiguousarray(turned)


def _check_grid(shape: tuple[int, ...], affine_ras: NDArray[np.float64], like: Volume) -> None:
    wanted = like.voxels.shape[1:]
    if shape != wanted:
        raise ImageUnreadable(
            f"the mask has {shape} voxels, its image {wanted}. Export both on one grid.", "LABEL_GEOMETRY_MISMATCH"
        )
    apart = voxels_apart(wanted, affine_ras, like.affine_ras)
    if apart > ON_GRID:
        raise ImageUnreadable(
            f"mask and image lie {apart:.2g} voxels apart in the patient (sform/qform of the two files differ). "
            f"Export the mask on its image's grid.",
            code="LABEL_GEOMETRY_MISMATCH",
        )


def _whole(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Values as uint8[I, J, K], or ImageUnreadable if that would change one."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise ImageUnreadable(
            "a label is below 0, above 255 or not a number. Number the labels from 1; 127 = ignore.", "LABEL_VALUES"
        )
    labels: NDArray[np.uint8] = contiguous(values, np.uint8)
    if not np.array_equal(labels, values):
        raise ImageUnreadable(
            "some labels are fractions (resampled or blurred). Export labels with nearest neighbour.", "LABEL_VALUES"
        )
    return labels
