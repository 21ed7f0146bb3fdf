"""Medical Segmentation Decathlon: `imagesTr`, `labelsTr`, `imagesTs`, dataset.json; several channels in 4-D files."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from fedclient.data.cases import Listing
from fedclient.data.findings import Finding, finding
from fedclient.data.layouts.dataset_json import NAME, Entry, channels_of, keys_of, labels_of, listed, read_json
from fedclient.data.layouts.peek import Peek
from fedclient.data.where import Where
from shared_models.errors import ManifestInvalid


def found(seen: Peek) -> bool:
    keys = keys_of(seen)
    return "modality" in keys and "training" in keys


def cases(where: Where, salt: str) -> Listing:
    """A case for each entry of `training`, and of `test`, whose cases have no labels as the challenge publishes them.

    Raises:
        ManifestInvalid: dataset.json does not describe a data set, or has one case for training and for test.
    """
    root = where.folder.resolve()
    facts = read_json(root, NAME)
    entries, junk = _entries(facts)
    made, findings = listed(root, entries, channels_of(facts, "modality"), labels_of(facts), salt)
    if junk:
        what = f"{junk} entries beginning with `._`, which are no images but leavings of macOS"
        findings.append(finding("SERIES_LEFT_OUT", what))
    findings += _counted(facts, len(entries))
    trained = sum(entry.part is None for entry in entries)
    return Listing(f"Medical Segmentation Decathlon, {trained} training cases", made, tuple(findings))


def _entries(facts: Mapping[str, Any]) -> tuple[list[Entry], int]:
    entries: list[Entry] = []
    junk = 0
    for part in ("training", "test"):
        told = facts.get(part) or []
        for number, entry in enumerate(told if isinstance(told, list) else [None], start=1):
            image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
            if not isinstance(image, str) or not isinstance(label, str | None):
                raise ManifestInvalid(f"{NAME}: entry {number} of `{part}` names no files. Mend it.")
            name = PurePosixPath(image).name
            if name.startswith("._"):
                junk += 1
                continue
            place = f"entry {number} of `{part}`"
            entries.append(Entry(place, name.split(".nii")[0], (image,), label, None if part == "training" else "test"))
    return entries, junk


def _counted(facts: Mapping[str, Any], entries: int) -> list[Finding]:
    stated = [facts.get(key) for key in ("numTraining", "numTest")]
    whole = sum(n for n in stated if isinstance(n, int))
    if entries >= whole:
        return []
    return [finding("FILE_MISSING", f"{NAME} speaks of {whole} cases and lists {entries}", severity="warn")]
