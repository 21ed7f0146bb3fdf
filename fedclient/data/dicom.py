"""DICOM images into volumes: a series of slices, one file of many frames, or a radiograph.

Outcomes that readers elsewhere leave to chance: a leaning stack (gantry tilt) is refused with its angle, because a
sheared grid that is taken for a straight one bends the patient; a Siemens or UIH mosaic is refused by name; nothing
is resampled.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset

from fedclient.data.dicom_folder import OBJECTS
from fedclient.data.dicom_folder import Found as Found
from fedclient.data.dicom_folder import find_series as find_series
from fedclient.data.dicom_header import MAX_BYTES, load, number, numbers, text, unbroken
from fedclient.data.dicom_pixels import (
    LOSSY,
    Meaning,
    check_pixels,
    decoded,
    frame_count,
    meaning,
    put,
    syntax_of,
)
from fedclient.data.provenance import (
    BODY_PARTS,
    KERNELS,
    MANUFACTURERS,
    MEASURED,
    MODALITIES,
    MODELS,
    PHOTOMETRICS,
    POSITIONS,
    Provenance,
    known_words,
    one_of,
    within,
)
from fedclient.data.stack import Grid, Plane, plane, stack
from fedclient.data.stack import Series as Series
from fedclient.data.stack import Slice as Slice
from fedclient.data.volume import FRONTAL_RAS, PICTURE_PIXELS, PLANES, Volume, turn_to_ras
from shared_models.errors import ImageUnreadable

SHARED = ("SeriesInstanceUID", "Modality", "Rows", "Columns", "FrameOfReferenceUID")  # by the slices of one volume
MOSAICS = {"MOSAIC": "Siemens", "VFRAME": "UIH"}  # in ImageType: all slices of a volume as tiles of one picture
# PatientOrientation, in RAS
_TOWARDS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}


def read_series(files: Sequence[Path]) -> Volume:
    """The volume of the slices in these files, in whatever order they come; a lone file may be any kind of image.

    Raises:
        ImageUnreadable: its `code` says which: SERIES_GAP, SERIES_DUPLICATE, SERIES_IRREGULAR, SERIES_TILT,
            SERIES_MIXED, GEOMETRY_MISSING, GEOMETRY_INVALID, DICOM_UNREADABLE, DICOM_CODEC_MISSING, DICOM_MOSAIC,
            MODALITY_MISMATCH, INTENSITY_INVALID, INPUT_TOO_LARGE.
    """
    with unbroken():
        if sum(path.stat().st_size for path in files) > MAX_BYTES:
            raise ImageUnreadable(f"DICOM: a series of more than {MAX_BYTES} bytes. Split it.", "INPUT_TOO_LARGE")
        data = [load(path) for path in files]
        if len(data) == 1 and (frame_count(data[0]) > 1 or "SharedFunctionalGroupsSequence" in data[0]):
            return _frames(data[0])
        return _slices(data)


def _slices(data: list[Dataset]) -> Volume:
    if not data:
        raise ImageUnreadable("DICOM: a series without files.", code="DICOM_UNREADABLE")
    first = data[0]
    for each in data:
        _check_kind(each)
        check_pixels(each, len(data))
        if _kind(each) != _kind(first) or frame_count(each) > 1:
            raise ImageUnreadable(
                "DICOM: the files differ in series, modality, rows, columns or frame of reference. Give each series on "
                "its own.",
                code="SERIES_MIXED",
            )
    modality = _modality(first)
    means = [meaning(each, modality, each) for each in data]
    if modality not in MEASURED and not any("ImageOrientationPatient" in each for each in data):
        if len(data) > 1:
            raise ImageUnreadable(
                "DICOM: several radiographs are no volume. Give each as a case of its own.", code="MODALITY_MISMATCH"
            )
        return _radiograph(first, modality, means[0])
    planes = [_plane(each, each, each) for each in data]
    grid = stack(planes, _thickness_mm(first))
    shape, facts = (int(first.Columns), int(first.Rows), len(data)), _provenance(first, len(data), means[0])

    def pixels() -> Iterator[tuple[int, NDArray[Any], Meaning]]:
        for place, index in enumerate(grid.order):
            (stored,) = decoded(data[index])
            data[index] = Dataset()  # its bytes are no longer needed
            yield place, stored, means[index]

    return _volume(grid, shape, pixels(), modality, facts)


def _frames(data: Dataset) -> Volume:
    _check_kind(data)
    check_pixels(data, slices=1)
    count, modality = frame_count(data), _modality(data)
    if "PerFrameFunctionalGroupsSequence" in data or "SharedFunctionalGroupsSequence" in data:
        places, means = _functional_groups(data, count, modality)
    else:
        places = _classic_frames(data, count)
        means = [meaning(data, modality, data)] * count
    grid = stack(places, _thickness_mm(_scoped(data)[-1]))
    place_of = {index: place for place, index in enumerate(grid.order)}
    pixels = ((place_of[n], stored, means[n]) for n, stored in enumerate(decoded(data)))
    shape = (int(data.Columns), int(data.Rows), count)
    return _volume(grid, shape, pixels, modality, _provenance(data, count, means[0]))


def _volume(
    grid: Grid,
    shape: tuple[int, int, int],
    pixels: Iterable[tuple[int, NDArray[Any], Meaning]],
    modality: str | None,
    facts: Provenance,
) -> Volume:
    """Fills a volume a few slices at a time, for the reason that `contiguous` gives; they may come in any order."""
    columns, rows, slices = shape
    turn = turn_to_ras(grid.affine_ras, shape)
    by_column, by_row, by_slice = turn.flips
    voxels = np.empty([shape[axis] for axis in turn.axes], np.float32)
    stored_order = voxels.transpose(np.argsort(turn.axes))  # [column, row, slice], before flips
    begun: dict[int, NDArray[np.float32]] = {}
    filled: Counter[int] = Counter()
    for place, stored, means in pixels:
        at = place if by_slice > 0 else slices - 1 - place
        begin = at - at % PLANES
        if begin not in begun:
            begun[begin] = np.empty((min(PLANES, slices - begin), rows, columns), np.float32)
        block = begun[begin]
        put(stored, means, block[at - begin, ::by_row, ::by_column])
        filled[begin] += 1
        if filled[begin] == len(block):
            stored_order[:, :, begin : begin + len(block)] = begun.pop(begin).transpose(2, 1, 0)
    if filled.total() != slices:
        raise EOFError
    return Volume(
        voxels=voxels[None],
        affine_ras=grid.affine_ras @ turn.stored_of_voxel,
        modality=modality,
        provenance=facts,
        voxel_of_pixel=turn.voxel_of_stored,
    )


def _radiograph(data: Dataset, modality: str | None, means: Meaning) -> Volume:
    """As displayed, [1, rows, columns, 1]; PatientOrientation, where it is stated, is told by the affine."""
    (stored,) = decoded(data)
    voxels = np.empty(stored.shape, np.float32)
    put(stored, means, voxels)
    spacing_mm = numbers(data, "PixelSpacing", 2) or numbers(data, "ImagerPixelSpacing", 2) or (1.0, 1.0)
    affine_ras = FRONTAL_RAS.copy()
    across, down = (_TOWARDS.get(word[:1]) for word in (text(data, "PatientOrientation") + "\\").split("\\")[:2])
    if across is not None and down is not None and not np.dot(across, down):
        affine_ras[:3, :3] = np.stack([down, across, np.cross(down, across)], axis=1)
    if min(spacing_mm) > 0:
        affine_ras[:3, :2] *= spacing_mm
    return Volume(voxels[None, :, :, None], affine_ras, modality, _provenance(data, 1, means), PICTURE_PIXELS.copy())


def _functional_groups(data: Dataset, count: int, modality: str | None) -> tuple[list[Plane], list[Meaning]]:
    """Geometry and scale of each frame of an enhanced image (DICOM PS3.3 C.7.6.16)."""
    shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    each_frame = list(data.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * count)
    if len(each_frame) != count:
        raise EOFError
    if (number(data, "InConcatenationTotalNumber") or 1) > 1:
        raise ImageUnreadable(
            "DICOM: the file is one part of an image that was split over several. Export it in one.", code="SERIES_GAP"
        )

    def group(frame: Dataset, name: str) -> Dataset:
        found: Dataset = (frame.get(name) or shared.get(name) or [Dataset()])[0]
        return found

    planes, means = [], []
    for frame in each_frame:
        position, orientation = group(frame, "PlanePositionSequence"), group(frame, "PlaneOrientationSequence")
        planes.append(_plane(position, orientation, group(frame, "PixelMeasuresSequence")))
        scale = group(frame, "PixelValueTransformationSequence") or data
        means.append(meaning(data, modality, scale))
    return planes, means


def _classic_frames(data: Dataset, count: int) -> list[Plane]:
    """Frames behind one another, as nuclear medicine has them: the position of the first and a distance."""
    where = (data.get("DetectorInformationSequence") or [data])[0]
    if numbers(where, "ImagePositionPatient", 3) is None:
        where = data
    step_mm = number(data, "SpacingBetweenSlices")
    if step_mm is None or numbers(where, "ImagePositionPatient", 3) is None:
        raise ImageUnreadable(
            f"DICOM: {count} frames that have no place in the patient (a film or a run). Give single images.",
            code="GEOMETRY_MISSING",
        )
    first = _plane(where, where, data)
    normal = np.cross(first.along_row, first.along_column)
    positions = [tuple(np.array(first.position_mm) + normal * step_mm * n) for n in range(count)]
    return [Plane(position, first.along_row, first.along_column, first.spacing_mm) for position in positions]


def _plane(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    return plane(
        numbers(position, "ImagePositionPatient", 3),
        numbers(orientation, "ImageOrientationPatient", 6),
        numbers(measures, "PixelSpacing", 2),
    )


def _thickness_mm(data: Dataset) -> float:
    """For a lone slice; 1 where nothing is said."""
    stated = (number(data, "SpacingBetweenSlices"), number(data, "SliceThickness"))
    return next((abs(mm) for mm in stated if mm), 1.0)


def _kind(data: Dataset) -> tuple[str, ...]:
    """What the slices of one series share."""
    return tuple(text(data, keyword) for keyword in SHARED)


def _modality(data: Dataset) -> str | None:
    return one_of(text(data, "Modality"), MODALITIES)


def _check_kind(data: Dataset) -> None:
    if "DirectoryRecordSequence" in data:
        raise ImageUnreadable(
            "DICOM: the file is a DICOMDIR, a table of contents that is not used here. Give the folder of the series.",
            code="MODALITY_MISMATCH",
        )
    if text(data, "Modality") in OBJECTS:
        raise ImageUnreadable(
            f"DICOM: the file is no image but a {text(data, 'Modality')} object. Give it as a label of its series.",
            code="MODALITY_MISMATCH",
        )
    kinds = text(data, "ImageType").split("\\")
    if "LOCALIZER" in kinds:
        raise ImageUnreadable("DICOM: the image is a localiser. Give the series itself.", code="MODALITY_MISMATCH")
    vendor = next((MOSAICS[kind] for kind in kinds if kind in MOSAICS), None)
    if vendor is not None:
        raise ImageUnreadable(
            f"DICOM: a {vendor} mosaic: the slices of a volume as tiles of one picture. "
            f"Convert it, e.g. with dcm2niix, and give the NIfTI file.",
            code="DICOM_MOSAIC",
        )


def _scoped(data: Dataset) -> list[Dataset]:
    """Where facts of acquisition stand: at the top, and in the macros that all frames share.

    Pixel measures come last, of the first frame where each states its own.
    """
    shared = (data.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    first = (data.get("PerFrameFunctionalGroupsSequence") or [Dataset()])[0]
    macros = [element.value[0] for element in shared if element.VR == "SQ" and element.value]
    measures = (shared.get("PixelMeasuresSequence") or first.get("PixelMeasuresSequence") or [data])[0]
    return [data, *macros, measures]


def _provenance(data: Dataset, slices: int, means: Meaning) -> Provenance:
    scopes = _scoped(data)

    def word(keyword: str) -> str:
        return next((found for scope in scopes if (found := text(scope, keyword))), "")

    def stated(keyword: str, low: float, high: float) -> float | None:
        values = (number(scope, keyword) for scope in scopes)
        return within(next((value for value in values if value is not None), None), low, high)

    syntax = syntax_of(data)
    return Provenance(
        manufacturer=known_words(word("Manufacturer"), MANUFACTURERS),
        model=known_words(word("ManufacturerModelName"), MODELS),
        kernel=known_words(word("ConvolutionKernel"), KERNELS),
        body_part=known_words(word("BodyPartExamined"), BODY_PARTS),
        patient_position=one_of(word("PatientPosition"), POSITIONS),
        slice_thickness_mm=stated("SliceThickness", 0.01, 100),
        tube_kv=stated("KVP", 1, 500),
        gantry_tilt_deg=stated("GantryDetectorTilt", -90, 90),
        rows=int(data.Rows),
        columns=int(data.Columns),
        slices=slices,
        photometric=one_of(text(data, "PhotometricInterpretation"), PHOTOMETRICS),
        transfer_syntax=syntax.keyword or None,
        lossy=syntax in LOSSY or text(data, "LossyImageCompression") == "01",
        inverted=means.mirror is not None,
    )
