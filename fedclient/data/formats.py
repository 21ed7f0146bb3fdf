"""What kind of file this is: by its first bytes, because names lie and many have no suffix; by its suffix second."""

import re
import zlib
from pathlib import Path
from typing import Literal

from shared_models.errors import ImageUnreadable

Format = Literal["dicom", "nifti", "metaimage", "nrrd", "png", "jpeg", "tiff"]
SUFFIXES: dict[str, Format] = {
    ".nii": "nifti", ".nii.gz": "nifti", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".tif": "tiff",
    ".tiff": "tiff", ".mhd": "metaimage", ".mha": "metaimage", ".nrrd": "nrrd", ".nhdr": "nrrd", ".dcm": "dicom",
}  # fmt: skip
PICTURES: tuple[Format, ...] = ("png", "jpeg", "tiff")
HEAD_BYTES = 1024
_NIFTI_SIZES = (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c")  # 348 and 540, both byte orders
_UNSAFE = {
    b"\x93NUMPY": "a numpy array",
    b"PK\3\4": "a zip archive (.npz, .pt, .zip)",
    b"\x80\2": "a pickle", b"\x80\3": "a pickle", b"\x80\4": "a pickle", b"\x80\5": "a pickle",
}  # fmt: skip


def format_of(path: Path) -> Format:
    """The format of a file.

    Raises:
        ImageUnreadable: a format that is not read here, one whose content could run as code, or no readable file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as e:
        raise ImageUnreadable(f"the file cannot be opened ({type(e).__name__}). Is it there, and readable?") from None
    by_content = _by_content(head)
    if by_content is not None:
        return by_content
    for magic, what in _UNSAFE.items():
        if head.startswith(magic):
            raise ImageUnreadable(
                f"the file is {what}: its content may run as code, or unpack without bound. Export it as an image.",
                code="UNSAFE_FORMAT",
            )
    if suffix(path) not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise ImageUnreadable(f"{suffix(path) or 'nameless'} files are not read here. Allowed: {allowed}.")
    return SUFFIXES[suffix(path)]


def is_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM does, with its preamble or, as old exports have it, at once with group 0008."""
    if head[128:132] == b"DICM":
        return True
    bare = head[:2] == b"\x08\0" and len(head) > 64 and head[2:4] in (b"\0\0", b"\1\0", b"\5\0", b"\x08\0", b"\x16\0")
    return bare and (head[4:6].isalpha() or int.from_bytes(head[4:8], "little") < 256)


def suffix(path: Path) -> str:
    """The last suffix in small letters, or `.nii.gz`."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else "".join(Path(name).suffixes[-1:])


def _by_content(head: bytes) -> Format | None:
    if is_dicom(head):
        return "dicom"
    start = _inflated(head) if head.startswith(b"\x1f\x8b") else head
    if start[:4] in _NIFTI_SIZES and (start[344:347] == b"n+1" or start[4:7] == b"n+2"):
        return "nifti"
    if re.match(rb"NRRD\d{4}\r?\n", head):
        return "nrrd"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if re.search(rb"^\s*(ObjectType|NDims)\s*=", head, re.MULTILINE):
        return "metaimage"
    return None


def _inflated(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""
