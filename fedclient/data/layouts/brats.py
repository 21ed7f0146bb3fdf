"""BraTS, 2018 to 2024: a folder for each case with four contrasts and `seg`, values by its year and kind of tumour.

Value 4 is the enhancing tumour until 2021, nothing in 2023, and the resection cavity in 2024; 3 is nothing until 2021
and the enhancing tumour since. So the year comes from names that the challenge gave, or from a person, never from
values. Since 2023 a case's name says whose tumour it is: children's have values of their own.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath

from fedclient.data.cases import Case, Channel, Listing, Mask
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.peek import Peek
from fedclient.data.manifest import case_key, split_of
from fedclient.data.where import Where, files_below
from shared_models.errors import ManifestInvalid

OLD = {1: "necrosis", 2: "oedema", 4: "enhancing"}
NEW = {1: "necrosis", 2: "oedema", 3: "enhancing"}  # called NCR or NETC, ED or SNFH, ET
PARTS: Mapping[str, Mapping[int, str]] = {  # of gliomas of adults, which every year has
    "2018": OLD,
    "2019": OLD,
    "2020": OLD,
    "2021": OLD,
    "2023": NEW,
    "2024": {**NEW, 4: "cavity"},
}
KINDS: Mapping[str, Mapping[str, Mapping[int, str]]] = {  # of tumours since 2023 -> year -> values
    "gli": {year: PARTS[year] for year in ("2023", "2024")},
    "ssa": {"2023": NEW, "2024": NEW},  # gliomas of adults in Africa
    "met": {"2023": NEW, "2024": NEW},
    "men": {"2023": NEW},
    "ped": {  # children's; in 2023 all that does not enhance is one
        "2023": {1: "non-enhancing", 2: "oedema", 3: "enhancing"},
        "2024": {1: "enhancing", 2: "non-enhancing", 3: "cyst", 4: "oedema"},
    },
}
CONTRASTS = {  # as files are called until 2021 and since 2023 -> as studies call them
    "t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair",
    "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair",
}  # fmt: skip
FILE = re.compile(rf"(.+)[_-]({'|'.join(CONTRASTS)}|seg)\.nii(?:\.gz)?", re.IGNORECASE)
NAMES = {  # year -> a case's name, and what of it is the patient
    "2018": re.compile(r"(brats18_.+?)(?:_\d+)?", re.IGNORECASE),
    "2019": re.compile(r"(brats19_.+?)(?:_\d+)?", re.IGNORECASE),
    "2020": re.compile(r"(brats20_.+)", re.IGNORECASE),
    "2021": re.compile(r"(brats2021_.+)", re.IGNORECASE),
}
KIND = re.compile(r"(brats-([a-z]+(?:-rt)?)-\d+)(?:-\d+)?", re.IGNORECASE)  # since 2023; the last is the examination
RELEASE = re.compile(r"brats[-_ ]?(?:[a-z]+[-_ ]?)?(2023|2024)", re.IGNORECASE)
UNTOLD = "brats"


@dataclass(frozen=True, slots=True)
class _Name:
    """What the name of a case says.

    Attributes:
        parts: year that it may be of -> what values mean; empty where nobody here knows, None if it is no name of the
            challenge's.
    """

    patient: str = field(repr=False)
    parts: Mapping[str, Mapping[int, str]] | None


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
        ManifestInvalid: LABEL_VALUES, folders that are named as another year's, or as of a kind that is not known.
        ImageUnreadable: PATH_ESCAPE, for a link out of the folder.
    """
    root = where.folder.resolve()
    folders: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for path in files_below(root, Counter()):
        if what := _content(path):
            folders[path.parent].setdefault(what, path)
    names = {folder: _named(folder.name) for folder in folders}
    strange = sum(name.parts == {} for name in names.values())
    if strange:
        raise ManifestInvalid(
            f"{where.folder}: {strange} of {len(folders)} case folders are named as of a kind of BraTS whose label "
            f"values are not known here; known are {', '.join(KINDS)}. Take them out, or list them in a manifest.csv "
            f"with masks in the study's own values.",
            code="LABEL_VALUES",
        )
    others = sum(name.parts is not None and year not in name.parts for name in names.values())
    if others:
        raise ManifestInvalid(
            f"{where.folder}: {others} of {len(folders)} case folders are named as those of another year than {year}, "
            f"whose labels mean other things. Choose that year's layout, or give each year a folder of its own.",
            code="LABEL_VALUES",
        )
    listed: dict[str, Case] = {}
    findings: list[Finding] = []
    for number, folder in enumerate(sorted(folders), start=1):
        held, name = folders[folder], names[folder]
        key = case_key(salt, name.patient, folder.name)
        missing = sorted({*CONTRASTS.values()} - held.keys())
        if folder.name in listed:
            findings.append(finding("DUPLICATE", f"case folder {number} by name is there twice", case=key))
        elif missing:
            what = f"case folder {number} by name lacks {', '.join(missing)}, and was left out"
            findings.append(finding("FILE_MISSING", what, case=key))
        else:
            channels = tuple(Channel(contrast, (held[contrast],)) for contrast in ("t1", "t1ce", "t2", "flair"))
            mask = Mask(held["seg"], dict((name.parts or PARTS)[year])) if "seg" in held else None
            listed[folder.name] = Case(key, name.patient, channels, mask, split_of(name.patient, salt))
    return Listing(f"BraTS {year}, {len(listed)} cases", (*listed.values(),), tuple(findings))


@lru_cache(maxsize=1)  # every year's layout asks it of one folder
def _years(seen: Peek) -> frozenset[str]:
    """The years that the names in a folder tell; UNTOLD among them where cases tell none."""
    told: set[str] = set()
    for name in seen.files:
        if not name.lower().endswith((".nii", ".nii.gz")) or not _content(path := PurePath(name)):
            continue
        years = tuple(_named(path.parent.name).parts or ())
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


def _named(case: str) -> _Name:
    for year, pattern in NAMES.items():
        if parts := pattern.fullmatch(case):
            return _Name(parts[1].upper(), {year: PARTS[year]})
    if parts := KIND.fullmatch(case):
        return _Name(parts[1].upper(), KINDS.get(parts[2].lower(), {}))
    return _Name(case.upper(), None)
