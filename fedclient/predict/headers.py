"""The headers of a source's slices, for DICOM results that refer to them; a few elements of each, so that a thousand
slices take little room.

Headers of real scanners bend the standard where no result depends on it; highdicom refuses to repeat that, so that it
is put right here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset
from pydicom.charset import decode_element
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import dcmread
from pydicom.valuerep import DA, TM

from fedclient.data.dicom_header import BROKEN, load_head, number, text, unbroken
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
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")  # type 1
WHEN: Mapping[str, Callable[[Any], object]] = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
DECIMAL = r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"
SEXES = ("M", "F", "O")
REFERENCE = ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")
CODE = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
WHOLE: Mapping[str, Sequence[str]] = {  # what results repeat of sequences, and what of each item is type 1
    "ReferencedStudySequence": REFERENCE, "ReferencedPatientSequence": REFERENCE, "ProcedureCodeSequence": CODE,
}  # fmt: skip
FORMS = {"PatientAge": r"\d{3}[DWMY]", "PatientWeight": DECIMAL, "PatientSize": DECIMAL}
TRIAL = ("ClinicalTrialSponsorName", "ClinicalTrialProtocolID")  # type 1 of its module, as is one of the subject's
TRIAL_EMPTY = ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName")  # type 2
MOST_LO = 64
SHARED = ("PlaneOrientationSequence", "PixelMeasuresSequence")
GROUPS = 0x5200  # functional groups, of whose text results repeat nothing
UTF_8 = "ISO_IR 192"
_TAGS = [tag for keyword in EACH if (tag := tag_for_keyword(keyword)) is not None]


@dataclass(frozen=True, slots=True)
class Headers:
    """What DICOM results repeat and refer to; patient and study are in it, so it stays at the hospital.

    Attributes:
        first: the whole header of the first slice, what it lacks filled in as empty, its text in UTF-8.
        slices: of each slice along the normal, with the orientation of the first; or the one file of many frames.
    """

    first: Dataset = field(repr=False)
    slices: Sequence[Dataset] = field(repr=False)

    @property
    def in_space(self) -> bool:
        """Whether its planes lie in a frame of reference."""
        return bool(self.first.get("FrameOfReferenceUID")) and (
            "ImagePositionPatient" in self.first or "SharedFunctionalGroupsSequence" in self.first
        )

    @property
    def frames_placed(self) -> bool:
        """Whether each frame says where it lies, where one file holds many; slices do."""
        return (number(self.first, "NumberOfFrames") or 1) == 1 or "SharedFunctionalGroupsSequence" in self.first


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
        _leave_out_what_is_half(first)
        _empty_what_is_malformed(first)
        _leave_out_empty_uids(first)
        _complete_trial(first)
        _say_in_utf8(first)
        _shorten(first)
        if len(source.files) == 1:  # of many frames, or of one whose place stands in functional groups
            _share(first)
            return Headers(first, (first,))
        slices = [load_head(path, _TAGS) for path in source.files]
        for each in slices:
            _leave_out_empty_uids(each)
            _say_in_utf8(each)
            if "ImageOrientationPatient" in each and "ImageOrientationPatient" in slices[0]:
                each.ImageOrientationPatient = slices[0].ImageOrientationPatient  # the reader found them parallel
    frames = {str(each.get("FrameOfReferenceUID", "")) for each in slices}
    if len(frames) > 1:
        raise ImageUnreadable(
            "DICOM: slices of more than one frame of reference. Give each on its own.", "SERIES_MIXED"
        )
    return Headers(first, slices)


def _leave_out_empty_uids(data: Dataset) -> None:
    """An empty UID refers to nothing; without it, no result is written."""
    for keyword in UIDS:
        if keyword in data and not data.get(keyword):
            delattr(data, keyword)


def _empty_what_is_malformed(first: Dataset) -> None:
    """Dates, times and sexes that are none: all are type 2, and an empty one says as much."""
    for keyword, kind in WHEN.items():
        try:
            kind(first.get(keyword) or "")
        except (ValueError, TypeError):
            setattr(first, keyword, "")
    if first.PatientSex not in SEXES:
        first.PatientSex = ""


def _leave_out_what_is_half(first: Dataset) -> None:
    """Optional elements that results repeat, and that are not valid in the source."""
    for keyword, needed in WHOLE.items():
        if not all(all(item.get(each) for each in needed) for item in first.get(keyword) or ()):
            delattr(first, keyword)
    for keyword, form in FORMS.items():
        stored = first.get_item(keyword) if keyword in first else None
        value = stored.value if stored is not None else None
        said = value.decode("latin-1").strip("\0 ") if isinstance(value, bytes) else str(value or "")
        if said and not re.fullmatch(form, said):
            delattr(first, keyword)
    method = first.get("DeidentificationMethod") or first.get("DeidentificationMethodCodeSequence")
    if text(first, "PatientIdentityRemoved") == "YES" and not method:
        del first.PatientIdentityRemoved


def _complete_trial(first: Dataset) -> None:
    """What of a clinical trial is type 2 may be empty; without what is type 1, nothing is said of one."""
    said = [element.keyword for element in first.group_dataset(0x0012) if element.keyword.startswith("ClinicalTrial")]
    if not said:
        return
    subject = first.get("ClinicalTrialSubjectID") or first.get("ClinicalTrialSubjectReadingID")
    if not subject or not all(first.get(keyword) for keyword in TRIAL):
        for keyword in said:
            delattr(first, keyword)
        return
    for keyword in TRIAL_EMPTY:
        if keyword not in first:
            setattr(first, keyword, "")


def _shorten(first: Dataset) -> None:
    if len(description := text(first, "StudyDescription")) > MOST_LO:
        first.StudyDescription = description[:MOST_LO]


def _say_in_utf8(data: Dataset) -> None:
    """Decodes text by what the header says of it, known or not; what cannot be read at all is left out."""
    sets = data.get("SpecificCharacterSet")
    if not sets:
        return
    for tag in [tag for tag in data.keys() if tag.group != GROUPS]:  # noqa: SIM118  a Dataset iterates over elements
        try:
            element = data[tag]
            if element.VR == "SQ":
                for item in element.value:
                    item.decode()
            else:
                decode_element(element, sets)
        except BROKEN:
            del data[tag]
    data.SpecificCharacterSet = UTF_8


def _share(first: Dataset) -> None:
    """What all frames have alike stands where results look for it, though each frame may say it for itself."""
    shared, each = first.get("SharedFunctionalGroupsSequence"), first.get("PerFrameFunctionalGroupsSequence")
    if not shared or not each:
        return
    for keyword in SHARED:
        if keyword not in shared[0] and keyword in each[0]:
            setattr(shared[0], keyword, each[0][keyword].value)
