"""Who was counted in a run, which runs it goes on from, and whose weights it began with."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.checkpoint import RunFolder, read_study
from shared_models.errors import FederationError
from shared_models.files import read_json, read_lines

RETRAINED = "retrained.json"  # in the run's folder: which run it goes on from, and without whom
BEGAN = "began.json"  # likewise: of which run, and which round of it, the weights file is that the study begins with


def counted_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Site -> how many of its updates were counted."""
    counted: Counter[str] = Counter()
    for line in rounds:
        counted.update({site: len(part["updates"]) for site, part in line["sites"].items() if part["updates"]})
    return dict(sorted(counted.items()))


def sites_counted(lines: Sequence[Mapping[str, Any]], most: int) -> set[str]:
    """Whose updates were counted up to the round `most`, late ones and those of secure sums too; lines of metrics."""
    found = set[str]()
    for line in lines:
        if line["round"] <= most:
            found |= {key.partition(" (round ")[0] for key in line["sites"]} | set(
                (line.get("together") or {}).get("sites", ())
            )
    return found


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


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a run's weights go back to: `round` rounds of another run, or a file that nobody knows here (None)."""

    run: RunFolder | None
    round: int = 0


def run_with(runs: Path, weights_sha256: str) -> tuple[str, int] | None:
    """The run, and its round, that ended with weights of this digest."""
    for metrics in sorted(runs.glob("*/metrics.jsonl")):
        with suppress(ValueError, KeyError, TypeError):  # damaged: another run's matter
            for line in read_lines(metrics):
                if not line.get("final") and line["weights_sha256"] == weights_sha256:
                    return metrics.parent.name, int(line["round"])
    return None


def earlier(run: RunFolder) -> list[Earlier]:
    """What the weights that a run began with go back to, the latest first; empty for one that began from its seed.

    What is not written down, or cannot be read any more, is a file that nobody knows.
    """
    found, seen, folder = list[Earlier](), {run.id}, run
    while read_study(folder).transfer.sha256:
        if not (folder.path / BEGAN).exists():
            return [*found, Earlier(None)]
        began = read_json(folder.path / BEGAN)
        before = RunFolder(folder.path.parent / str(began["run"]))
        try:
            read_study(before)
        except (FederationError, OSError):
            return [*found, Earlier(None)]
        if before.id in seen:
            return [*found, Earlier(None)]
        found.append(Earlier(before, int(began["round"])))
        seen.add(before.id)
        folder = before
    return found
