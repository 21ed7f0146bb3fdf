"""Headers of DICOM results for DICOMweb: what a search tells of each, and all of it without pixels.

The service runs for months: of each result it remembers what it is found by, and no patient; the whole header of a
segmentation takes megabytes.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword

from fedclient.data.dicom_header import load_head, text

FOUND_BY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality")
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


def _tags(keywords: Iterable[str]) -> list[int]:
    return [tag for keyword in keywords if (tag := tag_for_keyword(keyword)) is not None]


@lru_cache(maxsize=16_384)
def found_by(path: Path) -> tuple[str, ...]:
    """The values of `FOUND_BY` of a result of ours, which does not change. For use inside `unbroken`."""
    header = load_head(path, _tags(FOUND_BY))
    return tuple(text(header, keyword) for keyword in FOUND_BY)


def header_of(path: Path, level: str) -> Dataset:
    """What a search of `level` tells of a result, or of any other level all of it but pixels. For use inside
    `unbroken`."""
    return load_head(path, _tags(TOLD[level])) if level in TOLD else dcmread(path, stop_before_pixels=True)


def header_json(path: Path, level: str) -> dict[str, Any]:
    """`header_of` as DICOM JSON (PS3.18 annex F), without bulk. For use inside `unbroken`."""
    found: dict[str, Any] = header_of(path, level).to_json_dict(BULK, lambda element: "")
    return found
