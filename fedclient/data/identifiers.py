"""Who a patient is, as headers and file names give it away: found and counted by kind, and no value of it kept."""

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedclient.data.formats import PICTURES, format_of
from fedclient.data.pictures import picture_texts
from shared_models.errors import ImageUnreadable

OF_A_PERSON = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs",
    "OtherPatientNames", "PatientMotherBirthName", "ReferringPhysicianName",
)  # fmt: skip
MARKS = (
    "PatientIdentityRemoved", "BurnedInAnnotation", "SOPClassUID", "Modality", "ConversionType", "ImageType",
)  # fmt: skip
CAPTURES = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture, and its four kinds of many frames
MOST_HEADERS = 32  # of a series, spread over it
HEADER_BYTES = 64 * 1024
_PERSON = re.compile(r"[A-Za-z]{3,}\^[A-Za-z]{2,}|patient.{0,3}(?:name|id\b|birth)|\(?0010[|,]00[1-4]0", re.IGNORECASE)
_UID = re.compile(r"\d+(?:\.\d+){3,}")
_DATE = re.compile(
    r"(?<![0-9])(?:(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])[-_.](?:0[1-9]|1[0-2])[-_.](?:19|20)\d\d)(?![0-9])"
)
_NAME = re.compile(r"[A-Za-z]{2,}\^[A-Za-z]{2,}|[A-Z][a-z]+, ?[A-Z][a-z]+|[A-Z]{2,}, ?[A-Z]{2,}")


@dataclass(frozen=True, slots=True)
class Said:
    """What the files of a case say of a person; `patient` and `words` are identifiers: for comparing, never written.

    Attributes:
        tags: which identifying elements are filled in.
        patient: the PatientID; empty where there is none, or where it was replaced.
        words: of names and numbers, as they may stand in a path.
        burnt: why letters may stand in the pixels, and whether the file itself says so.
    """

    tags: tuple[str, ...] = ()
    patient: str = field(repr=False, default="")
    words: tuple[str, ...] = field(repr=False, default=())
    burnt: str = ""
    burnt_for_sure: bool = False


NOTHING = Said()


def said_in(files: Sequence[Path]) -> Said:
    """What the headers of an image's files say; nothing where they cannot be read, which its reader will tell.

    Raises:
        OSError: a file that cannot be opened.
    """
    try:
        kind = format_of(files[0])
    except ImageUnreadable:
        return NOTHING
    if kind == "dicom":
        step = max(1, -(-len(files) // MOST_HEADERS))
        return _of_dicom(files[::step])
    text = picture_texts(files[0]) if kind in PICTURES else _text_of_header(files[0], kind)
    return Said(tags=(f"text in the {kind} header",)) if _PERSON.search(text) else NOTHING


def identifying_path(relative: str, words: Sequence[str] = ()) -> str:
    """What of a path in the data folder gives a patient away, in words that do not repeat it; empty for nothing.

    Args:
        words: of names and numbers in the header.
    """
    bare = _UID.sub(" ", relative)
    tokens = {token.casefold() for token in re.split(r"[^A-Za-z0-9]+", bare)}
    joined = re.sub(r"[^a-z0-9]+", "", bare.casefold())
    for word in words:
        if word in tokens or (len(word) >= 6 and word in joined):
            return "a name or number of the patient from the header"
    if _NAME.search(bare):
        return "what looks like a person's name"
    if _DATE.search(bare):
        return "what looks like a date"
    return ""


def _of_dicom(files: Sequence[Path]) -> Said:
    from pydicom.datadict import tag_for_keyword

    from fedclient.data.dicom_header import load, load_head, text, unbroken

    tags = [tag for keyword in (*OF_A_PERSON, *MARKS) if (tag := tag_for_keyword(keyword)) is not None]
    filled: set[str] = set()
    words: set[str] = set()
    patient, burnt, sure = "", "", False
    try:
        for path in files:
            with unbroken():
                data = load_head(path, tags)
            if text(data, "PatientIdentityRemoved") != "YES":
                filled |= {keyword for keyword in OF_A_PERSON if text(data, keyword)}
                patient = patient or text(data, "PatientID")
                words |= _words(text(data, "PatientName"), 3) | _words(text(data, "PatientID"), 4)
            stated = text(data, "BurnedInAnnotation")
            if stated == "YES":
                burnt, sure = "BurnedInAnnotation is YES", True
            elif stated != "NO" and not burnt:
                if text(data, "SOPClassUID").startswith(CAPTURES) or text(data, "ConversionType"):
                    burnt = "it is a secondary capture, a picture of a screen or a film"
                elif text(data, "Modality") == "US":
                    burnt = "it is ultrasound, whose pictures carry the patient's name at their edge"
        with unbroken():
            tags_there = list(load(files[0]).keys())  # tags alone: elements would be decoded, all of them
            if not burnt and any(0x6000 <= tag.group <= 0x60FF for tag in tags_there):
                burnt = "an overlay lies over the pixels"
    except ImageUnreadable:
        return NOTHING
    ordered = tuple(keyword for keyword in OF_A_PERSON if keyword in filled)
    return Said(ordered, patient, tuple(sorted(words)), burnt, sure)


def _words(text: str, shortest: int) -> set[str]:
    parts = re.split(r"[^A-Za-z0-9]+", text)
    return {part.casefold() for part in (*parts, "".join(parts)) if len(part) >= shortest}


def _text_of_header(path: Path, kind: str) -> str:
    """The readable part of a NIfTI, MetaImage or NRRD header, with its extensions as far as they are text."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if kind != "nifti":
        ends = [end for mark in (b"ElementDataFile", b"\n\n", b"\r\n\r\n") if (end := head.find(mark)) > 0]
        return head[: min(ends, default=len(head))].decode("latin-1")
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, HEADER_BYTES)
        except zlib.error:
            return ""
    begin = int.from_bytes(head[:4], "little")
    offset = int.from_bytes(head[168:176], "little") if begin == 540 else _float(head[108:112])
    return head[: max(348, min(offset, HEADER_BYTES))].decode("latin-1")


def _float(stored: bytes) -> int:
    (value,) = struct.unpack("<f", stored) if len(stored) == 4 else (0.0,)
    return int(value) if 0 <= value < 2**31 else 0
