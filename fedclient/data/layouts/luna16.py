"""LUNA16: `subset0` to `subset9` with an .mhd file for each CT series, tables of nodules, and masks of lungs.

The data set says nothing of patients; it holds one series of nearly each, so that the series stands for the patient.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from fedclient.data.cases import Case, Channel, Listing, Marks
from fedclient.data.findings import Finding, finding, patients_untold
from fedclient.data.layouts.peek import Peek
from fedclient.data.luna16 import Mark, read_annotations, read_excluded
from fedclient.data.manifest import case_key, split_of
from fedclient.data.metaimage import voxel_file
from fedclient.data.where import Where, inside
from shared_models.errors import ImageUnreadable, ManifestInvalid

SUBSET = re.compile(r"subset\d{1,2}", re.IGNORECASE)
TABLES = ("", "CSVFILES", "evaluationScript/annotations")  # folders in which copies of the data set have them
LUNGS = "seg-lungs-LUNA16"


def found(seen: Peek) -> bool:
    scans = (n for n in seen.files if n.endswith(".mhd") and n.count("/") == 1)
    return any(SUBSET.fullmatch(n.partition("/")[0]) for n in scans)


def cases(where: Where, salt: str) -> Listing:
    """A case for each series; without annotations.csv nobody knows its nodules, and its lungs are all it teaches.

    Raises:
        ManifestInvalid: a table that is broken, or a link out of the folder.
    """
    root = where.folder.resolve()
    nodules = _table(root, "annotations.csv", read_annotations)
    excluded = _table(root, "annotations_excluded.csv", read_excluded) or {}
    findings: list[Finding] = []
    listed: list[Case] = []
    there: set[str] = set()
    subsets = sorted(path.name for path in root.iterdir() if path.is_dir() and SUBSET.fullmatch(path.name))
    for subset in subsets:
        for name in _series(inside(root, subset)):
            key = case_key(salt, name, name)
            if name in there:
                findings.append(finding("DUPLICATE", "a series that lies in two subsets; the first is taken", case=key))
                continue
            there.add(name)
            try:
                image = inside(root, f"{subset}/{name}.mhd")
                voxel_file(image)
            except (ImageUnreadable, ManifestInvalid) as e:
                code = e.code if e.code == "PATH_ESCAPE" else "FILE_MISSING"
                findings.append(finding(code, f"series left out: {e}", case=key))
                continue
            marks = Marks(
                nodules=None if nodules is None else nodules.get(name, ()),
                excluded=excluded.get(name, ()),
                lungs=_lungs(root, name),
            )
            labelled = marks if marks.nodules is not None or marks.lungs is not None else None
            listed.append(Case(key, name, (Channel(files=(image,)),), labelled, split_of(name, salt)))
    if nodules is None:
        findings.append(finding("LABEL_MISSING", "annotations.csv is not there: no nodules can be learnt"))
    elif away := len(nodules.keys() - there):
        what = f"annotations.csv marks nodules in {away} series that are not here"
        findings.append(finding("LABEL_ORPHAN", what, severity="note"))
    if listed:
        findings.append(patients_untold("LUNA16", "series"))
    return Listing(f"LUNA16, {len(subsets)} subset{'s' * (len(subsets) != 1)}", tuple(listed), tuple(findings))


def _series(subset: Path) -> Iterable[str]:
    return sorted(path.stem for path in subset.glob("*.mhd") if not path.name.startswith("."))


def _table(root: Path, name: str, read: Callable[[Path], tuple[Mark, ...]]) -> dict[str, tuple[Mark, ...]] | None:
    """The marks of each series; None if there is no such table."""
    path = next((Path(folder, name) for folder in TABLES if (root / folder / name).exists()), None)
    if path is None:
        return None
    try:
        marks = read(inside(root, path.as_posix()))
    except ManifestInvalid as e:
        if e.code == "LABEL_EMPTY":  # a heading alone: there are none
            return {}
        raise e if str(e).startswith(name) else ManifestInvalid(f"{name} {e}", e.code) from None
    by_series: defaultdict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_series[mark.series_uid].append(mark)
    return {uid: tuple(of) for uid, of in by_series.items()}


def _lungs(root: Path, name: str) -> Path | None:
    try:
        return inside(root, f"{LUNGS}/{name}.mhd")
    except ManifestInvalid as e:
        if e.code == "FILE_MISSING":
            return None
        raise ManifestInvalid(f"{LUNGS} {e}", e.code) from None
