"""Headers of DICOM results for DICOMweb: what a search tells of each, and all of it without pixels."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword

TOLD = {
    "studies": ("StudyInstanceUID", "PatientID", "PatientName", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"),
    "series": (
        "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "SeriesNumber", "SeriesDate",
        "SeriesTime",
    ),
    "instances": (
        "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Modality", "InstanceNumber", "Rows",
        "Columns", "NumberOfFrames",
    ),
}  # fmt: skip
BULK = 1024  # bytes of an element that are told in full


@lru_cache(maxsize=1024)
def header_of(path: Path) -> Dataset:
    """The header of a result of ours, which does not change."""
    return dcmread(path, stop_before_pixels=True)


def header_json(header: Dataset, level: str) -> dict[str, Any]:
    """As DICOM JSON (PS3.18 annex F): what a search of `level` tells, or of any other level all but bulk."""
    if level in TOLD:
        tags = [tag for keyword in TOLD[level] if (tag := tag_for_keyword(keyword)) is not None]
        chosen = Dataset()
        for tag in tags:
            if tag in header:
                chosen[tag] = header[tag]
        header = chosen
    found: dict[str, Any] = header.to_json_dict(BULK, lambda element: "")
    return found
