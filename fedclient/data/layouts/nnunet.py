"""nnU-Net's raw data, version 2: a file for each channel (`_0000`, `_0001`, ...), labels by name, dataset.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclient.data.cases import Listing, Split
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.dataset_json import NAME, Entry, channels_of, keys_of, labels_of, listed, read_json
from fedclient.data.layouts.peek import Peek
from fedclient.data.where import Where, inside
from shared_models.errors import ManifestInvalid

SPLITS = "splits_final.json"


def found(seen: Peek) -> bool:
    keys = keys_of(seen)
    return "channel_names" in keys and "labels" in keys


def cases(where: Where, salt: str) -> Listing:
    """A case for each image of `imagesTr` and `imagesTs`; the latter are for test, where `labelsTs` has their labels.

    Training and validation are those of the first fold of splits_final.json, if that lies there.

    Raises:
        ManifestInvalid: dataset.json does not describe a data set (regions that overlap are refused), a fold that
            trains on what it validates with, or a case both for training and for test.
    """
    root = where.folder.resolve()
    facts = read_json(root, NAME)
    channels = channels_of(facts, "channel_names")
    ending = facts.get("file_ending")
    if not isinstance(ending, str) or not re.fullmatch(r"\.[A-Za-z0-9.]{1,12}", ending):
        raise ManifestInvalid(f'{NAME}: `file_ending` must be one like ".nii.gz". Mend it.')
    training = _described(facts["dataset"]) if "dataset" in facts else _found(root, "Tr", channels, ending, None)
    entries, findings = _folded(root, training)
    tests = _found(root, "Ts", channels, ending, "test")
    made, wrong = listed(root, [*entries, *tests], channels, labels_of(facts), salt)
    stated = facts.get("numTraining")
    if isinstance(stated, int) and len(training) < stated:
        what = f"{NAME} speaks of {stated} training cases, {len(training)} are there"
        findings.append(finding("FILE_MISSING", what, severity="warn"))
    return Listing(f"nnU-Net raw data, {len(training)} training cases", made, (*findings, *wrong))


def _found(root: Path, part: str, channels: Sequence[str], ending: str, use: Split | None) -> list[Entry]:
    """The cases of `imagesTr` or `imagesTs`, by the files that are there; each should have one for each channel."""
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(ending)}")
    images = [parts[1] for name in _names(root, f"images{part}") if (parts := pattern.fullmatch(name))]
    labelled = {name.removesuffix(ending) for name in _names(root, f"labels{part}") if name.endswith(ending)}
    entries: list[Entry] = []
    for number, name in enumerate(sorted(set(images)), start=1):
        files = tuple(f"images{part}/{name}_{n:04d}{ending}" for n in range(len(channels)))
        label = f"labels{part}/{name}{ending}" if name in labelled else None
        entries.append(Entry(f"case {number} of images{part} by name", name, files, label, use))
    return entries


def _names(root: Path, folder: str) -> list[str]:
    try:
        held = inside(root, folder)
    except ManifestInvalid as e:
        if e.code == "FILE_MISSING":
            return []
        raise ManifestInvalid(f"{folder} {e}", e.code) from None
    return sorted(path.name for path in held.iterdir() if not path.name.startswith("."))


def _described(told: object) -> list[Entry]:
    """The cases of the `dataset` of dataset.json: `{"name": {"images": [...], "label": "..."}}`."""
    entries: list[Entry] = []
    for number, (name, entry) in enumerate(told.items() if isinstance(told, dict) else [("", None)], start=1):
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if not isinstance(images, list) or not isinstance(label, str | None) or not images:
            raise ManifestInvalid(f"{NAME}: entry {number} of `dataset` names no images. Mend it.")
        files = tuple(str(image) for image in images)
        entries.append(Entry(f"entry {number} of `dataset`", str(name), files, label, None))
    return entries


def _folded(root: Path, entries: Sequence[Entry]) -> tuple[list[Entry], list[Finding]]:
    """The entries with the use that the first fold of splits_final.json has for them; all as they are without it."""
    if not (root / SPLITS).exists():
        return list(entries), []
    fold = _fold(read_json(root, SPLITS))
    both = len(fold["train"] & fold["val"])
    if both:
        raise ManifestInvalid(f"{SPLITS}: {both} cases of its first fold are in `train` and `val`.", "LEAKAGE_PATIENT")
    folded: list[Entry] = []
    for entry in entries:
        use: Split | None = next((part for part in ("train", "val") if entry.name in fold[part]), None)
        if use is not None:
            folded.append(Entry(entry.place, entry.name, entry.files, entry.label, use))
    findings = []
    if len(folded) < len(entries):
        what = f"{len(entries) - len(folded)} cases are not in the first fold of {SPLITS}, and take no part"
        findings.append(finding("SERIES_LEFT_OUT", what, severity="warn"))
    if away := len((fold["train"] | fold["val"]) - {entry.name for entry in entries}):
        findings.append(finding("FILE_MISSING", f"{SPLITS} names {away} cases that are not there"))
    return folded, findings


def _fold(told: object) -> Mapping[Split, frozenset[str]]:
    first: Any = told[0] if isinstance(told, list) and told else None
    lists = [first.get(part) for part in ("train", "val")] if isinstance(first, dict) else [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ManifestInvalid(f"{SPLITS}: its first fold has no lists `train` and `val`. Copy it again.")
    return {"train": frozenset(first["train"]), "val": frozenset(first["val"])}
