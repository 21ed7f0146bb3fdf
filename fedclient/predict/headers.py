"""The headers of a source's slices, for DICOM results that refer to them; a few elements of each, so that a thousand
slices take little room.

Headers of real scanners bend the standard where no result depends on it; highdicom refuses to repeat that, so that it
is put right here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset
from pydicom.charset import decode_element
from pydicom.config import RAISE
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import dcmread
from pydicom.tag import BaseTag
from pydicom.valuerep import DA, TM, validate_value

from fedclient.data.dicom_header import BROKEN, load_head, number, unbroken
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
SEXES = ("M", "F", "O")
REFERENCES = ("ReferencedStudySequence", "ReferencedPatientSequence")
PATIENT = (0x0010, 0x0012)  # groups of patient and clinical trial
STUDY = (
    "IssuerOfAccessionNumberSequence", "ReferringPhysicianIdentificationSequence", "ConsultingPhysicianName",
    "ConsultingPhysicianIdentificationSequence", "StudyDescription", "ProcedureCodeSequence", "PhysiciansOfRecord",
    "PhysiciansOfRecordIdentificationSequence", "NameOfPhysiciansReadingStudy",
    "PhysiciansReadingStudyIdentificationSequence", "AdmittingDiagnosesDescription", "AdmittingDiagnosesCodeSequence",
    "RequestingService", "RequestingServiceCodeSequence", "ReasonForVisit", "ReasonForVisitCodeSequence",
    "AdmissionID", "IssuerOfAdmissionIDSequence", "ServiceEpisodeID", "ServiceEpisodeDescription",
    "IssuerOfServiceEpisodeIDSequence", "PatientState", "ReasonForPerformedProcedureCodeSequence", *REFERENCES,
)  # fmt: skip
CHECKED = frozenset(("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "SH", "ST", "TM", "UI", "UT"))
CODES = ("CodeValue", "LongCodeValue", "URNCodeValue")
TRIAL = (
    ("ClinicalTrialSponsorName",),
    ("ClinicalTrialProtocolID",),
    ("ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID"),
)  # one of each, or the module is none
TRIAL_EMPTY = ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName")  # type 2 in it
TRIAL_MORE = ("ClinicalTrialProtocolEthicsCommitteeName", "ClinicalTrialProtocolEthicsCommitteeApprovalNumber")
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
        _empty_what_is_malformed(first)
        _leave_out_empty_uids(first)
        _say_in_utf8(first)
        _leave_out_what_is_broken(first)
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


def _leave_out_what_is_broken(first: Dataset) -> None:
    """What results repeat of patient and study but may do without, where it is not as the standard has it."""
    study = {tag_for_keyword(keyword) for keyword in STUDY}
    needed = {tag_for_keyword(keyword) for keyword in EMPTY}
    for tag in list(first.keys()):
        if (tag.group in PATIENT or tag in study) and tag not in needed and not _sound(first, tag):
            del first[tag]
    if first.get("PatientIdentityRemoved") == "YES" and not (
        first.get("DeidentificationMethod") or first.get("DeidentificationMethodCodeSequence")
    ):
        del first.PatientIdentityRemoved
    trial = [*(keyword for either in TRIAL for keyword in either), *TRIAL_EMPTY, *TRIAL_MORE]
    whole = all(any(first.get(keyword) for keyword in either) for either in TRIAL)
    for keyword in trial:
        if keyword in first and not whole:
            delattr(first, keyword)
        elif keyword in TRIAL_EMPTY and keyword not in first and whole:
            setattr(first, keyword, "")
        elif keyword in first and keyword not in TRIAL_EMPTY and not first.get(keyword):
            delattr(first, keyword)


def _sound(data: Dataset, tag: BaseTag) -> bool:
    """Whether values are as their kind (VR) has them, codes have value, scheme and meaning, and references both UIDs;
    in the items of a sequence too."""
    try:
        element = data[tag]
        if element.VR == "SQ":
            return all(_whole(element.keyword, item) for item in element.value)
        if element.VR in CHECKED and not element.is_empty:
            for value in element.value if element.VM > 1 else [element.value]:
                validate_value(element.VR, str(value), RAISE)
    except BROKEN:
        return False
    return True


def _whole(keyword: str, item: Dataset) -> bool:
    if not all(_sound(item, tag) for tag in list(item.keys())):
        return False
    if keyword in REFERENCES:
        return bool(item.get("ReferencedSOPClassUID") and item.get("ReferencedSOPInstanceUID"))
    if keyword.endswith("CodeSequence"):
        coded = any(item.get(each) for each in CODES)
        schemed = bool(item.get("CodingSchemeDesignator") or item.get("URNCodeValue"))
        return coded and schemed and bool(item.get("CodeMeaning"))
    return True


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
