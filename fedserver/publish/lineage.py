"""Who was counted in a run, and which runs it goes on from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedserver.checkpoint import RunFolder
from shared_models.files import read_json

RETRAINED = "retrained.json"  # in the run's folder: which run it goes on from, and without whom


def counted_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Site -> how many of its updates were counted."""
    counted: Counter[str] = Counter()
    for line in rounds:
        counted.update({site: len(part["updates"]) for site, part in line["sites"].items() if part["updates"]})
    return dict(sorted(counted.items()))


def first_counted(rounds: Sequence[Mapping[str, Any]], site: str) -> int | None:
    """The first round in which anything of `site` was counted, late work too; `rounds` are those of report.json."""
    return next((line["round"] for line in rounds if line["sites"].get(site, {}).get("updates")), None)


def ancestors(run: RunFolder) -> dict[str, int | None]:
    """The run and those that it goes on from: run -> the last round that was taken of it, None for all."""
    found: dict[str, int | None] = {run.id: None}
    folder = run.path
    while (folder / RETRAINED).exists():
        facts_of = read_json(folder / RETRAINED)
        if facts_of["run"] in found or facts_of["round"] == 0:
            break
        found[facts_of["run"]] = int(facts_of["round"])
        folder = Path(folder).parent / str(facts_of["run"])
    return found
