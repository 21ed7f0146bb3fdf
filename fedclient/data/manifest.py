"""`manifest.csv`: which files make a case, whose they are, and what each is for.

Columns: `patient_id`, `image`, `mask` (paths inside the data folder; a DICOM series is named by its own folder), and if
wanted `site` and `split` (train, val, test). A study of another task than segmentation reads other columns: `label`
(`a`, `a|b` or `none`), `time` and `event`, covariates, or what it calls them; then there need be no `mask`, and for a
network that sees a table alone no `image`. Lesions stand as boxes in `x_min`, `y_min`, `x_max`, `y_max`, `label`, a row
for each (one with these empty is an image without), or in a table of their own (fedclient/data/marked.py). No message
names a patient or a file, only rows (the heading is row 1).
"""

import csv
import hmac
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast, get_args

from fedclient.data.boxes import EDGES, box_of
from fedclient.data.cases import Boxes, Case, Channel, Label, Marks, Mask, Shown, Split
from fedclient.data.marked import read_marked
from fedclient.data.tables import Line, csv_rows, lacks, rows_below
from fedclient.data.where import inside
from shared_models.errors import ImageUnreadable, ManifestInvalid

T = TypeVar("T")
Progress = Callable[[int, int], None]  # cases done, cases in all
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of the patients, where the manifest leaves the split to us
MAX_BYTES = 256 * 1024**2  # of the table
SHOWN = 5  # complaints in one message
OWN = frozenset({"patient_id", "image", "mask", "site", "split"})


class Row(Protocol):
    """One row of a table, as a spreadsheet counts."""

    @property
    def number(self) -> int: ...

    @property
    def values(self) -> Mapping[str, str]: ...


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    values: dict[str, str]

    def get(self, column: str) -> str:
        value = self.values[column]
        if not value:
            raise ManifestInvalid(f"row {self.number}: `{column}` is empty")
        return value


def read_manifest(folder: Path, site: str | None, salt: str) -> tuple[Case, ...]:
    """The cases of `site` (or of all rows, where no site is named), ordered by key.

    Without a `split` column the split is a function of salt and patient: cases that come later move nobody.

    Raises:
        ManifestInvalid: a missing or empty column, an unknown split or site, a file that is missing or lies outside
            the folder, an image listed twice, or a patient in two splits.
    """
    path = folder / "manifest.csv"
    every = _rows(folder)
    rows = rows_of_site(every, site, path)
    marked = read_marked(folder, _images(every), _images(rows))
    cases: list[Case] = []
    complaints: list[str] = []
    codes: set[str] = set()
    for together in _by_image(rows):
        try:
            cases.append(_case(folder.resolve(), together, salt, marked))
        except ManifestInvalid as e:
            complaints.append(str(e))
            codes.add(e.code)
    complaints += _twice(cases)
    if complaints:
        more = f"\n... and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        told = f"{path}:\n" + "\n".join(complaints[:SHOWN]) + f"{more}\nMend these rows."
        raise ManifestInvalid(
            told, next((c for c in ("PATH_ESCAPE", "FILE_MISSING") if c in codes), "MANIFEST_INVALID")
        )
    check_splits(cases, path)
    return tuple(sorted(cases, key=lambda case: case.key))


def read_sites(folder: Path, sites: Sequence[str], salt: str) -> tuple[Case, ...]:
    """The cases of each of `sites`, one after the other; none named is every row, as in `read_manifest`."""
    return tuple(case for site in sites or (None,) for case in read_manifest(folder, site, salt))


def usable(cases: Sequence[Case], use: Callable[[Case], T], progress: Progress | None = None) -> Iterator[T]:
    """What `use` makes of each case, one at a time; a case without labels of the study takes no part.

    Raises:
        ImageUnreadable: when all have been tried, the rows that `use` could not read; those without labels too, if
            no case has any.
    """
    complaints: list[str] = []
    unlabelled: list[str] = []
    for done, case in enumerate(cases, start=1):
        try:
            yield use(case)
        except ImageUnreadable as e:
            (unlabelled if e.code == "LABEL_MISSING" else complaints).append(f"{case.where}: {e}")
        if progress is not None:
            progress(done, len(cases))
    if unlabelled and len(unlabelled) + len(complaints) == len(cases):
        complaints += unlabelled
    if complaints:
        more = f"\n... and {len(complaints) - SHOWN} more" if len(complaints) > SHOWN else ""
        raise ImageUnreadable(
            f"{len(complaints)} of {len(cases)} cases cannot be used:\n"
            + "\n".join(complaints[:SHOWN])
            + f"{more}\nMend these files, or take them out."
        )


def sites_of(folder: Path) -> tuple[str, ...]:
    """The sites that the manifest of `folder` names, sorted; none if it has no such column."""
    return tuple(sorted({row.values["site"] for row in _rows(folder) if row.values.get("site")}))


def split_of(patient: str, salt: str) -> Split:
    """70 of 100 patients train, 10 validate, 20 test; the same patient always the same."""
    drawn = int.from_bytes(_hmac(salt, "split", patient)[:8]) / 2**64
    if drawn < SHARES["train"]:
        return "train"
    return "val" if drawn < SHARES["train"] + SHARES["val"] else "test"


def train_or_val(patient: str, salt: str) -> Split:
    """As `split_of`, where the data set brings its own test patients: those drawn to test train."""
    return "val" if split_of(patient, salt) == "val" else "train"


def case_key(salt: str, patient: str, name: str) -> str:
    """16 hex digits of HMAC-SHA256; `name` tells the images of a patient apart: a path in the data folder, a UID."""
    return _hmac(salt, "case", patient, name).hex()[:16]


def _hmac(salt: str, *words: str) -> bytes:
    return hmac.digest(salt.encode(), "\0".join(words).encode(), "sha256")


def _rows(folder: Path) -> list[_Row]:
    path = folder / "manifest.csv"
    if not path.is_file():
        raise ManifestInvalid(
            f"{path}: there is no such file. Make one with the columns patient_id, image, mask; a row for each image."
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestInvalid(f"{path}: it is a link out of the data folder. Put the file itself there.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ManifestInvalid(f"{path}: it has more than {MAX_BYTES} bytes. Split it.")
        table = csv_rows(path.read_bytes())
        columns = [name.strip() for name in table[0]] if table else []
        missing = [name for name in ("patient_id", "image", "mask") if name not in columns]
        if "patient_id" in missing or (missing and not {*columns} - OWN):
            raise ManifestInvalid(f"{path}: {lacks(columns, missing)}")
        doubled = [name for name, times in Counter(columns).items() if name and times > 1]
        if doubled:
            raise ManifestInvalid(f"{path}: row 1 has the columns {', '.join(doubled)} twice. Remove one.")
        rows = [_Row(number, values) for number, values in rows_below(columns, table)]
    except OSError as e:
        raise ManifestInvalid(f"{path}: it cannot be read ({type(e).__name__}). Mend its rights.") from None
    except csv.Error as e:
        raise ManifestInvalid(f"{path}: {e}") from None
    if not rows:
        raise ManifestInvalid(f"{path}: it has a heading and no rows. Add a row for each image.")
    return rows


def rows_of_site(rows: Sequence[RowT], site: str | None, path: Path) -> Sequence[RowT]:
    """The rows of one site, or all of a table of one site or none.

    Raises:
        ManifestInvalid: an empty or unknown site, or several and none chosen.
    """
    if "site" not in rows[0].values:
        if site is not None:
            raise ManifestInvalid(f"{path}: site {site!r} was chosen, but there is no column `site`. Choose none.")
        return rows
    empty = [row.number for row in rows if not row.values["site"]]
    if empty:
        raise ManifestInvalid(f"{path}: row {empty[0]}: `site` is empty. Fill it, or remove the column.")
    sites = sorted({row.values["site"] for row in rows})
    if site is None and len(sites) > 1:
        raise ManifestInvalid(
            f"{path}: it holds the sites {', '.join(sites)}. Choose one of them: `fedclient join --manifest-site "
            f'{sites[0]}`, or manifest_site = "{sites[0]}" under [data] of site.toml where the site has joined.'
        )
    if site is not None and site not in sites:
        raise ManifestInvalid(f"{path}: there is no site {site!r}. It holds: {', '.join(sites)}.")
    return [row for row in rows if site is None or row.values["site"] == site]


def _images(rows: Sequence[_Row]) -> dict[str, tuple[str, ...]]:
    """Patient -> his images, as the rows name them."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        images = found.setdefault(row.values["patient_id"], {})
        if row.values.get("image"):
            images[row.values["image"]] = None
    return {patient: tuple(images) for patient, images in found.items()}


def _by_image(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Each row alone; of a table of boxes those of one image together."""
    if "image" not in rows[0].values or not {*EDGES, "label"} <= rows[0].values.keys():
        yield from ([row] for row in rows)
        return
    together: dict[str, list[_Row]] = {}
    for row in rows:
        together.setdefault(row.values["image"], []).append(row)
    yield from together.values()


def _case(root: Path, rows: Sequence[_Row], salt: str, marked: Mapping[str, Marks] | None) -> Case:
    row = rows[0]
    for column in ("patient_id", "mask", "split"):
        if len({each.values.get(column) for each in rows}) > 1:
            raise ManifestInvalid(f"row {row.number}: `{column}` differs from that of another row of the same image")
    patient = row.get("patient_id")
    image = _inside(root, row, "image") if "image" in row.values else None
    if "split" not in row.values:
        split = split_of(patient, salt)
    elif row.get("split") in SPLITS:
        split = cast(Split, row.get("split"))
    else:
        raise ManifestInvalid(f"row {row.number}: `split` is none of {', '.join(SPLITS)}")
    return Case(
        key=case_key(salt, patient, "" if image is None else image.relative_to(root).as_posix()),
        patient=patient,
        channels=() if image is None else (Channel(files=(image,)),),
        label=_label(root, rows),
        split=split,
        row=row.number,
        facts=_facts(rows),
        marks=None if marked is None or image is None else marked[row.values["image"]],
    )


def _facts(rows: Sequence[_Row]) -> dict[str, str]:
    """Columns that are not the manifest's own; the classes of several boxes joined."""
    facts = {name: value for name, value in rows[0].values.items() if name not in OWN and value}
    if len(rows) > 1:
        facts["label"] = "|".join(dict.fromkeys(row.values["label"] for row in rows))
    return facts


def boxes_of(rows: Sequence[Line]) -> Boxes:
    """The boxes of the rows of one image.

    Raises:
        ManifestInvalid: LABEL_VALUES, a box that cannot be, or an image both with boxes and without.
    """
    boxes = [box_of(row) for row in rows]
    if None in boxes and len(boxes) > 1:
        raise rows[0].wrong("image", "is there with boxes and without")
    return Boxes(tuple(box for box in boxes if box is not None))


def _label(root: Path, rows: Sequence[_Row]) -> Label | None:
    row = rows[0]
    if row.values.get("mask"):
        return Mask(_inside(root, row, "mask"))
    if {*EDGES, "label"} <= row.values.keys():
        return boxes_of([Line("manifest.csv", each.number, each.values) for each in rows])
    named = row.values.get("label")
    return Shown(tuple(name.strip() for name in named.split("|"))) if named else None


def _inside(root: Path, row: _Row, column: str) -> Path:
    named = row.get(column)
    try:
        return inside(root, named)
    except ManifestInvalid as e:
        raise ManifestInvalid(f"row {row.number}: `{column}` {e}", e.code) from None


def _twice(cases: Sequence[Case]) -> list[str]:
    first: dict[Path | str, int] = {}
    found: list[str] = []
    for case in cases:
        image = case.channels[0].files[0] if case.channels else None
        row = first.setdefault(image or case.patient, case.row)
        if row != case.row:
            found.append(f"row {case.row}: the same {'image' if image else 'patient'} as in row {row}")
    return found


def check_splits(cases: Sequence[Case], path: Path) -> None:
    """Refuses patients who are in more than one split."""
    splits: dict[str, set[str]] = {}
    for case in cases:
        splits.setdefault(case.patient, set()).add(case.split)
    torn = sum(len(of) > 1 for of in splits.values())
    if torn:
        raise ManifestInvalid(
            f"{path}: {torn} of {len(splits)} patients are in more than one split, so that training would see test "
            f"patients. Give all rows of a patient the same `split`, or remove that column.",
            code="LEAKAGE_PATIENT",
        )
