"""DICOM SEG, BINARY, on the very slices of the source: same frame of reference, same geometry, all frames written.

highdicom makes it from runs of slices that are put together, so that a thousand slices take the memory of a few.
"""

import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_sequence_item
from pydicom.valuerep import DSfloat

from fedclient.data.dicom_header import number
from fedclient.data.volume import LPS_TO_RAS
from fedclient.predict.blocks import Grid
from fedclient.predict.case import Prediction
from fedclient.predict.codes import finding_of, meaning_of
from fedclient.predict.headers import Headers
from fedclient.predict.maker import MAKER, algorithm, made_by
from fedclient.predict.segments import Segment, segment_planes
from fedclient.predict.views import frames, slice_order

RUN = 32  # slices of one piece: a multiple of 8, so that the bits of a piece end with a byte
SERIES = 9101


@dataclass(frozen=True)
class Segmented:
    """A SEG whose frames wait outside of memory.

    Attributes:
        head: all but its frames.
        groups: the items of its per-frame functional groups, as they are written; 0.7 KB each, as objects 80.
        pixels: the bits of its frames.
        vr: of the pixels.
    """

    head: Dataset
    groups: bytes
    pixels: IO[bytes]
    vr: str

    def save(self, file: IO[bytes]) -> None:
        """Writes the head, and behind it the two elements with the last tags that a SEG has; once."""
        self.head.save_as(file, enforce_file_format=True)
        file.write(struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, len(self.groups)))
        file.write(self.groups)
        with self.pixels:
            size = self.pixels.seek(0, os.SEEK_END)
            file.write(struct.pack("<HH2sHL", 0x7FE0, 0x0010, self.vr.encode(), 0, size + size % 2))
            self.pixels.seek(0)
            shutil.copyfileobj(self.pixels, file)
            file.write(b"\0" * (size % 2))


def segmentation(prediction: Prediction, headers: Headers, segments: Sequence[Segment]) -> Segmented:
    """The SEG of what is marked, a segment each; frames of a segment that is empty there are written too.

    Viewers have had trouble with files that leave them out.
    """
    described = [_described(n, each, prediction) for n, each in enumerate(segments, start=1)]
    uids: dict[str, Any] = {"series_instance_uid": hd.UID(), "sop_instance_uid": hd.UID()}
    grid = prediction.grid
    found = frames(segment_planes(prediction, segments, slice_order(grid)), grid)
    if len(headers.slices) == 1:
        pixels = np.stack(list(found))
        places = _places(prediction, len(pixels))
        return _joined(iter([_piece(prediction, headers, headers.slices, pixels, described, uids, places)]), headers)
    pieces = (
        _piece(prediction, headers, headers.slices[at : at + RUN], pixels, described, uids)
        for at, pixels in zip(range(0, len(headers.slices), RUN), _runs(found), strict=True)
    )
    return _joined(pieces, headers)


def _runs(found: Iterator[NDArray[np.bool_]]) -> Iterator[NDArray[np.bool_]]:
    while run := list(islice(found, RUN)):
        yield np.stack(run)


def _described(number: int, segment: Segment, prediction: Prediction) -> SegmentDescription:
    meaning = meaning_of(segment.name)
    return SegmentDescription(
        segment_number=number,
        segment_label=segment.label[:64],
        segmented_property_category=meaning.category,
        segmented_property_type=meaning.type if meaning.known else finding_of(segment.name),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm(prediction.model),
        tracking_uid=hd.UID(),
        tracking_id=segment.label[:64],
    )


def _piece(
    prediction: Prediction,
    headers: Headers,
    slices: Sequence[Dataset],
    pixels: NDArray[np.bool_],
    described: Sequence[SegmentDescription],
    uids: dict[str, Any],
    places: tuple[hd.PlaneOrientationSequence, list[hd.PlanePositionSequence]] | None = None,
) -> Segmentation:
    """From bool[slices, segments, rows, columns]."""
    orientation, positions = places or (None, None)
    sources = list(slices)
    sources[0] = _filled(slices[0], headers)
    with made_by():
        _measure(sources[0], prediction.grid)
        return Segmentation(
            source_images=sources,
            pixel_array=np.ascontiguousarray(np.moveaxis(pixels, 1, -1)).astype(np.uint8),
            segmentation_type="BINARY",
            segment_descriptions=described,
            series_number=SERIES,
            instance_number=1,
            omit_empty_frames=False,
            content_label="SEGMENTATION",
            content_description=f"{prediction.model.name} {prediction.model.version}"[:64],
            series_description="AI segmentation, not for diagnosis",
            plane_orientation=orientation,
            plane_positions=positions,
            **uids,
            device_serial_number="0",
            **MAKER,
        )


def _filled(first: Dataset, headers: Headers) -> Dataset:
    """A slice with what of patient and study only the first header holds."""
    if first is headers.first:
        return first
    filled = Dataset()
    filled.update(headers.first)
    filled.update(first)
    filled.file_meta = headers.first.file_meta
    return filled


def _measure(first: Dataset, grid: Grid) -> None:
    """Lets a header say how far apart its planes lie: many say something else, or nothing, and highdicom repeats it."""
    assert grid.voxel_of_pixel is not None
    apart_mm = grid.spacing_mm[int(np.abs(grid.voxel_of_pixel[:3, 2]).argmax())]
    shared = first.get("SharedFunctionalGroupsSequence")
    measures = shared[0].PixelMeasuresSequence[0] if shared else first
    thickness_mm = number(measures, "SliceThickness") or 0
    measures.SliceThickness = DSfloat(thickness_mm if thickness_mm > 0 else apart_mm, auto_format=True)
    measures.SpacingBetweenSlices = DSfloat(apart_mm, auto_format=True)


def _places(
    prediction: Prediction, count: int
) -> tuple[hd.PlaneOrientationSequence, list[hd.PlanePositionSequence]] | None:
    """Of a source of many frames, whose own order need not be that along the normal."""
    grid = prediction.grid
    if count == 1 or grid.voxel_of_pixel is None:
        return None
    lps = LPS_TO_RAS @ grid.affine_ras @ grid.voxel_of_pixel
    cosines = (lps[:3, :2] / np.linalg.norm(lps[:3, :2], axis=0)).T.ravel().tolist()
    positions = [hd.PlanePositionSequence("PATIENT", (lps @ (0, 0, n, 1))[:3].tolist()) for n in range(count)]
    return hd.PlaneOrientationSequence("PATIENT", cosines), positions


def _joined(pieces: Iterator[Segmentation], headers: Headers) -> Segmented:
    """One SEG of pieces that share all but their frames."""
    pixels = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as what it is part of
    try:
        return _spooled(pieces, headers, pixels)
    except BaseException:
        pixels.close()
        raise


def _spooled(pieces: Iterator[Segmentation], headers: Headers, pixels: IO[bytes]) -> Segmented:
    many = len(headers.slices) > 1
    place = {_position(each): n for n, each in enumerate(headers.slices, start=1)} if many else {}
    head: Dataset | None = None
    vr, frames_in_all, groups = "OB", 0, DicomBytesIO()
    groups.is_little_endian, groups.is_implicit_VR = True, False
    for piece in pieces:
        for group in piece.PerFrameFunctionalGroupsSequence:
            if many:
                index = group.FrameContentSequence[0]
                at = place[_position(group.PlanePositionSequence[0])]
                index.DimensionIndexValues = [index.DimensionIndexValues[0], at]
            write_sequence_item(groups, group, ["iso8859"])
        pixels.write(piece.PixelData[: math.ceil(int(piece.NumberOfFrames) * piece.Rows * piece.Columns / 8)])
        frames_in_all += int(piece.NumberOfFrames)
        vr = piece["PixelData"].VR
        del piece.PixelData, piece.PerFrameFunctionalGroupsSequence
        if head is None:
            head = piece
            continue
        referred = piece.ReferencedSeriesSequence[0].ReferencedInstanceSequence
        head.ReferencedSeriesSequence[0].ReferencedInstanceSequence.extend(referred)
        if piece.SegmentsOverlap == "YES":
            head.SegmentsOverlap = "YES"
    assert head is not None
    head.NumberOfFrames = frames_in_all
    return Segmented(head, groups.getvalue(), pixels, vr)


def _position(data: Dataset) -> tuple[float, ...]:
    return tuple(float(value) for value in data.ImagePositionPatient)
