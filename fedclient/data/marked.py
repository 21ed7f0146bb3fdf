"""`nodules.csv` beside a manifest: where lesions are, in LPS mm, and how wide, as a study of detection learns them.

Columns: `patient_id`, `x_mm`, `y_mm`, `z_mm`, `diameter_mm`; where a patient has several images also `image`, as in
the manifest; if wanted `label`. An image of the manifest without a row has none. A file with other columns is no such
table and is left alone.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from fedclient.data.cases import Marks
from fedclient.data.luna16 import Mark
from fedclient.data.tables import Line, each_row, read_table
from shared_models.errors import ManifestInvalid

NAME = "nodules.csv"
COLUMNS = ("patient_id", "x_mm", "y_mm", "z_mm", "diameter_mm")


def read_marked(folder: Path, image_of: Mapping[str, tuple[str, ...]]) -> dict[str, Marks] | None:
    """Image -> what is marked on it, for each image of the manifest; None if there is no such table.

    Args:
        image_of: patient -> the images of the manifest that are his.

    Raises:
        ManifestInvalid: LABEL_VALUES, a place or diameter that cannot be, or a row of a patient of several images that
            does not say which; what `read_table` raises; PATH_ESCAPE, a link out of the folder.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestInvalid(f"{NAME}: it is a link out of the data folder. Put the file itself there.", "PATH_ESCAPE")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if not {*COLUMNS} <= {name.strip() for name in next(csv.reader(file), [])}:
            return None
    found: defaultdict[str, list[Mark]] = defaultdict(list)
    try:
        lines = read_table(path, NAME, COLUMNS)
    except ManifestInvalid as e:
        if e.code != "LABEL_EMPTY":  # a heading alone: there are none
            raise
        lines = []

    def parse(line: Line) -> tuple[str, Mark] | None:
        named, images = line.values.get("image", ""), image_of.get(line.text("patient_id"), ())
        if not images or (named and named not in images):  # another site's
            return None
        if not named and len(images) > 1:
            raise line.wrong("image", "is not given, and the patient has several images")
        diameter_mm = line.number_of("diameter_mm")
        if not 0 < diameter_mm < 1000:
            raise line.wrong("diameter_mm", "is not above 0 and below 1000 mm")
        x, y, z = (line.number_of(column) for column in COLUMNS[1:4])
        label = line.values.get("label") or "nodule"
        return named or images[0], Mark(line.number, "", (x, y, z), diameter_mm, label=label)

    for each in each_row(lines, parse) if lines else ():
        if each is not None:
            found[each[0]].append(each[1])
    return {image: Marks(tuple(found[image])) for images in image_of.values() for image in images}
