"""Tables: the rows of a CSV file, doubted one by one.

No message holds a value of an identifying column, only rows (the heading is row 1) and columns.
"""

import csv
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedclient.data.labels import Code
from shared_models.errors import ManifestInvalid

SHOWN = 5  # complaints in one message
MAX_BYTES = 256 * 1024**2
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table; `what` names the table in messages."""

    what: str
    number: int
    values: dict[str, str] = field(repr=False)

    def text(self, column: str) -> str:
        if not self.values[column]:
            raise self.wrong(column, "is empty")
        return self.values[column]

    def number_of(self, column: str) -> float:
        """A finite number; other values are not quoted, as a shifted column may hold a name."""
        try:
            value = float(self.text(column))
        except ValueError:
            raise self.wrong(column, "is no number") from None
        if not math.isfinite(value):
            raise self.wrong(column, "is not finite")
        return value

    def wrong(self, column: str, why: str) -> ManifestInvalid:
        return ManifestInvalid(f"row {self.number}: `{column}` {why}", code="LABEL_VALUES")


def csv_rows(content: bytes) -> list[list[str]]:
    """The fields of each row of a CSV file, where a row is a line.

    Raises:
        csv.Error: it is not UTF-8; or, with the row, quotes that do not pair up or a field that holds a line break: a
            stray `"` takes the rows after it for text.
    """
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True):
            if any("\n" in value or "\r" in value for value in row):
                raise csv.Error("a field holds a line break")
            rows.append(row)
    except UnicodeDecodeError as e:
        raise csv.Error(f"byte {e.start} is not UTF-8. Save it as `CSV UTF-8`.") from None
    except csv.Error as e:
        raise csv.Error(
            f'row {len(rows) + 1} is not CSV: {e}. Take a stray `"` or line break out of it, write a `"` that is meant '
            f"as two in a quoted field, and save it as `CSV UTF-8`."
        ) from None
    return rows


def lacks(heading: Sequence[str], missing: Sequence[str]) -> str:
    """The complaint about a heading without the columns `missing`."""
    mend = "The columns must be separated by commas" if len(heading) < 2 else "Add them"
    return f"row 1 lacks the columns {', '.join(missing)}. {mend}."


def rows_below(heading: Sequence[str], table: Sequence[Sequence[str]]) -> list[tuple[int, dict[str, str]]]:
    """Number and values of each row below the heading that is not blank.

    Raises:
        csv.Error: with the row, one that is longer or shorter than the heading.
    """
    rows: list[tuple[int, dict[str, str]]] = []
    for number, values in enumerate(table[1:], start=2):
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(heading):
            raise csv.Error(
                f"row {number} has {len(values)} fields, the heading {len(heading)}. Quote fields with commas."
            )
        rows.append((number, by_column(heading, values)))
    return rows


def by_column(heading: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """Column -> value without spaces around it; a patient's name in NFC, as it can be written in several ways."""
    row = {name: value.strip() for name, value in zip(heading, values, strict=True)}
    if "patient_id" in row:
        row["patient_id"] = unicodedata.normalize("NFC", row["patient_id"])
    return row


def alike(patient: str) -> str:
    """What stays of a patient's name however it is written: `P-007`, `p007` and `P 7` are one."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", patient).casefold()).strip()
    apart = re.sub(r"(?<!\d) | (?!\d)", "", words)  # `1-11` and `11-1` are two
    return re.sub(r"(?<!\d)0+(?=\d)", "", apart) or patient


def read_table(path: Path, what: str, columns: Sequence[str]) -> list[Line]:
    """The rows of a CSV file that has at least these columns; blank rows are left out.

    Raises:
        ManifestInvalid: LABEL_UNREADABLE, what `csv_rows` refuses, a column that is missing or there twice, a ragged
            row; LABEL_EMPTY, no row.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _broken(what, f"it has more than {MAX_BYTES} bytes. Split it.")
        table = csv_rows(content)
        heading = [name.strip() for name in table[0]] if table else []
        missing = [name for name in columns if name not in heading]
        if missing:
            raise _broken(what, lacks(heading, missing))
        if any(times > 1 for name, times in Counter(heading).items() if name):
            raise _broken(what, "row 1 has a column twice. Remove one.")
        lines = [Line(what, number, values) for number, values in rows_below(heading, table)]
    except OSError as e:
        raise _broken(what, f"it cannot be read ({type(e).__name__}). Put it there, or mend its rights.") from None
    except csv.Error as e:
        raise _broken(what, str(e)) from None
    if not lines:
        raise ManifestInvalid(f"{what}: it has a heading and no rows. Add a row for each case.", code="LABEL_EMPTY")
    return lines


def each_row(lines: Sequence[Line], parse: Callable[[Line], Row]) -> tuple[Row, ...]:
    """Every row parsed; all wrong ones in one complaint."""
    parsed: list[Row] = []
    complaints: list[str] = []
    for line in lines:
        try:
            parsed.append(parse(line))
        except ManifestInvalid as e:
            complaints.append(str(e))
    if complaints:
        more = f"\n... and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        raise ManifestInvalid(
            f"{lines[0].what}: {len(complaints)} of {len(lines)} rows cannot be used:\n"
            + "\n".join(complaints[:SHOWN])
            + f"{more}\nMend these rows, or take them out.",
            code="LABEL_VALUES",
        )
    return tuple(parsed)


def _broken(what: str, why: str) -> ManifestInvalid:
    code: Code = "LABEL_UNREADABLE"
    return ManifestInvalid(f"{what}: {why}", code=code)
