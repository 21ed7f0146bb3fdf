"""Voxels behind a text header: what MetaImage and NRRD share.

Both are read here rather than by ITK: their headers must be doubted line by line anyway before a byte is allocated,
what is left after that is a few lines of numpy, and tests can then compare with ITK.
"""

import bz2
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from fedclient.data.volume import LPS_TO_RAS, MAX_VOXELS, Volume, contiguous, turn_to_ras, turned
from shared_models.errors import ImageUnreadable

MAX_HEADER_BYTES = 1 << 16
RIGHT_ANGLE = 1e-3  # cosine of an angle that still counts as right
_CHUNK_BYTES = 1 << 20

Packing = Literal["raw", "zlib", "bzip2"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the voxels are and what they are.

    Attributes:
        skip_bytes: before them in the file; -1 if they are the end of it.
        shape: stored axes, the fastest first.
        affine_lps: float64[4, 4]; stored index -> mm.
    """

    path: Path
    skip_bytes: int
    dtype: np.dtype[np.generic]
    packing: Packing
    shape: tuple[int, int, int]
    affine_lps: NDArray[np.float64]


def read_layout(layout: Layout, name: str, modality: str | None = None) -> Volume:
    """The volume, turned to RAS+ by whole axes; `name` of the format is for messages.

    Raises:
        ImageUnreadable: IMAGE_UNREADABLE, INPUT_TOO_LARGE, GEOMETRY_INVALID, INTENSITY_INVALID.
    """
    _check_affine(layout.affine_lps, name)
    if not 0 < math.prod(layout.shape) <= MAX_VOXELS or min(layout.shape) < 1:
        raise ImageUnreadable(
            f"{name}: {math.prod(layout.shape)} voxels; 1 to {MAX_VOXELS} are read. Crop or resample it.",
            code="INPUT_TOO_LARGE",
        )
    try:
        flat = np.frombuffer(_bytes(layout, name), layout.dtype)
    except (OSError, EOFError, ValueError, zlib.error) as e:  # OSError: also bz2's word for what is no bzip2
        raise ImageUnreadable(f"{name}: the voxels are broken ({type(e).__name__}). Copy or export it again.") from None
    affine_ras = LPS_TO_RAS @ layout.affine_lps
    turn = turn_to_ras(affine_ras, layout.shape)
    stored = flat.reshape(layout.shape, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32 is refused as infinite
        voxels = contiguous(turned(stored, turn))
    if layout.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ImageUnreadable(
            f"{name}: some voxels are NaN or infinite. Replace them (air is -1000 HU) and save again.",
            code="INTENSITY_INVALID",
        )
    return Volume(voxels[None], affine_ras @ turn.stored_of_voxel, modality)


def header_lines(path: Path, name: str) -> tuple[bytes, str]:
    """The first 64 KiB of a file, and the same as text of one character a byte."""
    try:
        with path.open("rb") as file:
            head = file.read(MAX_HEADER_BYTES)
    except OSError as e:
        raise ImageUnreadable(f"{name}: the file cannot be opened ({type(e).__name__}).") from None
    return head, head.decode("latin-1")


def beside(header: Path, named: str, name: str) -> Path:
    """The file of voxels that a header names, if it lies in the header's folder, links followed.

    Raises:
        ImageUnreadable: PATH_ESCAPE, or there is no such file.
    """
    folder, wanted = header.parent.resolve(), Path(named.replace("\\", "/"))
    escapes = ImageUnreadable(
        f"{name}: the header names a file of voxels outside its own folder. Put both side by side.", "PATH_ESCAPE"
    )
    if wanted.is_absolute() or ".." in wanted.parts or "\0" in named or ":" in named:
        raise escapes
    try:
        path = (folder / wanted).resolve(strict=True)
    except (OSError, RuntimeError):
        path = folder
    if not path.is_relative_to(folder):
        raise escapes
    if not path.is_file():
        raise ImageUnreadable(f"{name}: the file of voxels that its header names is not there. Copy both.")
    return path


def numbers(value: str, count: int, name: str, key: str) -> tuple[float, ...]:
    """Finite numbers, `count` of them, out of a header's line."""
    try:
        found = tuple(float(word) for word in value.split())
    except ValueError:
        found = ()
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ImageUnreadable(f"{name}: {key} must be {count} numbers. Export it again.")
    return found


def three(value: str, name: str, key: str) -> tuple[int, int, int]:
    """Three whole numbers above 0: the size of a grid."""
    i, j, k = numbers(value, 3, name, key)
    if min(i, j, k) < 1 or max(i, j, k) > MAX_VOXELS or any(n != int(n) for n in (i, j, k)):
        raise ImageUnreadable(f"{name}: {key} is no size of a volume. Export it again.", code="INPUT_TOO_LARGE")
    return int(i), int(j), int(k)


def _check_affine(affine: NDArray[np.float64], name: str) -> None:
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    unit = axes / np.where(lengths > 0, lengths, 1)
    if lengths.min() <= 0 or np.abs(unit.T @ unit - np.eye(3)).max() > RIGHT_ANGLE:
        raise ImageUnreadable(
            f"{name}: its axes do not stand at right angles, or one has no length. Resample it onto a straight grid.",
            code="GEOMETRY_INVALID",
        )


def _bytes(layout: Layout, name: str) -> bytes | bytearray:
    wanted = math.prod(layout.shape) * layout.dtype.itemsize
    with layout.path.open("rb") as file:
        size = layout.path.stat().st_size
        there = wanted if layout.skip_bytes < 0 and size >= wanted else size - max(layout.skip_bytes, 0)
        file.seek(size - there)
        if layout.packing != "raw":
            content: bytes | bytearray = _unpacked(file, wanted, layout.packing)
            there = len(content)
        if there == wanted:
            return content if layout.packing != "raw" else file.read(wanted)
    raise ImageUnreadable(
        f"{name}: the header promises {wanted} bytes of voxels, the file holds "
        f"{'more' if there > wanted else max(there, 0)}. Copy or export it again."
    )


def _unpacked(file: IO[bytes], size_bytes: int, packing: Packing) -> bytearray:
    """Up to one byte more than `size_bytes`; a bomb unpacks no further."""
    content = bytearray()
    if packing == "bzip2":
        bunzip = bz2.BZ2Decompressor()
        while len(content) <= size_bytes and not bunzip.eof:
            packed = file.read(_CHUNK_BYTES) if bunzip.needs_input else b""
            if bunzip.needs_input and not packed:
                break
            content += bunzip.decompress(packed, size_bytes + 1 - len(content))
        return content
    inflate = zlib.decompressobj(47)  # zlib's or gzip's heading
    while len(content) <= size_bytes and not inflate.eof:
        packed = inflate.unconsumed_tail or file.read(_CHUNK_BYTES)
        if not packed:
            break
        content += inflate.decompress(packed, size_bytes + 1 - len(content))
    return content
