"""Labels that are tables: classes of images, and how long patients were followed until what happened.

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
from typing import Literal, TypeVar, get_args

from fedclient.data.labels import Code
from shared_models.errors import ManifestInvalid

SHOWN = 5  # complaints in one message
MAX_BYTES = 256 * 1024**2
Unit = Literal["days", "weeks", "months", "years"]
DAYS: dict[Unit, float] = {"days": 1.0, "weeks": 7.0, "months": 365.25 / 12, "years": 365.25}
UNITS: tuple[Unit, ...] = get_args(Unit)
ALIVE = re.compile(r"ALIVE \((\d+) days later\)", re.IGNORECASE)  # BraTS 2018 to 2020: censored then
BRATS_ID = re.compile(r"brats(1[789]|20)id", re.IGNORECASE)  # spelt a little differently each year
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Classes:
    """What one image shows.

    Attributes:
        image: as the table names it, relative to its folder.
        labels: 1 for each of the study's classes that it shows, else 0, in the study's order.
        others: the other columns (patient_id, split, site, age, sex, ...).
    """

    row: int
    image: str = field(repr=False)
    labels: tuple[int, ...]
    others: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Survival:
    """How long a patient was followed.

    Attributes:
        time_days: until the event, or until the patient was last seen.
        event: whether it happened; False is censored.
        covariates: the other columns, as they stand there.
    """

    row: int
    case_id: str = field(repr=False)
    time_days: float
    event: bool
    covariates: dict[str, str] = field(repr=False)


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

    def others(self, *named: str) -> dict[str, str]:
        return {column: value for column, value in self.values.items() if column not in named}

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
    except OSError as e:
        raise _broken(what, f"it cannot be read ({type(e).__name__}). Put it there, or mend its rights.") from None
    except csv.Error as e:
        raise _broken(what, str(e)) from None
    heading = [name.strip() for name in table[0]] if table else []
    missing = [name for name in columns if name not in heading]
    if missing:
        mend = "The columns must be separated by commas" if len(heading) < 2 else "Add them"
        raise _broken(what, f"row 1 lacks the columns {', '.join(missing)}. {mend}.")
    if any(times > 1 for name, times in Counter(heading).items() if name):
        raise _broken(what, "row 1 has a column twice. Remove one.")
    lines: list[Line] = []
    for number, values in enumerate(table[1:], start=2):
        if not any(value.strip() for value in values):
            continue
        if len(values) != len(heading):
            raise _broken(
                what, f"row {number} has {len(values)} fields, the heading {len(heading)}. Quote fields with commas."
            )
        lines.append(Line(what, number, by_column(heading, values)))
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


def once(lines: Sequence[Line], column: str) -> None:
    """Refuses a table that names something twice."""
    first: dict[str, int] = {}
    for line in lines:
        row = first.setdefault(line.values[column], line.number)
        if row != line.number:
            raise ManifestInvalid(
                f"{line.what}: rows {row} and {line.number} have the same `{column}`. Keep one of them.",
                code="LABEL_VALUES",
            )


def read_classes(path: Path, classes: Sequence[str], none: str = "none") -> tuple[Classes, ...]:
    """`image,label` with labels as `a` or `a|b`, or `image` and a column of 0 and 1 for each class.

    Args:
        classes: the study's; a label that is none of them is refused.
        none: what stands in `label` where an image shows none of them; an empty cell is refused, because it may as
            well mean that nobody looked.

    Raises:
        ManifestInvalid: see `read_table`; LABEL_VALUES, an unknown label, or an image listed twice.
    """
    lines = read_table(path, "class table", ["image"])
    columns = lines[0].values
    if "label" not in columns and not all(name in columns for name in classes):
        raise _broken("class table", f"row 1 has neither `label` nor a column for each of {', '.join(classes)}.")
    once(lines, "image")

    def parse(line: Line) -> Classes:
        if "label" in columns:
            shown = {part.strip() for part in line.text("label").split("|")} - {none}
            strange = len(shown - set(classes))
            if strange:
                raise line.wrong("label", f"holds {strange} that the study does not know ({', '.join(classes)})")
            labels = tuple(int(name in shown) for name in classes)
            return Classes(line.number, line.text("image"), labels, line.others("image", "label"))
        for name in classes:
            if line.text(name) not in ("0", "1"):
                raise line.wrong(name, "is neither 0 nor 1")
        labels = tuple(int(line.text(name)) for name in classes)
        return Classes(line.number, line.text("image"), labels, line.others("image", *classes))

    return each_row(lines, parse)


def read_survival(
    path: Path, unit: Unit, *, case_id: str = "case_id", time: str = "time", event: str = "event"
) -> tuple[Survival, ...]:
    """`case_id,time,event[,covariates]`; an event of 1 happened at `time`, of 0 had not happened until then.

    Args:
        unit: of `time` in the table.
        case_id, time, event: what the table calls these columns.

    Raises:
        ManifestInvalid: see `read_table`; LABEL_VALUES, a time that is not above 0, an event that is neither 0 nor 1,
            or a case listed twice.
    """
    lines = read_table(path, "survival table", [case_id, time, event])
    once(lines, case_id)

    def parse(line: Line) -> Survival:
        happened = line.number_of(event)
        if happened not in (0, 1):
            raise line.wrong(event, "is neither 0 nor 1")
        days = _positive(line, time) * DAYS[unit]
        return Survival(line.number, line.text(case_id), days, happened == 1, line.others(case_id, time, event))

    return each_row(lines, parse)


def read_brats_survival(path: Path) -> tuple[Survival, ...]:
    """`survival_info.csv` (2020) or `survival_data.csv` (2018, 2019): days until death, or `ALIVE (361 days later)`.

    Raises:
        ManifestInvalid: as `read_survival`.
    """
    what = "BraTS survival table"
    lines = read_table(path, what, [])
    heading = lines[0].values
    case_id = next((name for name in heading if BRATS_ID.fullmatch(name)), None)
    time = next((name for name in ("Survival_days", "Survival") if name in heading), None)
    if case_id is None or time is None:
        raise _broken(what, "row 1 lacks Brats20ID (or BraTS19ID, BraTS18ID) or Survival_days. Copy the file again.")
    once(lines, case_id)

    def parse(line: Line) -> Survival:
        alive = ALIVE.fullmatch(line.text(time))
        days = float(alive.group(1)) if alive else _positive(line, time)
        if days <= 0:
            raise line.wrong(time, "is not above 0")
        return Survival(line.number, line.text(case_id), days, alive is None, line.others(case_id, time))

    return each_row(lines, parse)


def _positive(line: Line, column: str) -> float:
    value = line.number_of(column)
    if value <= 0:
        raise line.wrong(column, "is not above 0")
    return value


def _broken(what: str, why: str) -> ManifestInvalid:
    code: Code = "LABEL_UNREADABLE"
    return ManifestInvalid(f"{what}: {why}", code=code)
