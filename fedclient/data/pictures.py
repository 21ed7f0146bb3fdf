"""PNG, JPEG and TIFF: rows first as displayed, at their bit depth."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from fedclient.data.provenance import Provenance
from fedclient.data.volume import FRONTAL_RAS, MAX_PIXELS, PICTURE_PIXELS, Volume
from shared_models.errors import ImageUnreadable
from shared_models.study import COLOURS

_GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "LA", "F")
_COLOUR = ("P", "PA", "RGB", "RGBA")
FAR_FROM_GREY = 40  # grey levels between the colours of a pixel; JPEG moves them by less
_PHOTOMETRIC, _BITS, _SAMPLES = 262, 258, 339  # TIFF: 0 is white at zero; of a sample; 1 is unsigned, 2 signed
_TURN = 274  # EXIF and TIFF: 1 is as stored


def read_picture(path: Path) -> Volume:
    """A PNG, JPEG or TIFF as grey levels, rows first as the file has them.

    Grey of 8, 16 or 32 bit and real numbers keep their depth; colour and palettes become luminance (ITU-R 601; see
    `read_colours` for who wants them), transparency is dropped, and Pillow hands out 16-bit colour as 8 bit. A picture
    that says that it must be turned for display (EXIF orientation) is refused: scanners write none, some programs turn
    it and some do not, so that image and mask may lie differently.
    """
    with _picture(path) as image:
        grey = image.convert("RGBA").convert("L") if image.mode in _COLOUR else _without_alpha(image)
        rows = np.asarray(grey, dtype=np.float32)
        lossy = image.format == "JPEG"
    if not np.isfinite(rows).all():
        raise ImageUnreadable("some pixels are NaN or infinite. Replace them and save again.", "INTENSITY_INVALID")
    facts = Provenance(rows=rows.shape[0], columns=rows.shape[1], slices=1, lossy=lossy)
    return Volume(rows[None, :, :, None], FRONTAL_RAS.copy(), None, facts, PICTURE_PIXELS.copy())


def read_colours(path: Path, names: Sequence[str]) -> Volume:
    """Some colours of a PNG, JPEG or TIFF: float32[C, rows, columns, 1] from 0 to 255; a grey one is alike in all.

    Args:
        names: of `COLOURS`, in the order in which they are wanted.
    """
    with _picture(path) as image:
        if image.mode not in (*_COLOUR, "1", "L", "LA"):
            raise ImageUnreadable(
                f"the picture has grey levels of more than 8 bits (mode {image.mode}), and the study sees colours. "
                f"Save it as 8-bit RGB.",
                code="MODALITY_MISMATCH",
            )
        pixels = np.asarray(image.convert("RGBA"), dtype=np.float32)[..., :3]
        lossy = image.format == "JPEG"
    voxels = np.stack([pixels[:, :, COLOURS.index(name), None] for name in names])
    facts = Provenance(rows=pixels.shape[0], columns=pixels.shape[1], slices=1, lossy=lossy)
    return Volume(voxels, FRONTAL_RAS.copy(), None, facts, PICTURE_PIXELS.copy())


def picture_values(path: Path) -> NDArray[Any]:
    """[rows, columns] of a mask, as stored; a mask in colours is refused."""
    with _picture(path) as image:
        if image.mode in _COLOUR:
            rgb = np.asarray(image.convert("RGBA"))[..., :3]
            if (rgb != rgb[..., :1]).any():
                raise ImageUnreadable(
                    "the mask is coloured; which colour is which label? Save it as an 8-bit grey PNG.",
                    code="LABEL_VALUES",
                )
            values = rgb[..., 0]
        else:
            values = np.asarray(_without_alpha(image))
    return values


def picture_texts(path: Path) -> str:
    """What words a picture carries beside its pixels: PNG's texts and EXIF; for looking through, not for telling."""
    with _picture(path) as image:
        found = [*image.info.items(), *image.getexif().items()]
        return "\n".join(f"{key}: {value}" for key, value in found if isinstance(value, str))


def is_coloured(path: Path) -> bool:
    """Whether colours mean something in a picture: more than a hundredth of its pixels are far from grey."""
    with _picture(path) as image:
        if image.mode not in _COLOUR:
            return False
        image.thumbnail((256, 256))
        rgb = np.asarray(image.convert("RGBA"), dtype=np.int16)[..., :3]
        return bool((np.ptp(rgb, axis=-1) > FAR_FROM_GREY).mean() > 0.01)


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of uint8[rows, columns] or uint8[rows, columns, 3], without a word in it."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return content.getvalue()


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    """The opened, not yet decoded picture; what goes wrong while decoding in the block is an ImageUnreadable too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote metadata; size is checked here
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
                _check(image)
                yield image
    except Image.DecompressionBombError:
        raise _too_large() from None
    except (
        OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error,
        zlib.error,
    ) as e:  # fmt: skip
        # SyntaxError: Pillow's word for a bad header
        raise ImageUnreadable(
            f"the file is no PNG, JPEG or TIFF, or broken ({type(e).__name__}). Copy or export it again."
        ) from None  # their messages hold the path


def _check(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large()
    if getattr(image, "n_frames", 1) > 1:
        raise ImageUnreadable(
            "the picture is animated or has several pages. Save each as a file of its own.", "MODALITY_MISMATCH"
        )
    if image.mode not in _GREY + _COLOUR:
        raise ImageUnreadable(f"the picture has colour mode {image.mode}. Save it as grey or RGB.", "MODALITY_MISMATCH")
    if image.getexif().get(_TURN, 1) != 1:
        raise ImageUnreadable(
            "the picture is stored turned, with a note to turn it for display (EXIF orientation); programs differ in "
            "whether they do, and its mask may lie otherwise. Save it upright, without the note.",
            code="GEOMETRY_INVALID",
        )
    if isinstance(image, TiffImageFile) and _misread(image):
        raise ImageUnreadable(
            "TIFF: signed 8-bit or unsigned 32-bit numbers, which would come out wrong. Save it as 16-bit grey.",
            code="INTENSITY_INVALID",
        )
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0 and image.mode not in ("1", "L"):
        raise ImageUnreadable("TIFF: its zero is white. Save it with black at zero.", "MODALITY_MISMATCH")


def _misread(image: TiffImageFile) -> bool:
    """Pillow takes signed 8 bits as unsigned, and unsigned 32 bits as signed."""
    bits, kind = (image.tag_v2.get(tag, (1,)) for tag in (_BITS, _SAMPLES))
    return (bits[0], kind[0]) in ((8, 2), (32, 1))


def _too_large() -> ImageUnreadable:
    return ImageUnreadable(
        f"the picture has more than {MAX_PIXELS} pixels. Scale it down and save again.", code="INPUT_TOO_LARGE"
    )


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert("L") if image.mode in ("1", "LA") else image
