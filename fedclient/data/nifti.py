"""NIfTI: geometry from sform, else qform; scaled by its slope; turned to RAS+ by whole axes."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from fedclient.data.volume import MAX_VOXELS, Volume, contiguous, turn_to_ras, turned, voxels_apart
from shared_models.errors import ImageUnreadable

MAX_OFFSET_BYTES = 64 * 1024**2  # of the voxels in the file: room for extensions
MAX_REST_BYTES = 4 * MAX_VOXELS  # behind the voxels that are wanted: further volumes
CHUNK_BYTES = 1 << 20
BROKEN = (
    OSError, EOFError, ValueError, LookupError, struct.error, zlib.error, ImageFileError, HeaderDataError,
    WrapStructError, OrientationError,
)  # fmt: skip
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units & 7: unsaid, metres, millimetres, micrometres
UNLIKE = 0.1  # share by which two statements of a voxel size differ in more than rounding
SHEAR = 0.02  # cosine between two axes: 1.1 degrees from a right angle


def read_nifti(path: Path, part: int | None = None) -> Volume:
    """A 3-D (or 2-D) NIfTI image, scaled by its slope and turned to RAS+ by axis flips and swaps; never resampled.

    Args:
        part: which volume of a 4-D image, as the Medical Segmentation Decathlon stores channels.
    """
    values, affine_ras = nifti_values(path, part)
    voxels = contiguous(values)
    if values.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ImageUnreadable(
            "NIfTI: some voxels are NaN or infinite. Replace them (air is -1000 HU) and save again.",
            code="INTENSITY_INVALID",
        )
    return Volume(voxels[None], affine_ras)


def nifti_values(path: Path, part: int | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Values [I, J, K] in RAS+ and their affine in mm: whole numbers as stored, where the header scales none; else
    float32, finite or not."""
    try:
        with _opened(path) as (file, version, pixdim):
            image: Any = (nibabel.Nifti2Image if version == 2 else nibabel.Nifti1Image).from_stream(file)
            header = image.header
            _check_values(header)
            affine_ras = _affine(header, pixdim)
            shape = _shape(header, part)  # before a header that lies makes room for its voxels
            values = _values(file, image.dataobj, shape, part or 0)
            turn = turn_to_ras(affine_ras, shape)
            return turned(values, turn), affine_ras @ turn.stored_of_voxel
    except BROKEN as e:
        raise ImageUnreadable(
            f"NIfTI: the file is broken or cut short ({type(e).__name__}). Copy or export it again."
        ) from None  # their messages hold the path


def stored_grid(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Shape (three axes) and affine in mm of a NIfTI image as it lies in the file, before it is turned."""
    try:
        with _opened(path) as (file, version, pixdim):
            kind: Any = nibabel.Nifti2Header if version == 2 else nibabel.Nifti1Header
            header = kind.from_fileobj(file)
            return _shape(header, None), _affine(header, pixdim)
    except BROKEN as e:
        raise ImageUnreadable(
            f"NIfTI: the file is broken or cut short ({type(e).__name__}). Copy or export it again."
        ) from None


def _values(file: Any, stored: Any, shape: tuple[int, ...], part: int) -> NDArray[Any]:
    """The voxels of one volume. nibabel would make float64 of them: 39 ms for 256 x 256 x 64 of int16, so 5.

    They are read, not mapped: a file that is cut short meanwhile would end the process.
    """
    count, kind = math.prod(shape), stored.dtype
    file.seek(stored.offset + part * count * kind.itemsize)
    content = file.read(count * kind.itemsize)
    if len(content) < count * kind.itemsize:
        raise EOFError
    if isinstance(file, gzip.GzipFile):
        _check_rest(file)
    values = np.frombuffer(content, kind).reshape(shape, order="F")
    if (stored.slope, stored.inter) == (1.0, 0.0) and kind.kind in "iu":
        return values
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32 is refused as infinite
        if (stored.slope, stored.inter) == (1.0, 0.0):
            return values.astype(np.float32)
        scaled = np.empty(shape, np.float32, order="F")
        for k in range(shape[2]):  # in float64, as nibabel does, without a float64 copy of it all
            scaled[:, :, k] = values[:, :, k] * np.float64(stored.slope) + np.float64(stored.inter)
        return scaled


def _check_rest(file: gzip.GzipFile) -> None:
    """Reads on to the end of a packed file: the checksum stands there, and wrong bytes unpack without a word."""
    for _ in range(0, MAX_REST_BYTES, CHUNK_BYTES):
        if not file.read(CHUNK_BYTES):
            return
    raise ImageUnreadable(
        f"NIfTI: more than {MAX_REST_BYTES} bytes follow on the voxels that are wanted. Split it into its volumes.",
        code="INPUT_TOO_LARGE",
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, int, NDArray[np.floating[Any]]]]:
    """The unpacked file at its beginning, whatever its name, the version of its header, and the voxel size that it
    states, of which nibabel makes 1 where it is 0."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        head = stream.read(348)
        order = "<" if head[:2] in (b"\x5c\1", b"\x1c\2") else ">"
        version = 2 if struct.unpack_from(order + "i", head) == (540,) else 1
        (offset,) = (
            struct.unpack_from(order + "q", head, 168) if version == 2 else struct.unpack_from(order + "f", head, 108)
        )
        if not 0 <= offset <= MAX_OFFSET_BYTES:
            raise ImageUnreadable(
                f"NIfTI: the voxels begin after more than {MAX_OFFSET_BYTES} bytes. Save it without its extensions.",
                code="INPUT_TOO_LARGE",
            )
        stream.seek(0)
        pixdim = np.frombuffer(head, order + ("f8" if version == 2 else "f4"), 4, 104 if version == 2 else 76)[1:]
        yield stream, version, pixdim


def _shape(header: Any, part: int | None) -> tuple[int, ...]:
    stored = tuple(int(n) for n in header.get_data_shape())
    if part is not None and (len(stored) != 4 or part >= stored[3]):
        raise ImageUnreadable(
            f"NIfTI: shape {stored}; channel {part} of a 4-D image is wanted. Does dataset.json tell of other files?",
            code="MODALITY_MISMATCH",
        )
    stored = stored if part is None else stored[:3]
    shape = (*stored, 1) if len(stored) == 2 else stored
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise ImageUnreadable(
            f"NIfTI: {len(stored)}-D with shape {stored}; one volume of 3 dimensions a file is read. "
            f"Split it (fslsplit, or nibabel.four_to_three) and list each volume.",
            code="MODALITY_MISMATCH",
        )
    if not 0 < math.prod(shape) <= MAX_VOXELS:
        raise ImageUnreadable(
            f"NIfTI: {math.prod(shape)} voxels; 1 to {MAX_VOXELS} are read. Crop or resample it.", "INPUT_TOO_LARGE"
        )
    return shape


def _check_values(header: Any) -> None:
    kind = header.get_data_dtype()
    if kind.kind not in "iuf":
        raise ImageUnreadable(
            f"NIfTI: voxels of type {kind}; whole or real numbers are read. Convert it to int16.", "MODALITY_MISMATCH"
        )


def _affine(header: Any, pixdim: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """sform if its code is set, else qform (domain rule); in mm."""
    sform, sform_code = header.get_sform(coded=True)
    affine = sform if sform_code > 0 else header.get_qform(coded=True)[0]
    if affine is None:
        raise ImageUnreadable(
            "NIfTI: sform_code and qform_code are both 0, so nobody knows left from right. "
            "Export it again with its orientation (dcm2niix writes it).",
            code="GEOMETRY_MISSING",
        )
    if sform_code <= 0 and any(n > 1 and not mm > 0 for n, mm in zip(header.get_data_shape(), pixdim, strict=False)):
        raise ImageUnreadable(
            f"NIfTI: the header states voxels of {_shown(pixdim)} mm (pixdim), from which the qform has its scale. "
            f"Export it again.",
            code="GEOMETRY_INVALID",
        )
    mm = np.array(affine, dtype=np.float64)
    mm[:3] *= _MM.get(int(header["xyzt_units"]) & 7, 1.0)
    spacing = np.linalg.norm(mm[:3, :3], axis=0)
    if not np.isfinite(mm).all() or spacing.min() <= 0 or abs(np.linalg.det(mm[:3, :3] / spacing)) < 0.01:
        raise ImageUnreadable(
            f"NIfTI: the {'sform' if sform_code > 0 else 'qform'} is no invertible map to mm. Export it again.",
            code="GEOMETRY_INVALID",
        )
    directions = mm[:3, :3] / spacing
    across = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if across > SHEAR:
        raise ImageUnreadable(
            f"NIfTI: two axes of the grid stand at {90 - math.degrees(math.asin(min(1.0, across))):.1f} degrees: it is "
            f"sheared, and would be read as straight. Resample it onto a straight grid.",
            code="GEOMETRY_INVALID",
        )
    return mm


def twofold(path: Path) -> str:
    """How a NIfTI header contradicts itself in which way the patient lies, where, or at which voxel size; empty if it
    does not.

    Programs differ in what they go by, so a mask drawn in another one may lie mirrored or elsewhere.
    """
    try:
        with _opened(path) as (file, version, pixdim):
            kind: Any = nibabel.Nifti2Header if version == 2 else nibabel.Nifti1Header
            header = kind.from_fileobj(file)
        (sform, first), (qform, second) = header.get_sform(coded=True), header.get_qform(coded=True)
        if first == 0:
            return ""
        axes: Any = nibabel.orientations.io_orientation
        alike = second == 0 or np.array_equal(axes(sform), axes(qform))
        last = [n - 1 for n in (*header.get_data_shape(), 1, 1)[:3]]
        apart = 0.0 if second == 0 else voxels_apart(last, qform, sform)
    except (*BROKEN, ImageUnreadable):  # its reader tells
        return ""
    if not alike:
        mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
        how = "mirrored" if mirrored else "turned by a quarter or more"
        return f"by its qform a NIfTI file lies {how} beside its sform, which counts"
    size = np.linalg.norm(sform[:3, :3], axis=0)
    stated = np.where((pixdim > 0) & (np.array(last) > 0), pixdim, size)  # 0, or of a single plane: not stated
    if (np.abs(stated - size) > UNLIKE * size).any():
        return f"a NIfTI file states voxels of {_shown(stated)} (pixdim), and {_shown(size)} by its sform, which counts"
    if apart > 1:
        return f"by its qform a NIfTI file lies up to {apart:.3g} voxels beside its sform, which counts"
    return ""


def _shown(size: NDArray[np.floating[Any]]) -> str:
    return " x ".join(f"{edge:.4g}" for edge in size.tolist())
