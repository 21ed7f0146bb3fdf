"""What can be wrong with a site's data: each finding by its code, how grave it is, and how it is mended."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["block", "warn", "note"]  # training stops; somebody should look; for the record


@dataclass(frozen=True, slots=True)
class Kind:
    """One code of the catalogue.

    Attributes:
        title: what is wrong, in the words of a data steward.
        mend: what to do, where the finding itself does not know better.
    """

    severity: Severity
    title: str
    mend: str


CATALOGUE: dict[str, Kind] = {
    # files
    "IMAGE_UNREADABLE": Kind("block", "an image that cannot be read", "Copy or export the file again."),
    "DICOM_UNREADABLE": Kind("block", "DICOM that is broken or cut short", "Export the series again from the PACS."),
    "DICOM_CODEC_MISSING": Kind(
        "block", "DICOM in a compression that is not decoded here", "Export it as Explicit VR Little Endian."
    ),
    "DICOM_MOSAIC": Kind("block", "slices tiled into one picture", "Export it as one frame for each slice."),
    "UNSAFE_FORMAT": Kind("block", "a file whose content could run as code", "Export it as an image."),
    "INPUT_TOO_LARGE": Kind("block", "a file that promises more than can be read", "Crop it, or export it again."),
    "PATH_ESCAPE": Kind("block", "a path that leads out of the data folder", "Put the file itself there."),
    "IO_TIMEOUT": Kind("block", "a file that is too slow to read", "Copy the data to a disk of this machine."),
    "FILE_MISSING": Kind(
        "block", "a file that the data set names and does not hold", "Copy it again, or take its entry out."
    ),
    "SERIES_LEFT_OUT": Kind("note", "images that no study learns from", "Nothing, if they may stay out."),
    "MANIFEST_INVALID": Kind("block", "a folder or table that does not describe the data", "Mend what it names."),
    "DATASET_CHANGED": Kind("block", "files that changed while a run was using them", "Restore them, or run anew."),
    # geometry
    "SERIES_GAP": Kind("block", "a series with missing slices", "Export the whole series again."),
    "SERIES_IRREGULAR": Kind("block", "a series of unequal distances", "Export one acquisition a series."),
    "SERIES_TILT": Kind("block", "a series taken with a tilted gantry", "Resample it upright, or leave it out."),
    "SERIES_DUPLICATE": Kind("block", "a series with slices twice", "Remove the copies."),
    "SERIES_MIXED": Kind("block", "several series where one is wanted", "Give each series a folder of its own."),
    "SERIES_SEVERAL": Kind(
        "warn", "a series that holds several images", "Look whether each is whole, and no part of another."
    ),
    "GEOMETRY_MISSING": Kind("block", "an image that does not say how it lies", "Export it with its orientation."),
    "GEOMETRY_INVALID": Kind("block", "an image whose place cannot be", "Export it again with its orientation."),
    "GEOMETRY_RANGE": Kind("warn", "an image far from the others' or the plan's voxel size", "Look at it."),
    "ORIENTATION_ODD": Kind(
        "warn",
        "an image that lies otherwise than the others, or than its own header says elsewhere",
        "Look at it, and export it as it lies.",
    ),
    # intensities
    "INTENSITY_INVALID": Kind("block", "grey values that cannot be", "Export it again with slope and intercept."),
    "INTENSITY_ODD": Kind("warn", "grey values far from what the modality gives", "Look at it."),
    "MODALITY_MISMATCH": Kind("block", "an image of another kind than the study's", "Take it out of the data."),
    "BODY_PART_MISMATCH": Kind("block", "an image of another part of the body", "Take it out of the data."),
    "LOSSY": Kind("note", "an image that went through a lossy compression", "Nothing, if the study allows it."),
    # labels
    "LABEL_MISSING": Kind("warn", "a case without labels, which takes no part", "Add its labels."),
    "LABEL_ORPHAN": Kind("warn", "labels of an image that is not there", "Export the image that they were drawn on."),
    "LABEL_UNREADABLE": Kind("block", "labels that cannot be read", "Export them again."),
    "CHANNELS_APART": Kind("block", "channels of a case on different grids", "Register and resample them to one grid."),
    "LABEL_GEOMETRY_MISMATCH": Kind("block", "labels that lie elsewhere than their image", "Export both on one grid."),
    "LABEL_VALUES": Kind("block", "labels that this study does not know", "Number them as the study does."),
    "LABEL_EMPTY": Kind("warn", "labels with nothing drawn", "Draw them, or leave the case out."),
    "LABEL_ODD": Kind("warn", "a label of an unlikely size or place", "Look at it."),
    # the whole
    "PATIENT_UNKNOWN": Kind(
        "block", "an image that does not say whose it is", "Export it with PatientID; a pseudonym will do."
    ),
    "LEAKAGE_PATIENT": Kind("block", "one patient in training and in test", "Give a patient's cases one split."),
    "LEAKAGE_PIXEL": Kind("block", "the same picture in training and in test", "Remove the copy."),
    "DUPLICATE": Kind("warn", "the same picture or labels twice", "Remove the copy."),
    "CLASS_ABSENT": Kind("warn", "a label that no training case has", "Ask whether this site labels it."),
    "DATASET_TOO_SMALL": Kind("block", "too few patients to train or to test on", "Add cases."),
    # identifiers
    "PHI_PIXEL": Kind("block", "text burnt into the picture", "Blank it at its source, or leave the case out."),
    "PHI_TAG": Kind("warn", "identifiers in a header", "They stay here; the cache does not hold them."),
    "PHI_PATH": Kind("warn", "identifiers in names of files or folders", "Rename them; no message holds them."),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a site's data. It stays on site.

    Attributes:
        case: key of the case, which says nothing to who has not the site's secret; empty for the data as a whole.
        what: in words and numbers, without names of files or patients.
        row: in the manifest, 0 where there is none.
    """

    code: str
    case: str
    what: str
    mend: str
    severity: Severity
    row: int = 0


def finding(code: str, what: str, *, case: str = "", row: int = 0, severity: Severity | None = None) -> Finding:
    """A finding as the catalogue has it; KeyError for a code that is not there."""
    kind = CATALOGUE[code]
    return Finding(code, case, what, kind.mend, severity or kind.severity, row)


def patients_untold(where: str, each: str = "case") -> Finding:
    """What is told of a data set that does not say which of its cases are of one patient."""
    what = (
        f"{where} does not say which patient a {each} is of: each is taken for another patient's, and may be in "
        f"another split. Where a patient has several, list them in a manifest.csv with patient_id"
    )
    return finding("PATIENT_UNKNOWN", what, severity="warn")
