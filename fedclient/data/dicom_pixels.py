"""Stored pixels of DICOM into what they mean: decoded, scaled slice by slice, padding as air, dense as bright.

Decoders: numpy for uncompressed syntaxes, and one plug-in each for the others, the one that refuses a stream that is
cut short rather than fill it up (gdcm fills JPEG baseline with grey).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from fedclient.data.codestream import check_jpeg, check_size
from fedclient.data.dicom_header import number, text
from fedclient.data.provenance import MEASURED
from fedclient.data.volume import MAX_PIXELS, MAX_VOXELS
from shared_models.errors import ImageUnreadable

AIR_HU = -1000.0
TISSUE_HU = (-900.0, 3071.0)  # a padding value in here may be tissue as well: left as it is
HOUNSFIELD = ("", "HU", "US", "HU_MOD")  # RescaleType: unsaid, unspecified, and virtual monochromatic and the like
PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)  # whatever the header says; the others may be either
# Transfer syntax -> pydicom's name of the plug-in, and what to install for it
PLUGINS: dict[UID, tuple[str, str]] = {
    **dict.fromkeys((JPEG2000Lossless, JPEG2000), ("pylibjpeg", "pylibjpeg and pylibjpeg-openjpeg")),
    **dict.fromkeys((HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K), ("pylibjpeg", "pylibjpeg and pylibjpeg-openjpeg")),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), ("pyjpegls", "pyjpegls")),
    **dict.fromkeys((JPEGLossless, JPEGLosslessSV1, JPEGExtended12Bit), ("gdcm", "python-gdcm")),
    JPEGBaseline8Bit: ("pillow", "pillow"),
    RLELossless: ("pydicom", "pydicom"),  # its own: pylibjpeg-rle panics on spoilt run lengths
}


@dataclass(frozen=True, slots=True)
class Meaning:
    """From stored numbers to voxels: stored * slope + intercept.

    Attributes:
        padding: stored numbers from the first to the second are no measurement; None where there are none.
        air: what they become; None for the lowest value of the slice.
        mirror: stored numbers become mirror - stored first (MONOCHROME1); None to leave them.
    """

    slope: float
    intercept: float
    padding: tuple[float, float] | None
    air: float | None
    mirror: float | None


def syntax_of(data: Dataset) -> UID:
    """The transfer syntax; that of the encoding in which it was read, where the file does not state one."""
    stated = data.file_meta.get("TransferSyntaxUID")
    if stated:
        return UID(str(stated))
    implicit, little = data.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def frame_count(data: Dataset) -> int:
    return int(number(data, "NumberOfFrames") or 1)


def check_pixels(data: Dataset, slices: int) -> None:
    """Refuses, before anything is decoded, what is not one grey channel, lies about its size, or has no decoder.

    Args:
        slices: files of the series, to bound their sum.

    Raises:
        ImageUnreadable: MODALITY_MISMATCH, INPUT_TOO_LARGE, DICOM_UNREADABLE, DICOM_CODEC_MISSING.
    """
    if "PixelData" not in data:
        raise ImageUnreadable(
            "DICOM: the file holds no pixels, or was cut short before them. Copy or export it again.",
            code="DICOM_UNREADABLE",
        )
    photometric = text(data, "PhotometricInterpretation")
    if number(data, "SamplesPerPixel") != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageUnreadable(
            "DICOM: the image is in colour (a screenshot, or a colour radiograph). Export the original in grey.",
            code="MODALITY_MISMATCH",
        )
    rows, columns, frames = (int(number(data, k) or 0) for k in ("Rows", "Columns", "NumberOfFrames"))
    frames = frames or 1
    if rows * columns > MAX_PIXELS or rows * columns * frames * slices > MAX_VOXELS:
        raise ImageUnreadable(
            f"DICOM: {rows} x {columns} pixels in {frames * slices} slices; {MAX_PIXELS} a slice and {MAX_VOXELS} in "
            f"all are read. Crop or split it.",
            code="INPUT_TOO_LARGE",
        )
    if rows < 1 or columns < 1 or frames < 1 or number(data, "BitsAllocated") not in (8, 16, 32):
        raise ImageUnreadable(
            "DICOM: rows, columns, frames or bits of a pixel make no grey image. Export it again.",
            code="DICOM_UNREADABLE",
        )
    highest = number(data, "HighBit")
    if highest is not None and highest != (number(data, "BitsStored") or 0) - 1:
        raise ImageUnreadable(  # ACR-NEMA and DICOM before 2006; decoders take the wrong bits without a word
            f"DICOM: the highest of {number(data, 'BitsStored') or 0:.0f} stored bits is bit {highest:.0f}, and what "
            f"lies below them would be read as grey. Export it again with current software.",
            code="INTENSITY_INVALID",
        )
    _check_codec(syntax_of(data))


def decoded(data: Dataset) -> Iterator[NDArray[Any]]:
    """The stored numbers [rows, columns] of each frame, in the order of the file. For use inside `unbroken`."""
    syntax, rows, columns, frames = syntax_of(data), int(data.Rows), int(data.Columns), frame_count(data)
    data.file_meta.TransferSyntaxUID = syntax
    if syntax not in PLAIN:
        streams = list(generate_frames(data.PixelData, number_of_frames=frames))
        for stream in streams:
            check_size(stream, rows, columns)
            if syntax == RLELossless and len(stream) > 2 * rows * columns * int(data.BitsAllocated) // 8 + 1024:
                raise ValueError  # run lengths are never twice as long as what they unpack to
            if PLUGINS[syntax][0] == "gdcm":
                check_jpeg(stream, lossless=syntax != JPEGExtended12Bit, bits_allocated=int(data.BitsAllocated))
        if syntax == JPEGExtended12Bit and int(data.BitsAllocated) > 8:
            yield from (_twelve_bits(stream, data) for stream in streams)
            return
    count = 0
    plugin = PLUGINS[syntax][0] if syntax in PLUGINS else ""
    for frame, _ in get_decoder(syntax).iter_array(data, raw=True, decoding_plugin=plugin):
        count += 1
        yield frame
    if count != frames:
        raise EOFError


def meaning(data: Dataset, modality: str | None, scale: Dataset) -> Meaning:
    """What the stored numbers of a slice mean, with the slope and intercept of that slice.

    Padding of CT becomes air, if it is a value that no tissue has; elsewhere it becomes the lowest value there is.

    Args:
        scale: where slope, intercept and their unit stand: `data` itself, or the macro of a frame.

    Raises:
        ImageUnreadable: INTENSITY_INVALID, for CT without slope and intercept or in another unit than HU, and scales
            that are no straight line.
    """
    slope, intercept = number(scale, "RescaleSlope"), number(scale, "RescaleIntercept")
    if modality == "CT" and text(scale, "RescaleType") not in HOUNSFIELD:
        raise ImageUnreadable(
            "DICOM: CT whose RescaleType is not HU: a map of iodine, of electrons or of atomic numbers, as spectral "
            "scanners make them. Give the series in Hounsfield units.",
            code="INTENSITY_INVALID",
        )
    if (slope is None or intercept is None) and modality == "CT":
        raise ImageUnreadable(
            "DICOM: CT without RescaleSlope and RescaleIntercept, so nobody knows its Hounsfield units. "
            "Export the original from the PACS.",
            code="INTENSITY_INVALID",
        )
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if not 0 < abs(slope) < 1e9 or abs(intercept) > 1e9 or "ModalityLUTSequence" in data:
        raise ImageUnreadable(
            "DICOM: the scale of the pixels is a table, 0 or beyond all bounds; slope and intercept are read.",
            code="INTENSITY_INVALID",
        )
    if modality == "CT" and slope < 0:
        raise ImageUnreadable(
            "DICOM: CT whose RescaleSlope is below 0: dense would be dark. Export the original from the PACS.",
            code="INTENSITY_INVALID",
        )
    bits, allocated, signed = int(data.BitsStored), int(data.BitsAllocated), int(data.PixelRepresentation) == 1
    padding = _padding(data, signed, allocated)
    if modality == "CT" and padding is not None:
        low_hu, high_hu = sorted(value * slope + intercept for value in padding)
        if high_hu >= TISSUE_HU[0] and low_hu <= TISSUE_HU[1]:
            padding = None
    mirror = None
    if text(data, "PhotometricInterpretation") == "MONOCHROME1" and modality not in MEASURED:
        mirror = -1.0 if signed else 2.0**bits - 1
    return Meaning(slope, intercept, padding, AIR_HU if modality == "CT" else None, mirror)


def put(stored: NDArray[Any], means: Meaning, out: NDArray[np.float32]) -> None:
    """Fills `out` float32[rows, columns], which may be flipped, with what the stored numbers mean."""
    values: NDArray[Any] = stored
    if means.mirror is not None:
        values = means.mirror - values.astype(np.float64)
    if means.slope == 1:
        np.add(values, np.float32(means.intercept), out=out, casting="same_kind")
    else:
        out[...] = values * means.slope + means.intercept  # in float64: float32 would be off by half a unit of 4095
    if means.padding is None:
        return
    low, high = means.padding
    padded = stored == low if low == high else (stored >= low) & (stored <= high)
    if padded.any():
        real = out[~padded]
        out[padded] = means.air if means.air is not None else real.min() if real.size else 0


def _padding(data: Dataset, signed: bool, bits: int) -> tuple[float, float] | None:
    """PixelPaddingValue to PixelPaddingRangeLimit; some write it unsigned where pixels are signed, and vice versa."""
    value = number(data, "PixelPaddingValue")
    if value is None:
        return None
    limit = number(data, "PixelPaddingRangeLimit")
    ends = []
    for end in (value, value if limit is None else limit):
        if signed and end >= 2 ** (bits - 1):
            end -= 2**bits
        elif not signed and end < 0:
            end += 2**bits
        ends.append(end)
    return min(ends), max(ends)


def _check_codec(syntax: UID) -> None:
    if syntax in PLAIN:
        return
    name = f"{syntax.name} ({syntax})" if syntax.is_transfer_syntax and not syntax.is_private else "unknown to DICOM"
    if syntax not in PLUGINS:
        raise ImageUnreadable(
            f"DICOM: no decoder here knows the transfer syntax, {name}. Export it uncompressed or as JPEG 2000.",
            code="DICOM_CODEC_MISSING",
        )
    plugin, packages = PLUGINS[syntax]
    if plugin not in get_decoder(syntax).available_plugins:
        raise ImageUnreadable(
            f"DICOM: the transfer syntax {name} needs a decoder that is not installed. Install {packages}.",
            code="DICOM_CODEC_MISSING",
        )


def _twelve_bits(stream: bytes, data: Dataset) -> NDArray[np.uint16]:
    """A JPEG frame of 12 bits, by gdcm itself: pydicom 3.0 leaves these to a GPL plug-in.

    gdcm says on stderr that its decoder of 8 bits does not fit, and takes that of 12.
    """
    import gdcm

    element, fragment, fragments = gdcm.DataElement(), gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(stream)
    fragments.AddFragment(fragment)
    element.SetTag(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    codec, out = gdcm.JPEGCodec(), gdcm.DataElement()
    codec.SetNumberOfDimensions(2)
    codec.SetDimensions((int(data.Columns), int(data.Rows), 1))
    codec.SetPlanarConfiguration(0)
    codec.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    codec.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
    if not codec.Decode(element, out):
        raise EOFError
    values = out.GetByteValue().GetBuffer().encode("utf-8", "surrogateescape")
    return np.frombuffer(values, "<u2").reshape(int(data.Rows), int(data.Columns))
