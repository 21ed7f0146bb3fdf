"""DICOM objects that say something about a series: opened with care, and which series they mean."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import Dataset

from fedclient.data.dicom_header import BROKEN, load, load_head, text, unbroken
from fedclient.data.formats import format_of
from fedclient.data.labels import refused
from shared_models.errors import ImageUnreadable

LABELLING = {  # modality -> SOP classes
    "SEG": ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"),
    "RTSTRUCT": ("1.2.840.10008.5.1.4.1.1.481.3",),
}


@dataclass(frozen=True, slots=True)
class Referenced:
    """What ties an object to its image; identifiers, so not for logs. Empty where the object does not say."""

    series_uid: str = field(repr=False)
    slice_uids: frozenset[str] = field(repr=False, default=frozenset())


def object_kind(path: Path) -> str:
    """`SEG`, `RTSTRUCT`, or nothing for DICOM of another kind.

    Raises:
        ImageUnreadable: a broken file.
    """
    with unbroken():
        modality = text(load_head(path, [0x00080060]), "Modality")
    return modality if modality in LABELLING else ""


def is_object(path: Path) -> bool:
    """Whether a file is a SEG or an RTSTRUCT; raises ImageUnreadable for DICOM that is broken."""
    return path.is_file() and format_of(path) == "dicom" and bool(object_kind(path))


def read_references(path: Path) -> tuple[str, Referenced]:
    """The SOP instance UID of a SEG or an RTSTRUCT, and what it was drawn on.

    Raises:
        ImageUnreadable: see `opened`.
    """
    with opened(path, "SEG or RTSTRUCT", tuple(uid for classes in LABELLING.values() for uid in classes)) as data:
        return str(data.SOPInstanceUID), references(data)


@contextmanager
def opened(path: Path, what: str, classes: Collection[str]) -> Iterator[Dataset]:
    """The object in a file, if it is of one of these SOP classes; pixels undecoded.

    What pydicom raises in the block becomes LABEL_UNREADABLE too: it parses an element when it is first looked at,
    says AttributeError for what the object lacks, and quotes values.

    Raises:
        ImageUnreadable: LABEL_UNREADABLE; INPUT_TOO_LARGE.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                data = load(path)
            except ImageUnreadable as e:
                raise e if e.code == "INPUT_TOO_LARGE" else EOFError from None
            if data.get("SOPClassUID") not in classes:
                raise refused("LABEL_UNREADABLE", f"the file is DICOM, but no {what}. Choose the one that is.")
            yield data
        except BROKEN as e:
            raise refused(
                "LABEL_UNREADABLE",
                f"{what}: the file is broken, cut short, or lacks something ({type(e).__name__}). Export it again.",
            ) from None


def references(data: Dataset) -> Referenced:
    """The series that a SEG or an RTSTRUCT names, and its slices. For use inside `opened`."""
    series = ""
    slices: set[str] = set()
    for item in data.get("ReferencedSeriesSequence") or ():  # SEG
        series = series or item.get("SeriesInstanceUID") or ""
        slices |= _instances(item, "ReferencedInstanceSequence")
    for item in data.get("ReferencedFrameOfReferenceSequence") or ():  # RTSTRUCT
        for study in item.get("RTReferencedStudySequence") or ():
            for each in study.get("RTReferencedSeriesSequence") or ():
                series = series or each.get("SeriesInstanceUID") or ""
                slices |= _instances(each, "ContourImageSequence")
    if not slices:
        slices = _of_parts(data)
    return Referenced(str(series), frozenset(slices))


def _of_parts(data: Dataset) -> set[str]:
    """The slices that frames and contours name each for itself, in files whose header names none."""
    slices: set[str] = set()
    for group in data.get("PerFrameFunctionalGroupsSequence") or ():
        for item in group.get("DerivationImageSequence") or ():
            slices |= _instances(item, "SourceImageSequence")
    for region in data.get("ROIContourSequence") or ():
        for contour in region.get("ContourSequence") or ():
            slices |= _instances(contour, "ContourImageSequence")
    return slices


def _instances(item: Dataset, sequence: str) -> set[str]:
    return {str(uid) for each in item.get(sequence) or () if (uid := each.get("ReferencedSOPInstanceUID"))}
