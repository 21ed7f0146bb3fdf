"""Which series a folder holds: headers only, and no trust in names, DICOMDIR or instance numbers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword

from fedclient.data.dicom_header import load_head, number, numbers, text, unbroken
from fedclient.data.formats import HEAD_BYTES, is_dicom
from fedclient.data.provenance import MEASURED, MODALITIES, one_of
from fedclient.data.stack import TOLERANCE_MM, Series, Slice, along_normal, even, parallel, plane
from fedclient.data.where import files_below
from shared_models.errors import ImageUnreadable

KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "ImageType", "Rows", "Columns", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber", "NumberOfFrames", "AcquisitionNumber",
    "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "PatientID", "StudyInstanceUID", "SliceThickness",
    "SpacingBetweenSlices",
)  # fmt: skip
OBJECTS = frozenset(
    ("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "RTIMAGE", "SR", "PR", "KO", "REG", "FID", "DOC", "PLAN", "ECG")
)  # modalities that are no images
MACOS = "._"  # what it leaves beside each file on a foreign disk or in an archive; `._a.dcm` is no DICOM
DIRECTORY = "1.2.840.10008.1.3.10"
TAKES = ("AcquisitionNumber", "EchoTime", "TemporalPositionIdentifier", "DiffusionBValue")
KIND = 3  # values of ImageType that tell images apart wherever they lie (ORIGINAL, PRIMARY, AXIAL)
_TAGS = [tag for keyword in KEYWORDS if (tag := tag_for_keyword(keyword)) is not None]


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds.

    Attributes:
        objects: DICOM files that are no images (SEG, RTSTRUCT, SR, ...), for whoever reads labels.
        unreadable: DICOM, or named `.dcm`, but broken (DICOM_UNREADABLE), or with a head of which more would have to be
            read than is (INPUT_TOO_LARGE).
        ignored: how many files of what kind were passed over: `not DICOM`, `DICOMDIR`, `localiser`, `link`,
            `no file`.
    """

    series: tuple[Series, ...]
    objects: tuple[Path, ...] = field(repr=False)
    unreadable: Mapping[Path, ImageUnreadable] = field(repr=False)
    ignored: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Head:
    slice: Slice
    key: tuple[str, ...]
    alone: bool
    image_type: tuple[str, ...]
    take: tuple[str, ...]
    thickness_mm: float
    stated_mm: float
    frames: int
    study: str


def find_series(folder: Path) -> Found:
    """The image series below a folder, as `series_among` has them.

    Raises:
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder.
    """
    ignored: Counter[str] = Counter()
    return series_among(files_below(folder.resolve(), ignored), ignored)


def series_among(paths: Iterable[Path], ignored: Counter[str]) -> Found:
    """The image series among files.

    Files belong together that share series, patient, modality, kind and type of image, rows, columns, orientation and
    pixel size. Where several acquisitions, echoes, time points or b-values of such a group cover the same part of the
    patient, each is a series of its own; where they follow one another, as in step-and-shoot CT, they are one. They are
    one too where acquisitions, or types that begin alike, lie in turn, each in the holes of the others, and fill them.
    About 0.4 ms a file.

    Args:
        ignored: what was passed over so far, which is counted on.
    """
    groups: dict[tuple[str, ...], list[_Head]] = {}
    objects: list[Path] = []
    unreadable: dict[Path, ImageUnreadable] = {}
    for path in paths:
        try:
            data = _head(path)
        except ImageUnreadable as e:
            unreadable[path] = e.with_traceback(None)
            continue
        if data is None:
            ignored["not DICOM"] += 1
        elif text(data.file_meta, "MediaStorageSOPClassUID") == DIRECTORY:
            ignored["DICOMDIR"] += 1
        elif text(data, "Modality") in OBJECTS:
            objects.append(path)
        elif not (number(data, "Rows") and number(data, "Columns")):
            if "SOPClassUID" in data and text(data, "Modality") not in MODALITIES:
                objects.append(path)
            else:
                unreadable[path] = ImageUnreadable(
                    "DICOM: the file is broken or cut short. Copy or export it again.", "DICOM_UNREADABLE"
                )
        elif "LOCALIZER" in text(data, "ImageType").split("\\"):
            ignored["localiser"] += 1
        else:
            head = _described(path, data)
            groups.setdefault(head.key, []).append(head)
    stacks = [each for group in groups.values() for stack in _by_plane(group) for each in _by_take(stack)]
    uids = ["" if stack[0].alone else stack[0].key[0] for stack in stacks]
    images = Counter(uids)
    series = [_series(stack, images[uid] - 1 if uid else 0) for stack, uid in zip(stacks, uids, strict=True)]
    return Found(tuple(series), tuple(objects), unreadable, dict(ignored))


def _head(path: Path) -> Dataset | None:
    """Some elements; None for what is no DICOM."""
    if path.name.startswith(MACOS) or not path.is_file():  # a pipe or a device
        return None
    with unbroken():
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        return load_head(path, _TAGS) if is_dicom(head) or path.suffix.lower() == ".dcm" else None


def _described(path: Path, data: Dataset) -> _Head:
    frames, instance = int(number(data, "NumberOfFrames") or 1), number(data, "InstanceNumber")
    where = None
    if frames == 1:
        try:
            where = plane(
                numbers(data, "ImagePositionPatient", 3),
                numbers(data, "ImageOrientationPatient", 6),
                numbers(data, "PixelSpacing", 2),
            )
        except ImageUnreadable:  # who reads the series is told
            where = None
    shared = ("SeriesInstanceUID", "Modality", "Rows", "Columns", "SOPClassUID", "PatientID")
    image_type = tuple(text(data, "ImageType").split("\\"))
    placeless = "ImageOrientationPatient" not in data and text(data, "Modality") not in MEASURED
    alone = frames > 1 or placeless
    return _Head(
        slice=Slice(path, text(data, "SOPInstanceUID"), None if instance is None else int(instance), where),
        key=(*(text(data, keyword) for keyword in shared), *image_type[:KIND], str(path) if alone else ""),
        alone=alone,
        image_type=image_type,
        take=tuple(text(data, keyword) for keyword in TAKES),
        thickness_mm=number(data, "SliceThickness") or 0.0,
        stated_mm=number(data, "SpacingBetweenSlices") or 0.0,
        frames=frames,
        study=text(data, "StudyInstanceUID"),
    )


def _by_plane(heads: Sequence[_Head]) -> list[list[_Head]]:
    """Heads of one orientation and pixel size each; those without a place together."""
    stacks: list[list[_Head]] = []
    for head in heads:
        for stack in stacks:
            ours, theirs = head.slice.where, stack[0].slice.where
            if (ours is None and theirs is None) or (ours and theirs and parallel(ours, theirs)):
                stack.append(head)
                break
        else:
            stacks.append([head])
    return stacks


def _by_take(heads: Sequence[_Head]) -> Iterator[Sequence[_Head]]:
    """The stacks that are an image each, along their normal where they have one."""
    kinds: dict[tuple[str, ...], list[_Head]] = {}
    for head in heads:
        kinds.setdefault(head.image_type, []).append(head)
    contrasts: dict[frozenset[tuple[str, ...]], list[Sequence[_Head]]] = {}
    for stack in (take for alike in kinds.values() for take in _takes(alike)):
        contrasts.setdefault(frozenset(head.take[1:] for head in stack), []).append(stack)
    for stacks in contrasts.values():
        woven = _woven(stacks) if len(stacks) > 1 else None
        yield from stacks if woven is None else [woven]


def _takes(heads: Sequence[_Head]) -> list[Sequence[_Head]]:
    """One stack, or one for each take if two takes overlap."""
    planes = [head.slice.where for head in heads]
    if any(where is None for where in planes):
        return [heads]
    heights = along_normal([where for where in planes if where is not None])
    takes: dict[tuple[str, ...], list[tuple[float, _Head]]] = {}
    for height, head in sorted(zip(heights.tolist(), heads, strict=True), key=lambda pair: pair[0]):
        takes.setdefault(head.take, []).append((height, head))
    ranges = sorted((stack[0][0], stack[-1][0]) for stack in takes.values())
    overlap = any(
        after[0] < before[1] - TOLERANCE_MM or np.allclose(after, before, rtol=0, atol=TOLERANCE_MM)
        for before, after in pairwise(ranges)
    )
    stacks = list(takes.values()) if overlap else [[pair for each in takes.values() for pair in each]]
    return [[head for _, head in sorted(stack, key=lambda pair: pair[0])] for stack in stacks]


def _woven(stacks: Sequence[Sequence[_Head]]) -> list[_Head] | None:
    """All slices of stacks that lie in turn: no two at one place, all at equal distances, and one alone has holes.
    Whoever reads them refuses those of which a slice is lost or, where each was counted, is there twice.

    Whole acquisitions may lie in turn by chance, such as phases of a contrast medium, or thin slices far apart in and
    out of breath: each is at equal distances on its own, and together they overlap or leave gaps still. So where each
    is, those are joined that are as far apart as they are thick, or as they state; likewise where slices are lost, also
    those that overlap, or say nothing of it. Where most slices lie alone, each was counted as an acquisition.
    """
    heads = [head for stack in stacks for head in stack]
    planes = [head.slice.where for head in heads if head.slice.where is not None]
    if len(planes) < len(heads):
        return None
    heights = along_normal(planes)
    at = iter(heights.tolist())
    once = [{(next(at), each.slice.sop_uid or str(each.slice.path)) for each in stack} for stack in stacks]  # no copies
    own = [sorted(height for height, _ in stack) for stack in once]
    apart_mm = np.diff(sorted(height for each in own for height in each))
    if len(apart_mm) == 0:
        return None
    alone = sum(len(each) == 1 for each in own)
    counted = alone >= 3 and 2 * alone > sum(map(len, own))
    joined = [heads[n] for n in np.argsort(heights, kind="stable")]
    if counted and 2 * (apart_mm < TOLERANCE_MM).sum() < len(apart_mm):
        return joined
    if apart_mm.min() < TOLERANCE_MM:
        return None
    usual_mm = float(np.median(apart_mm))
    lost = np.rint(apart_mm / usual_mm) - 1
    if not even(apart_mm - usual_mm * lost):
        return None
    whole, holed = all(len(each) == 1 or even(np.diff(each)) for each in own), bool(lost.any())
    if whole and lost.sum() > 1:  # two that reach beyond each other
        return None
    if not (whole or holed):
        return joined
    thickness_mm = max(head.thickness_mm for head in heads)
    stated_mm = max(head.stated_mm for head in heads)
    full = any(0.9 * mm <= usual_mm <= 1.1 * mm for mm in (thickness_mm, stated_mm))
    full = full or (holed and (usual_mm <= 1.1 * thickness_mm or not (thickness_mm or stated_mm)))
    hole_mm = max(np.diff(each).max(initial=0) for each in own)
    return joined if full and hole_mm >= max(1.5 * usual_mm, 1.1 * thickness_mm) else None


def _series(heads: Sequence[_Head], siblings: int) -> Series:
    uid, modality, rows, columns, sop_class, patient = heads[0].key[:6]
    return Series(
        uid=uid,
        modality=one_of(modality, MODALITIES),
        rows=int(float(rows)),
        columns=int(float(columns)),
        frames=heads[0].frames,
        slices=tuple(head.slice for head in heads),
        patient=patient,
        study_uid=heads[0].study,
        image_type=heads[0].image_type,
        sop_class=sop_class,
        siblings=siblings,
    )
