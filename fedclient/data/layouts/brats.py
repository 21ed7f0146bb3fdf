"""BraTS of adult gliomas, 2018 to 2024: a folder for each case with four contrasts and `seg`, values by its year.

Value 4 is the enhancing tumour until 2021, nothing in 2023, and the resection cavity in 2024; 3 is nothing until 2021
and the enhancing tumour since. So the year comes from names that the challenge gave, or from a person, never from
values.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePath

from fedclient.data.cases import Case, Channel, Listing, Mask
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.peek import Peek
from fedclient.data.manifest import case_key, split_of
from fedclient.data.where import Where, files_below
from shared_models.errors import ManifestInvalid

OLD = {1: "necrosis", 2: "oedema", 4: "enhancing"}
PARTS: Mapping[str, Mapping[int, str]] = {
    "2018": OLD,
    "2019": OLD,
    "2020": OLD,
    "2021": OLD,
    "2023": {1: "necrosis", 2: "oedema", 3: "enhancing"},
    "2024": {1: "necrosis", 2: "oedema", 3: "enhancing", 4: "cavity"},
}
CONTRASTS = {  # as files are called until 2021 and since 2023 -> as studies call them
    "t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair",
    "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair",
}  # fmt: skip
FILE = re.compile(rf"(.+)[_-]({'|'.join(CONTRASTS)}|seg)\.nii(?:\.gz)?", re.IGNORECASE)
NAMES = {  # years that a case's name may be of -> the name, and what of it is the patient
    ("2018",): re.compile(r"(brats18_.+?)(?:_\d+)?", re.IGNORECASE),
    ("2019",): re.compile(r"(brats19_.+?)(?:_\d+)?", re.IGNORECASE),
    ("2020",): re.compile(r"(brats20_.+)", re.IGNORECASE),
    ("2021",): re.compile(r"(brats2021_.+)", re.IGNORECASE),
    ("2023", "2024"): re.compile(r"(brats-gli-\d+)(?:-\d+)?", re.IGNORECASE),
}
RELEASE = re.compile(r"brats[-_ ]?(2023|2024)", re.IGNORECASE)
UNTOLD = "brats"


def found(year: str) -> Callable[[Peek], bool]:
    """Whether a folder's names tell that year; of the year UNTOLD, whether it is BraTS of no year that they tell."""
    return lambda seen: year in _years(seen)


def cases(year: str) -> Callable[[Where, str], Listing]:
    return lambda where, salt: _cases(where, salt, year)


def ask(where: Where, salt: str) -> Listing:
    """The answer to BraTS of an unknown year.

    Raises:
        ManifestInvalid: always, with how to say it.
    """
    raise ManifestInvalid(
        f"{where.folder}: it is laid out as BraTS, and no name in it tells the year; label 4 is enhancing tumour until "
        f'2021 and the resection cavity in 2024. Say which: layout = "brats-2023" under [data] of site.toml, or '
        f"--layout brats-2023. Known: {', '.join(f'brats-{year}' for year in PARTS)}."
    )


def _cases(where: Where, salt: str, year: str) -> Listing:
    """A case for each folder with all four contrasts; follow-ups of a patient have one split.

    Raises:
        ManifestInvalid: folders that are named as another year's.
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder.
    """
    root = where.folder.resolve()
    folders: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for path in files_below(root, Counter()):
        if what := _content(path):
            folders[path.parent].setdefault(what, path)
    others = sum(year not in years for folder in folders if (years := _named(folder.name)[0]))
    if others:
        raise ManifestInvalid(
            f"{where.folder}: {others} of {len(folders)} case folders are named as those of another year than {year}, "
            f"whose labels mean other things. Choose that year's layout, or give each year a folder of its own.",
            code="LABEL_VALUES",
        )
    listed: dict[str, Case] = {}
    findings: list[Finding] = []
    for number, folder in enumerate(sorted(folders), start=1):
        held, patient = folders[folder], _named(folder.name)[1]
        key = case_key(salt, patient, folder.name)
        missing = sorted({*CONTRASTS.values()} - held.keys())
        if folder.name in listed:
            findings.append(finding("DUPLICATE", f"case folder {number} by name is there twice", case=key))
        elif missing:
            what = f"case folder {number} by name lacks {', '.join(missing)}, and was left out"
            findings.append(finding("FILE_MISSING", what, case=key))
        else:
            channels = tuple(Channel(name, (held[name],)) for name in ("t1", "t1ce", "t2", "flair"))
            mask = Mask(held["seg"], dict(PARTS[year])) if "seg" in held else None
            listed[folder.name] = Case(key, patient, channels, mask, split_of(patient, salt))
    return Listing(f"BraTS {year}, {len(listed)} cases", (*listed.values(),), tuple(findings))


@lru_cache(maxsize=1)  # every year's layout asks it of one folder
def _years(seen: Peek) -> frozenset[str]:
    """The years that the names in a folder tell; UNTOLD among them where cases tell none."""
    told: set[str] = set()
    for name in seen.files:
        if not name.lower().endswith((".nii", ".nii.gz")) or not _content(path := PurePath(name)):
            continue
        years = _named(path.parent.name)[0]
        if len(years) != 1:
            years = _released((seen.folder.resolve().name, *path.parts)) or (UNTOLD,)
        told.update(years)
    return frozenset(told)


def _released(folders: Iterable[str]) -> tuple[str, ...]:
    """The year of the challenge's own folder around the cases."""
    return tuple({year[1] for name in folders if (year := RELEASE.search(name))})


def _content(path: PurePath) -> str:
    """`t1`, `t1ce`, `t2`, `flair` or `seg` if a file is one of a case, named after its folder; else nothing."""
    parts = FILE.fullmatch(path.name)
    if parts is None or parts[1].casefold() != path.parent.name.casefold():
        return ""
    what = parts[2].lower()
    return CONTRASTS.get(what, what)


def _named(case: str) -> tuple[tuple[str, ...], str]:
    """The years that a case's name may be of, none if it is not the challenge's, and the patient in it."""
    for years, pattern in NAMES.items():
        if parts := pattern.fullmatch(case):
            return years, parts[1].upper()
    return (), case.upper()
