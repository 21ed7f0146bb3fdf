"""`nodules.csv` beside a manifest: where lesions are, in LPS mm, and how wide, as a study of detection learns them.

Columns: `patient_id`, `x_mm`, `y_mm`, `z_mm`, `diameter_mm`; where a patient has several images also `image`, as in
the manifest; if wanted `label`. An image of the manifest without a row has none, so a row that is meant for one and
does not fit it is refused; a table may tell of more patients than a manifest. A file with other columns is no such
table and is left alone.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from fedclient.data.cases import Marks
from fedclient.data.luna16 import Mark
from fedclient.data.tables import Line, alike, each_row, read_table
from shared_models.errors import ManifestInvalid

NAME = "nodules.csv"
COLUMNS = ("patient_id", "x_mm", "y_mm", "z_mm", "diameter_mm")
MOST_HEADING = 1 << 16  # characters
EXCEL = "a spreadsheet turns 007 into 7: import the column as text"
ImagesOf = Mapping[str, tuple[str, ...]]  # patient -> his images, as the manifest names them


def read_marked(folder: Path, every: ImagesOf, here: ImagesOf) -> dict[str, Marks] | None:
    """Image -> what is marked on it, for each image of a site; None if there is no such table.

    Args:
        every: of all rows of the manifest; rows of patients and images that are in it and not in `here` are another
            site's, and passed over.
        here: of the rows that are this site's.

    Raises:
        ManifestInvalid: LABEL_VALUES, a place or diameter that cannot be, a patient whom the manifest writes otherwise,
            an image of his that it does not have, a row of a patient of several images that does not say which, or no
            row of any of its patients; what `read_table` raises; PATH_ESCAPE, a link out of the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestInvalid(f"{NAME}: it is a link out of the data folder. Put the file itself there.", "PATH_ESCAPE")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        heading = file.readline(MOST_HEADING).replace('"', "").split(",")
    if not {*COLUMNS} <= {name.strip() for name in heading}:
        return None
    found: defaultdict[str, list[Mark]] = defaultdict(list)
    try:
        lines = read_table(path, NAME, COLUMNS)
    except ManifestInvalid as e:
        if e.code != "LABEL_EMPTY":  # a heading alone: there are none
            raise
        lines = []

    known = {alike(patient) for patient in every}

    def parse(line: Line) -> tuple[str, Mark] | None:
        patient, named = line.text("patient_id"), line.values.get("image", "")
        if patient not in every:
            if alike(patient) in known:
                raise line.wrong("patient_id", f"is written otherwise in the manifest. Write it as there ({EXCEL})")
            return None
        images = [image for image in every[patient] if not named or PurePosixPath(image) == PurePosixPath(named)]
        if named and not images:
            raise line.wrong("image", "is none of the patient's images in the manifest. Write it as there")
        mine = [image for image in images if image in here.get(patient, ())]
        if not mine:
            return None
        if not named and len(images) > 1:
            raise line.wrong("image", "is not given, and the patient has several images")
        diameter_mm = line.number_of("diameter_mm")
        if not 0 < diameter_mm < 1000:
            raise line.wrong("diameter_mm", "is not above 0 and below 1000 mm")
        x, y, z = (line.number_of(column) for column in COLUMNS[1:4])
        label = line.values.get("label") or "nodule"
        return mine[0], Mark(line.number, "", (x, y, z), diameter_mm, label=label)

    rows = each_row(lines, parse) if lines else ()
    if lines and not any(line.values.get("patient_id") in every for line in lines):
        raise ManifestInvalid(
            f"{NAME}: none of its patients is in the manifest. Write them as there, or take the table out.",
            "LABEL_VALUES",
        )
    for each in rows:
        if each is not None:
            found[each[0]].append(each[1])
    return {image: Marks(tuple(found[image])) for images in here.values() for image in images}
