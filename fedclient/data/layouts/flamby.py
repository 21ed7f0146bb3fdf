"""The imaging data sets of FLamby (Ogier du Terrail et al. 2022) as it keeps them, with its sites and its splits.

    fed-ixi         metadata_tiny.csv        IXI_sample/IXI002-Guys-0828/{T1,label}/*.nii.gz
    fed-kits19      thresholded_sites.csv    case_00021/{imaging,segmentation}.nii.gz, or the same below data/
    fed-isic2019    train_test_split         ISIC_2019_Training_Input_preprocessed/ISIC_0065613.jpg
    fed-camelyon16  metadata.csv             normal_001.tif.npy: the features of a slide's tiles

Each table lies in FLamby's repository; who has the data puts it beside them. The tables know training and test only, so
no case is for validation. Cases that a table names and the folder has not are left out, and told.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from fedclient.data.cases import Case, Channel, Label, Listing, Mask, Shown, Split
from fedclient.data.findings import finding, patients_untold
from fedclient.data.layouts.peek import Peek
from fedclient.data.manifest import case_key, check_splits, rows_of_site
from fedclient.data.tables import Line, read_table
from fedclient.data.where import Where, inside
from shared_models.errors import ManifestInvalid

LESIONS = ("mel", "nv", "bcc", "ak", "bkl", "df", "vasc", "scc")  # of ISIC 2019, by their number in the table
SKIN = ("bcn", "vidir-molemax", "vidir-modern", "rosendahl", "msk", "vienna-dias")  # its centres, likewise
SLIDES = ("rumc", "umcu")
BRAINS = ("guys", "hh", "iop")
PICTURES = "ISIC_2019_Training_Input_preprocessed"
SUBJECT = re.compile(r"IXI(\d{3})-[A-Za-z]+-\d+")


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a table, and where its files should lie, relative to the data folder.

    Attributes:
        label: classes of the image; or how the values of its mask are called.
        mask: None where the label is classes.
    """

    number: int
    site: str
    patient: str = field(repr=False)
    split: Split
    image: str = field(repr=False)
    mask: str | None = field(repr=False)
    label: Shown | Mapping[int, str]

    @property
    def values(self) -> Mapping[str, str]:
        return {"site": self.site}


@dataclass(frozen=True, slots=True)
class Kept:
    """One of the data sets: its table and the columns of it that are read, and how its rows become entries.

    Attributes:
        patients: whether each case is a patient.
    """

    title: str
    tables: tuple[str, ...]
    columns: tuple[str, ...]
    entries: Callable[[Path, Sequence[Line]], Iterator[Entry]]
    patients: bool = True


def _brains(root: Path, lines: Sequence[Line]) -> Iterator[Entry]:
    """IXI Tiny; the table names a subject by the number in its folder's name."""
    folder = next((f for f in sorted(root.glob("**/IXI_sample")) if f.is_dir()), root)
    subjects = {int(found[1]): path for path in sorted(folder.iterdir()) if (found := SUBJECT.fullmatch(path.name))}
    for line in lines:
        number = _whole(line, "Patient ID", 999)
        subject = subjects.get(number, folder / f"IXI{number:03d}")
        image, mask = (_only_file(root, subject / kind) for kind in ("T1", "label"))
        site = BRAINS[_whole(line, "Manufacturer", len(BRAINS) - 1)]
        yield Entry(line.number, site, f"IXI{number:03d}", _split(line, "Split"), image, mask, {1: "brain"})


def _only_file(root: Path, folder: Path) -> str:
    found = sorted(folder.glob("*.nii.gz"))
    return (found[0] if found else folder / "missing.nii.gz").relative_to(root).as_posix()


def _kidneys(root: Path, lines: Sequence[Line]) -> Iterator[Entry]:
    below = "data/" if (root / "data").is_dir() else ""
    for line in lines:
        case = line.text("case_ids")
        image, mask = f"{below}{case}/imaging.nii.gz", f"{below}{case}/segmentation.nii.gz"
        site = f"site-{_whole(line, 'site_ids', 99)}"
        yield Entry(line.number, site, case, _split(line, "train_test_split"), image, mask, {1: "kidney", 2: "tumour"})


def _skins(root: Path, lines: Sequence[Line]) -> Iterator[Entry]:
    """ISIC 2019; which pictures are of one patient it does not say."""
    for line in lines:
        name = line.text("image")
        shown = Shown((LESIONS[_whole(line, "target", len(LESIONS) - 1)],))
        site = SKIN[_whole(line, "center", len(SKIN) - 1)]
        yield Entry(line.number, site, name, _split(line, "fold"), f"{PICTURES}/{name}.jpg", None, shown)


def _slides(root: Path, lines: Sequence[Line]) -> Iterator[Entry]:
    """Camelyon16; the challenge's slides `test_` are for test. The files' names are compared without regard to case."""
    files = {path.name.casefold(): path.name for path in root.glob("*.npy")}
    for line in lines:
        slide = line.text("slide_name")
        split: Split = "test" if slide.casefold().startswith("test") else "train"
        shown = Shown(("tumour",) if _whole(line, "label", 1) else ())
        site = SLIDES[_whole(line, "hospital_corrected", len(SLIDES) - 1)]
        name = f"{slide}.npy"
        yield Entry(line.number, site, slide, split, files.get(name.casefold(), name), None, shown)


KEPT: Mapping[str, Kept] = {
    "fed-ixi": Kept("Fed-IXI", ("metadata_tiny.csv",), ("Patient ID", "Manufacturer", "Split"), _brains),
    "fed-kits19": Kept(
        "Fed-KiTS19", ("thresholded_sites.csv",), ("case_ids", "site_ids", "train_test_split"), _kidneys
    ),
    "fed-isic2019": Kept(
        "Fed-ISIC2019",
        ("train_test_split", "train_test_split.csv"),
        ("image", "target", "center", "fold"),
        _skins,
        patients=False,
    ),
    "fed-camelyon16": Kept("Fed-Camelyon16", ("metadata.csv",), ("label", "hospital_corrected", "slide_name"), _slides),
}


def found(name: str) -> Callable[[Peek], bool]:
    kept = KEPT[name]

    def fits(seen: Peek) -> bool:
        there = [table for table in kept.tables if seen.has(table)]
        try:
            return bool(there) and {*kept.columns} <= _lines(seen.folder.resolve(), kept)[0].values.keys()
        except ManifestInvalid:
            return False

    return fits


def sites(name: str) -> Callable[[Path], tuple[str, ...]]:
    def of(folder: Path) -> tuple[str, ...]:
        root = folder.resolve()
        return tuple(sorted({entry.site for entry in KEPT[name].entries(root, _lines(root, KEPT[name]))}))

    return of


def cases(name: str) -> Callable[[Where, str], Listing]:
    """The cases of one of the data sets.

    Raises:
        ManifestInvalid: a table that is not there or broken, an unknown site, or none of its files.
    """
    kept = KEPT[name]

    def of(where: Where, salt: str) -> Listing:
        root = where.folder.resolve()
        lines = _lines(root, kept)
        entries = list(kept.entries(root, lines))
        chosen = [
            e for site in where.sites or (None,) for e in rows_of_site(entries, site, where.folder / lines[0].what)
        ]
        made = [case for case in (_case(root, entry, salt) for entry in chosen) if case is not None]
        if not made:
            raise ManifestInvalid(
                f"{where.folder}: none of the {len(chosen)} cases of {lines[0].what} is there; the first should be "
                f"{chosen[0].image!r}. Put the data beside the table as {kept.title} has them.",
                code="FILE_MISSING",
            )
        check_splits(made, where.folder / lines[0].what)
        what = f"{lines[0].what} names {len(chosen)} cases, {len(made)} are there"
        findings = [finding("FILE_MISSING", what, severity="warn")] if len(made) < len(chosen) else []
        if not kept.patients:
            findings.append(patients_untold(lines[0].what, "picture"))
        return Listing(f"{kept.title}, {len(made)} cases", tuple(made), tuple(findings))

    return of


def _lines(root: Path, kept: Kept) -> list[Line]:
    there = next((table for table in kept.tables if (root / table).exists()), kept.tables[0])
    try:
        return read_table(inside(root, there), there, kept.columns)
    except ManifestInvalid as e:
        raise e if str(e).startswith(there) else ManifestInvalid(f"{there} {e}", e.code) from None


def _case(root: Path, entry: Entry, salt: str) -> Case | None:
    """None where a file of it is not there; a path that leads out of the folder is refused."""
    try:
        image = inside(root, entry.image)
        mask = None if entry.mask is None else inside(root, entry.mask)
    except ManifestInvalid as e:
        if e.code == "FILE_MISSING":
            return None
        raise ManifestInvalid(f"row {entry.number}: its file {e}", e.code) from None
    label: Label = entry.label if isinstance(entry.label, Shown) else Mask(cast(Path, mask), entry.label)
    key = case_key(salt, entry.patient, entry.image)
    return Case(key, entry.patient, (Channel(files=(image,)),), label, entry.split, entry.number)


def _split(line: Line, column: str) -> Split:
    split = line.text(column)
    if split not in ("train", "test"):
        raise line.wrong(column, "is neither train nor test")
    return cast(Split, split)


def _whole(line: Line, column: str, most: int) -> int:
    value = line.number_of(column)
    if value != int(value) or not 0 <= value <= most:
        raise line.wrong(column, f"is no whole number from 0 to {most}")
    return int(value)
