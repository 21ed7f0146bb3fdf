"""The headers of a source's slices, for DICOM results that refer to them; a few elements of each, so that a thousand
slices take little room."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import dcmread

from fedclient.data.dicom_header import load_head, unbroken
from fedclient.predict.inputs import Source
from shared_models.errors import ImageUnreadable

EACH = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows",
    "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "NumberOfFrames", "PatientID", "ImageType", "TotalPixelMatrixRows",
)  # fmt: skip
EMPTY = (  # type 2: what results repeat must be there, and may be empty
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip
_TAGS = [tag for keyword in EACH if (tag := tag_for_keyword(keyword)) is not None]


@dataclass(frozen=True, slots=True)
class Headers:
    """What DICOM results repeat and refer to; patient and study are in it, so it stays at the hospital.

    Attributes:
        first: the whole header of the first slice, what it lacks filled in as empty.
        slices: of each slice along the normal, or the one file of many frames.
    """

    first: Dataset = field(repr=False)
    slices: Sequence[Dataset] = field(repr=False)

    @property
    def in_space(self) -> bool:
        """Whether its planes lie in a frame of reference."""
        return bool(self.first.get("FrameOfReferenceUID")) and (
            "ImagePositionPatient" in self.first or "SharedFunctionalGroupsSequence" in self.first
        )


def _studies(first: Dataset) -> Sequence[Dataset]:
    found: Sequence[Dataset] = first.get("ReferencedStudySequence", ())
    return found


def read_headers(source: Source) -> Headers:
    """
    Raises:
        ImageUnreadable: DICOM_UNREADABLE; SERIES_MIXED, slices in different frames of reference.
    """
    with unbroken():
        first: Dataset = dcmread(source.files[0], stop_before_pixels=True, force=True)
        for keyword in EMPTY:
            if keyword not in first:
                setattr(first, keyword, "")
        if not all({"ReferencedSOPClassUID", "ReferencedSOPInstanceUID"} <= {*item.dir()} for item in _studies(first)):
            del first.ReferencedStudySequence  # results repeat it, and half a reference is none
        if len(source.files) == 1:  # of many frames, or of one whose place stands in functional groups
            return Headers(first, (first,))
        slices = [load_head(path, _TAGS) for path in source.files]
    frames = {str(each.get("FrameOfReferenceUID", "")) for each in slices}
    if len(frames) > 1:
        raise ImageUnreadable(
            "DICOM: slices of more than one frame of reference. Give each on its own.", "SERIES_MIXED"
        )
    return Headers(first, slices)
