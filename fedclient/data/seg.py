"""DICOM SEG as labels, on pydicom alone: a frame is a plane with a position, and is laid into the image by it.

highdicom reads SEG too, but wants every optional module right, which planning and research tools often get wrong;
what is needed here is small, and tests compare the two. Frames are decoded one by one: a SEG of a hundred organs
holds a hundred volumes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels.decoders.base import get_decoder

from fedclient.data.dicom_pixels import PLAIN, PLUGINS, decoded, syntax_of
from fedclient.data.labels import Labels, Mapped, Overlap, Structure, choose, paint, place, refused
from fedclient.data.objects import Referenced, opened, references
from fedclient.data.volume import LPS_TO_RAS, MAX_PIXELS, Volume
from shared_models.errors import ImageUnreadable

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
WHAT = "DICOM SEG"
THRESHOLD = 0.5  # of a fractional segment, in units of its MaximumFractionalValue: from there on it is labelled
SAME_SPACING = 0.1  # how far the stated distance of planes may be off the image's


@dataclass(frozen=True, slots=True)
class _Frame:
    """One plane: its segment (None in a labelmap) and float64[4, 4], (column, row, 0, 1) -> index in the image."""

    segment: int | None
    to_index: NDArray[np.float64]


def read_segments(path: Path) -> tuple[Referenced, tuple[Structure, ...]]:
    """The series that a DICOM SEG was drawn on, and its segments: what a mapping can name."""
    with opened(path, WHAT, (SEGMENTATION, LABELMAP)) as data:
        return references(data), _segments(data)


def read_seg(
    path: Path,
    like: Volume,
    mapping: Mapped,
    *,
    overlap: Overlap = "refuse",
    empty_ok: bool = False,
    threshold: float = THRESHOLD,
) -> Labels:
    """uint8[I, J, K] from a binary, fractional or labelmap SEG; segments that the mapping does not name are left out.

    Args:
        mapping: `{name, number or code (SCT:10200004) of a segment: label value}`.
        overlap: whose a voxel of two segments is: nobody's (an error), or that of the first or last in the mapping.
        empty_ok: a segment that the file lacks, or that has no voxel, is an organ that the patient lacks.
        threshold: share of MaximumFractionalValue (probability or occupancy) from which a voxel is labelled.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE, LABEL_GEOMETRY_MISMATCH, LABEL_VALUES, LABEL_EMPTY.
    """
    with opened(path, WHAT, (SEGMENTATION, LABELMAP)) as data:
        if data.Rows * data.Columns > MAX_PIXELS:
            raise refused("LABEL_UNREADABLE", f"{WHAT}: frames of {data.Rows} x {data.Columns} pixels. Crop them.")
        chosen = choose(_segments(data), mapping, empty_ok)
        frames = _frames(data, like)
        shape = like.voxels.shape[1:]
        if data.SegmentationType == "LABELMAP":
            masks = _of_labelmap(data, frames, chosen, shape)
        else:
            masks = _of_segments(data, frames, chosen, shape, threshold)
        return paint(masks, shape, overlap, empty_ok)


def _segments(data: Dataset) -> tuple[Structure, ...]:
    """All but the background, which a labelmap lists as number 0."""
    return tuple(
        Structure(
            number=int(item.SegmentNumber),
            name=str(item.get("SegmentLabel") or ""),
            codes=tuple(
                f"{code.get('CodingSchemeDesignator')}:{code.get('CodeValue')}"
                for code in item.get("SegmentedPropertyTypeCodeSequence") or ()
            ),
        )
        for item in data.SegmentSequence
        if int(item.SegmentNumber) > 0
    )


def _of_segments(
    data: Dataset,
    frames: Sequence[_Frame],
    chosen: Sequence[tuple[int, tuple[int, ...]]],
    shape: tuple[int, ...],
    threshold: float,
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(value, bool[I, J, K]) of each entry of a binary or fractional SEG."""
    full = 1
    if data.SegmentationType == "FRACTIONAL":
        full = int(data.MaximumFractionalValue)
    elif data.SegmentationType != "BINARY":
        raise refused("LABEL_UNREADABLE", f"{WHAT}: it is neither BINARY, FRACTIONAL nor LABELMAP. Export one of them.")
    for value, numbers in chosen:
        mask = np.zeros(shape, np.bool_)
        for frame, stored in _decoded(data, frames, numbers):
            if int(stored.max()) > full:
                raise refused(
                    "LABEL_VALUES", f"{WHAT}: a value of {stored.max()} where {full} means all. Export it again."
                )
            place((stored >= threshold * full).T[:, :, None], frame.to_index, mask)
        yield value, mask


def _of_labelmap(
    data: Dataset, frames: Sequence[_Frame], chosen: Sequence[tuple[int, tuple[int, ...]]], shape: tuple[int, ...]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(value, bool[I, J, K]) of each entry of a labelmap, whose voxels hold the number of their one segment."""
    table = np.full(1 << 16, 255, np.uint8)  # number of a segment -> place in `chosen`, from 1; 255: no such segment
    table[[0, *(s.number for s in _segments(data))]] = 0
    padding = data.get("PixelPaddingValue")
    if padding is not None:
        table[int(padding)] = 0
    for entry, (_, numbers) in enumerate(chosen, start=1):
        table[list(numbers)] = entry
    entries = np.zeros(shape, np.uint8)
    for frame, stored in _decoded(data, frames, (None,)):
        held = table[stored]
        strange = int((held == 255).sum())
        if strange:
            raise refused(
                "LABEL_VALUES", f"{WHAT}: {strange} voxels of segments that it does not list. Export it again."
            )
        place(held.T[:, :, None], frame.to_index, entries)
    for entry, (value, _) in enumerate(chosen, start=1):
        yield value, entries == entry


def _decoded(
    data: Dataset, frames: Sequence[_Frame], segments: Sequence[int | None]
) -> Iterator[tuple[_Frame, NDArray[Any]]]:
    """The frames of some segments with [Rows, Columns] as stored."""
    wanted = [n for n, frame in enumerate(frames) if frame.segment in segments]
    if not wanted:
        return
    syntax = syntax_of(data)
    plain = syntax in PLAIN and syntax.is_little_endian  # big-endian was retired before there was SEG
    if plain and data.BitsAllocated == 1:
        yield from ((frames[n], _bits(data, n)) for n in wanted)
        return
    if plain:
        for n, (stored, _) in zip(wanted, get_decoder(syntax).iter_array(data, indices=wanted, raw=True), strict=True):
            yield frames[n], stored
        return
    if syntax not in PLUGINS or PLUGINS[syntax][0] not in get_decoder(syntax).available_plugins:
        raise ImageUnreadable(
            f"{WHAT}: no decoder for its transfer syntax is installed. Export it uncompressed.",
            code="DICOM_CODEC_MISSING",
        )
    for frame, stored in zip(frames, decoded(data), strict=True):
        if frame.segment in segments:
            yield frame, stored


def _bits(data: Dataset, number: int) -> NDArray[np.uint8]:
    """0 or 1 [Rows, Columns] of one frame; frames follow each other bit by bit, lowest first (PS3.5 8.1.1).

    pydicom 3.0.2 loses the last pixels of single frames that do not begin with a byte.
    """
    size = data.Rows * data.Columns
    first, last = number * size // 8, -(-(number + 1) * size // 8)
    bits = np.unpackbits(np.frombuffer(data.PixelData, np.uint8)[first:last], bitorder="little")
    return bits[number * size % 8 :][:size].reshape(data.Rows, data.Columns)


def _frames(data: Dataset, like: Volume) -> list[_Frame]:
    """Every frame with its way into the image.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, planes that are further apart, or closer, than the image's.
    """
    shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    groups = data.PerFrameFunctionalGroupsSequence
    if len(groups) != int(data.NumberOfFrames):
        raise refused(
            "LABEL_UNREADABLE", f"{WHAT}: {data.NumberOfFrames} frames, {len(groups)} positions. Export it again."
        )
    to_voxels = np.linalg.inv(like.affine_ras) @ LPS_TO_RAS
    frames: list[_Frame] = []
    for group in groups:
        position = _macro(group, shared, "PlanePositionSequence").ImagePositionPatient
        axes = np.array(_macro(group, shared, "PlaneOrientationSequence").ImageOrientationPatient, np.float64)
        measures = _macro(group, shared, "PixelMeasuresSequence")
        rows_mm, columns_mm = (float(mm) for mm in measures.PixelSpacing)
        plane = np.zeros((4, 4))
        plane[:3, 0], plane[:3, 1] = axes[:3] * columns_mm, axes[3:] * rows_mm
        plane[:3, 3], plane[3, 3] = np.array(position, np.float64), 1
        to_index = to_voxels @ plane
        across = int(np.abs(to_index[:3, :2]).sum(axis=1).argmin())
        to_index[across, 2] = 1
        _check_spacing(measures.get("SpacingBetweenSlices"), like.spacing_mm[across])
        segment = None
        if data.SegmentationType != "LABELMAP":
            segment = int(_macro(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        frames.append(_Frame(segment, to_index))
    return frames


def _macro(group: Dataset, shared: Dataset, name: str) -> Dataset:
    """The item of a functional group, of the frame itself or of all frames."""
    found: Dataset = (group if name in group else shared)[name].value[0]
    return found


def _check_spacing(stated: Any, wanted_mm: float) -> None:
    """Frames that lie on every n-th plane of the image would fit it too, and leave the planes between them empty."""
    if stated is not None and abs(abs(float(stated)) / wanted_mm - 1) > SAME_SPACING:
        raise refused(
            "LABEL_GEOMETRY_MISMATCH",
            f"the planes of the labels lie {abs(float(stated)):.3g} mm apart, those of the image {wanted_mm:.3g} mm. "
            f"Export them on the series that they were drawn on.",
        )
