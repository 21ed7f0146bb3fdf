"""SNOMED CT codes of what a study may label; a label that stands not here is coded as tissue or finding, and named."""

from dataclasses import dataclass
from hashlib import sha256

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

STRUCTURE = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure
TISSUE = codes.SCT.Tissue


@dataclass(frozen=True, slots=True)
class Meaning:
    """Category and type of a segment (DICOM PS3.16, CID 7150 and below).

    Attributes:
        single: each connected part is a finding of its own, as a nodule is.
        known: False where the label stands not in the table.
    """

    category: Code
    type: Code
    single: bool = False
    known: bool = True


def _organ(value: str, meaning: str) -> Meaning:
    return Meaning(STRUCTURE, Code(value, "SCT", meaning))


def _finding(value: str, meaning: str, single: bool = False) -> Meaning:
    return Meaning(ABNORMAL, Code(value, "SCT", meaning), single)


TABLE = {
    "lung": _organ("39607008", "Lung"),
    "left-lung": _organ("44029006", "Left lung"),
    "right-lung": _organ("3341006", "Right lung"),
    "trachea": _organ("44567001", "Trachea"),
    "heart": _organ("80891009", "Heart"),
    "aorta": _organ("15825003", "Aorta"),
    "liver": _organ("10200004", "Liver"),
    "spleen": _organ("78961009", "Spleen"),
    "kidney": _organ("64033007", "Kidney"),
    "pancreas": _organ("15776009", "Pancreas"),
    "brain": _organ("12738006", "Brain"),
    "hippocampus": _organ("5366008", "Hippocampus"),
    "nodule": _finding("27925004", "Nodule", single=True),
    "lesion": _finding("52988006", "Lesion", single=True),
    "mass": _finding("4147007", "Mass", single=True),
    "tumour": _finding("108369006", "Neoplasm"),
    "tumor": _finding("108369006", "Neoplasm"),
    "necrosis": _finding("6574001", "Necrosis"),
    "oedema": _finding("79654002", "Edema"),
    "edema": _finding("79654002", "Edema"),
}


def meaning_of(label: str) -> Meaning:
    return TABLE.get(label, Meaning(Code("85756007", "SCT", "Tissue"), TISSUE, known=False))


def finding_of(label: str) -> Code:
    """The label as a finding of a report: its code, or its name in the project's own scheme.

    A name of more than the 16 characters of a code is cut, and told from others of its beginning by a digest.
    """
    meaning = meaning_of(label)
    if meaning.known:
        return meaning.type
    value = label if len(label) <= 16 else f"{label[:7]}.{sha256(label.encode()).hexdigest()[:8]}"
    return Code(value, "99FEDIMAGING", label)
