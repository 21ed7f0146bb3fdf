"""A table of patients for each site, joined into the one manifest.csv that a study of tables reads."""

import csv
import io
from pathlib import Path

from fedclient.data.tables import csv_rows
from shared_models.errors import ManifestInvalid
from shared_models.files import write_atomic


def join_tables(folder: Path, out: Path, patient: str) -> Path:
    """Writes OUT/manifest.csv from every SITE.csv of `folder`: its columns, with `patient` as `patient_id`, and `site`.

    Raises:
        ManifestInvalid: no table, one that is no CSV, tables of unlike columns, or without the column `patient`.
    """
    tables: dict[str, list[list[str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            tables[path.stem] = csv_rows(path.read_bytes())
        except csv.Error as e:
            raise ManifestInvalid(f"{path}: {e}") from None
    if not tables:
        raise ManifestInvalid(f"{folder}: holds no table. Put a SITE.csv for each site there.")
    heading = next(iter(tables.values()))[0]
    if patient not in heading:
        raise ManifestInvalid(f"{folder}: row 1 has no column {patient!r}. Name the patients' column with --patient.")
    unlike = [site for site, rows in tables.items() if rows[0] != heading]
    if unlike:
        raise ManifestInvalid(
            f"{folder}: the table of {unlike[0]!r} has other columns than the first. Make them alike."
        )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["site", *("patient_id" if name == patient else name for name in heading)])
    for site, rows in tables.items():
        writer.writerows([site, *row] for row in rows[1:] if any(row))
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "manifest.csv", stream.getvalue().encode())
    return out / "manifest.csv"
