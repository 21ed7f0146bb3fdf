"""DICOM objects that say something about a series: opened with care, and which series they mean."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydicom import Dataset

from fedclient.data.dicom_header import BROKEN, load
from fedclient.data.labels import refused
from shared_models.errors import ImageUnreadable


@dataclass(frozen=True, slots=True)
class Referenced:
    """What ties an object to its image; identifiers, so not for logs. Empty where the object does not say."""

    series_uid: str = field(repr=False)
    frame_of_reference_uid: str = field(repr=False)


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
    """The series and the frame of reference that a SEG or an RTSTRUCT names. For use inside `opened`."""
    frame = data.get("FrameOfReferenceUID") or ""
    series = ""
    for item in data.get("ReferencedSeriesSequence") or ():  # SEG
        series = series or item.get("SeriesInstanceUID") or ""
    for item in data.get("ReferencedFrameOfReferenceSequence") or ():  # RTSTRUCT
        frame = frame or item.get("FrameOfReferenceUID") or ""
        for study in item.get("RTReferencedStudySequence") or ():
            for each in study.get("RTReferencedSeriesSequence") or ():
                series = series or each.get("SeriesInstanceUID") or ""
    return Referenced(str(series), str(frame))
