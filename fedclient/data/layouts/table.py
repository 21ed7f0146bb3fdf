"""A folder and `labels.csv`: images of any format, and what each shows as classes, boxes or a mask.

Columns: `image`; one of `mask`, `x_min,y_min,x_max,y_max,label`, `label` (`a`, `a|b`, `none`; empty is not looked at),
or a column of 0 and 1 for each class; and if wanted `patient_id`, `split`, `site`, `age`, `sex` and others.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedclient.data.boxes import EDGES
from fedclient.data.cases import Case, Channel, Label, Listing, Mask, Shown
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.peek import Peek
from fedclient.data.manifest import SPLITS, boxes_of, case_key, check_splits, rows_of_site, split_of
from fedclient.data.tables import Line, read_table
from fedclient.data.where import Where, inside
from shared_models.errors import ManifestInvalid

NAME = "labels.csv"
NONE = "none"
LabelOf = Callable[[Sequence[Line]], Label | None]  # from the rows of one image
KNOWN = frozenset(("image", "mask", "label", *EDGES, "patient_id", "split", "site", "age", "sex"))
ELSEWHERE = KNOWN - {"age", "sex"}  # columns that a case holds by other names; all others are facts of it


def found(seen: Peek) -> bool:
    return seen.has(NAME)


def sites(folder: Path) -> tuple[str, ...]:
    """The sites that the table names, sorted."""
    return tuple(sorted({line.values["site"] for line in _lines(folder.resolve()) if line.values.get("site")}))


def cases(where: Where, salt: str) -> Listing:
    """A case for each image; without `patient_id`, each is taken for another patient's.

    Raises:
        ManifestInvalid: a table that is broken or says nothing of labels, a patient in two splits, an unknown site.
    """
    root = where.folder.resolve()
    every = _lines(root)
    label_of = _kind(every)
    listed: list[Case] = []
    findings: list[Finding] = []
    for site in where.sites or (None,):
        made, wrong = _of_rows(root, rows_of_site(every, site, where.folder / NAME), label_of, salt)
        listed += made
        findings += wrong
    check_splits(listed, where.folder / NAME)
    if "patient_id" not in every[0].values:
        what = f"{NAME} has no column patient_id: each image is taken for another patient's"
        findings.append(finding("PATIENT_UNKNOWN", what, severity="warn"))
    return Listing(f"{NAME}, {len(listed)} images", tuple(listed), tuple(findings))


def _of_rows(root: Path, lines: Sequence[Line], label_of: LabelOf, salt: str) -> tuple[list[Case], list[Finding]]:
    """The cases of one site, and what is wrong with rows that make none."""
    by_image: dict[str, list[Line]] = {}
    for line in lines:
        by_image.setdefault(line.values["image"], []).append(line)
    listed: list[Case] = []
    findings: list[Finding] = []
    taken: dict[Path, int] = {}
    for image, rows in by_image.items():
        row = rows[0].number
        try:
            case = _case(root, rows, label_of(rows), salt)
            first = taken.setdefault(case.channels[0].files[0], row)
            if first != row:
                raise ManifestInvalid(f"row {row}: the same image as in row {first}", "DUPLICATE")
            listed.append(case)
        except ManifestInvalid as e:
            findings.append(finding(e.code, str(e), case=case_key(salt, _patient(rows), image), row=row))
    return listed, findings


def _lines(root: Path) -> list[Line]:
    try:
        return read_table(inside(root, NAME), NAME, ["image"])
    except ManifestInvalid as e:
        raise e if str(e).startswith(NAME) else ManifestInvalid(f"{NAME} {e}", e.code) from None


def _kind(lines: Sequence[Line]) -> LabelOf:
    """How the rows of one image become its label, by the columns that there are."""
    columns = lines[0].values.keys()
    if columns >= {*EDGES, "label"}:
        return boxes_of
    if "mask" in columns:
        return _mask
    if "label" in columns:
        return _named
    held = {name: {line.values[name] for line in lines} - {""} for name in columns if name and name not in KNOWN}
    classes = tuple(name for name, values in held.items() if values and values <= {"0", "1"})
    if not classes:
        raise ManifestInvalid(
            f"{NAME}: row 1 has no column `mask`, `label` or `x_min`, and none of 0 and 1 for a class. Add one.",
            code="LABEL_UNREADABLE",
        )
    return lambda rows: _flagged(rows, classes)


def _case(root: Path, rows: Sequence[Line], label: Label | None, salt: str) -> Case:
    row, patient = rows[0], _patient(rows)
    for column in ("patient_id", "split", "site"):
        if len({each.values.get(column) for each in rows}) > 1:
            raise row.wrong(column, "differs from that of another row of the same image")
    split = row.text("split") if "split" in row.values else split_of(patient, salt)
    if split not in SPLITS:
        raise ManifestInvalid(f"row {row.number}: `split` is none of {', '.join(SPLITS)}")
    if "patient_id" in row.values:
        row.text("patient_id")
    if isinstance(label, Mask):
        label = Mask(_inside(root, row, "mask"))
    return Case(
        key=case_key(salt, patient, row.values["image"]),
        patient=patient,
        channels=(Channel(files=(_inside(root, row, "image"),)),),
        label=label,
        split=split,
        row=row.number,
        facts={name: value for name, value in row.values.items() if name and name not in ELSEWHERE and value},
    )


def _patient(rows: Sequence[Line]) -> str:
    return rows[0].values.get("patient_id") or rows[0].values["image"]


def _mask(rows: Sequence[Line]) -> Mask | None:
    row = _only(rows)
    return Mask(Path(row.values["mask"])) if row.values["mask"] else None


def _named(rows: Sequence[Line]) -> Shown | None:
    names = [part.strip() for part in _only(rows).values["label"].split("|")]
    if names == [""]:
        return None
    return Shown(tuple(dict.fromkeys(name for name in names if name and name.casefold() != NONE)))


def _flagged(rows: Sequence[Line], classes: Sequence[str]) -> Shown | None:
    values = _only(rows).values
    asked = tuple(name for name in classes if values[name])
    return Shown(tuple(name for name in asked if values[name] == "1"), asked) if asked else None


def _only(rows: Sequence[Line]) -> Line:
    if len(rows) > 1:
        raise ManifestInvalid(f"row {rows[1].number}: the same image as in row {rows[0].number}", "DUPLICATE")
    return rows[0]


def _inside(root: Path, row: Line, column: str) -> Path:
    try:
        return inside(root, row.text(column))
    except ManifestInvalid as e:
        raise e if str(e).startswith("row") else ManifestInvalid(f"row {row.number}: `{column}` {e}", e.code) from None
