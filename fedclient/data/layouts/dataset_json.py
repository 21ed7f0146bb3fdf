"""dataset.json: what the Decathlon and nnU-Net share in telling which files, channels and labels there are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedclient.data.cases import Case, Channel, Mask, Split
from fedclient.data.findings import Finding, finding, patients_untold
from fedclient.data.images import IGNORE
from fedclient.data.layouts.peek import Peek
from fedclient.data.manifest import case_key, check_splits, split_of, train_or_val
from fedclient.data.where import inside
from shared_models.errors import ManifestInvalid

NAME = "dataset.json"
MAX_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Entry:
    """One case as a data set names it.

    Attributes:
        place: for messages: which list, and which of it.
        name: of the case; it stands for the patient, of whom these data sets say nothing.
        files: of the channels, or one file that holds them all.
        part: what the data set uses it for; None of the training part leaves validation and test to us.
    """

    place: str
    name: str = field(repr=False)
    files: tuple[str, ...] = field(repr=False)
    label: str | None = field(repr=False)
    part: Split | None


def keys_of(seen: Peek) -> frozenset[str]:
    """The keys of a folder's dataset.json; none if it has none that can be read."""
    if not seen.has(NAME):
        return frozenset()
    try:
        return frozenset(read_json(seen.folder.resolve(), NAME))
    except ManifestInvalid:
        return frozenset()


def read_json(root: Path, name: str) -> Any:
    """The facts in a JSON file of the data set; an object, if it is dataset.json.

    Raises:
        ManifestInvalid: there is none, or it is broken.
    """
    try:
        path = inside(root, name)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        facts = json.loads(content) if len(content) <= MAX_BYTES else None
    except ManifestInvalid as e:
        raise ManifestInvalid(f"{name} {e}", e.code) from None
    except (OSError, ValueError, RecursionError) as e:
        raise ManifestInvalid(f"{name}: it cannot be read as JSON ({type(e).__name__}). Copy it again.") from None
    if not isinstance(facts, dict if name == NAME else (dict, list)):
        raise ManifestInvalid(f"{name}: it holds no object, or is too large. Copy it again.")
    return facts


def channels_of(facts: Mapping[str, Any], key: Literal["modality", "channel_names"]) -> tuple[str, ...]:
    """`{"0": "FLAIR", "1": "T1w"}` as `("flair", "t1w")`: names as studies may ask for them.

    Raises:
        ManifestInvalid: numbers that do not run from 0, or names that are one.
    """
    stated = facts.get(key)
    numbered = {str(n): name for n, name in stated.items()} if isinstance(stated, dict) else {}
    names = [numbered.get(str(n)) for n in range(len(numbered))]
    words = tuple(re.sub(r"[^a-z0-9]+", "-", str(name).casefold()).strip("-") for name in names)
    if not words or None in names or len(set(words)) < len(words):
        raise ManifestInvalid(f'{NAME}: `{key}` must name the channels "0", "1", ... Mend it.')
    return words


def labels_of(facts: Mapping[str, Any]) -> dict[int, str]:
    """Value -> name, without the background, whichever way round the file has them.

    A list of values is a region; regions that share a value cannot be told apart voxel by voxel, and are refused.

    Raises:
        ManifestInvalid: LABEL_VALUES.
    """
    stated = facts.get("labels")
    pairs: list[tuple[object, object]] = []
    for key, value in stated.items() if isinstance(stated, dict) else ():
        turned = str(key).isdecimal() and isinstance(value, str) and not value.isdecimal()
        name, numbers = (value, key) if turned else (key, value)
        pairs += [(number, name) for number in (numbers if isinstance(numbers, list) else [numbers])]
    names: dict[int, str] = {}
    for number, name in pairs:
        if not str(number).isdecimal() or not 0 <= int(str(number)) <= 255:
            raise ManifestInvalid(
                f"{NAME}: `labels` holds a value that is none from 0 to 255. Mend it.", "LABEL_VALUES"
            )
        value = int(str(number))
        if value in names and value:
            raise ManifestInvalid(
                f"{NAME}: `labels` gives the value {value} to two names ({names[value]}, {name}). Overlapping regions "
                f"are not learnt here: name the parts instead, one value each.",
                code="LABEL_VALUES",
            )
        names[value] = str(name)
    names.pop(0, None)
    if not {value for value, name in names.items() if name.casefold() != "ignore" and value != IGNORE}:
        raise ManifestInvalid(f"{NAME}: `labels` names nothing but the background. Mend it.", "LABEL_VALUES")
    return names


def listed(
    root: Path, entries: Sequence[Entry], channels: Sequence[str], names: Mapping[int, str], salt: str
) -> tuple[tuple[Case, ...], list[Finding]]:
    """The cases of the entries that can be used, and what is wrong with the others.

    Where the data set brings labelled test cases, those of its training part are for training and validation only.

    Raises:
        ManifestInvalid: LEAKAGE_PATIENT, a case that is both for training and for test.
    """
    tested = any(entry.part == "test" and entry.label is not None for entry in entries)
    draw = train_or_val if tested else split_of
    cases: dict[tuple[str, str], Case] = {}
    findings: list[Finding] = []
    for entry in entries:
        key = case_key(salt, entry.name, entry.name)
        try:
            case = Case(
                key=key,
                patient=entry.name,
                channels=_channels(root, entry, channels),
                label=None if entry.label is None else Mask(_file(root, entry, entry.label, "label"), dict(names)),
                split=entry.part or draw(entry.name, salt),
            )
        except ManifestInvalid as e:
            findings.append(finding(e.code, str(e), case=key))
            continue
        if (entry.name, case.split) in cases:
            findings.append(finding("DUPLICATE", f"{entry.place} is there twice; the first is taken", case=key))
        else:
            cases[entry.name, case.split] = case
    check_splits([*cases.values()], root / NAME)
    if cases:
        findings.append(patients_untold(NAME))
    return tuple(cases.values()), findings


def _channels(root: Path, entry: Entry, channels: Sequence[str]) -> tuple[Channel, ...]:
    files = [_file(root, entry, named, "image") for named in entry.files]
    if len(files) == len(channels):
        return tuple(Channel(name, (file,)) for name, file in zip(channels, files, strict=True))
    if len(files) == 1:
        return tuple(Channel(name, (files[0],), part=n) for n, name in enumerate(channels))
    raise ManifestInvalid(f"{entry.place} has {len(files)} images for {len(channels)} channels", "FILE_MISSING")


def _file(root: Path, entry: Entry, named: str, what: str) -> Path:
    try:
        return inside(root, named)
    except ManifestInvalid as e:
        raise ManifestInvalid(f"{entry.place}: its {what} {e}", e.code) from None
