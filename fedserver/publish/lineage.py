"""What a run holds of whom: counted in it, in its plan, in the runs it goes on from and the weights it began with."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedserver.checkpoint import RunFolder, read_study
from shared_models.audit_files import every_event
from shared_models.errors import FederationError, StateInvalid
from shared_models.files import read_json, read_lines

RETRAINED = "retrained.json"  # in the run's folder: which run it goes on from, and without whom
BEGAN = "began.json"  # likewise: of which run, and which round of it, the weights file is that the study begins with
UNREADABLE = (FederationError, OSError, ValueError, KeyError, TypeError, AttributeError)  # of a folder damaged or gone


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
    """What a run's weights go back to: `round` rounds of another run, or a file that nobody knows here (None).

    Attributes:
        lost: name of the run that it is of, where that cannot be read any more.
    """

    run: RunFolder | None
    round: int = 0
    lost: str = ""


def run_with(runs: Path, weights_sha256: str) -> tuple[str, int] | None:
    """The run, and its round, that ended with weights of this digest."""
    for metrics in sorted(runs.glob("*/metrics.jsonl")):
        with suppress(ValueError, KeyError, TypeError):  # damaged: another run's matter
            if (number := round_with(RunFolder(metrics.parent), weights_sha256)) is not None:
                return metrics.parent.name, number
    return None


def round_with(run: RunFolder, weights_sha256: str) -> int | None:
    """The round of the run that ended with weights of this digest."""
    lines = (line for line in read_lines(run.metrics) if not line.get("final"))
    return next((int(line["round"]) for line in lines if line["weights_sha256"] == weights_sha256), None)


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
            return [*found, Earlier(None, lost=before.id)]
        if before.id in seen:
            return [*found, Earlier(None)]
        found.append(Earlier(before, int(began["round"])))
        seen.add(before.id)
        folder = before
    return found


@dataclass(frozen=True, slots=True)
class Held:
    """Whose updates and counts the weights of a run hold.

    Attributes:
        counted: site -> the first round of the run in which it was counted, late work and secure sums too.
        planned: whose counts made the plan of the run; None where it has one, and nobody wrote down whose.
        before: site -> the run, the earliest, that brought it into the weights that this one began with.
        unread: runs that these weights go back to and that cannot be read, or whose plan is of nobody knows whom.
    """

    counted: Mapping[str, int]
    planned: frozenset[str] | None
    before: Mapping[str, str]
    unread: tuple[str, ...] = ()

    @property
    def sites(self) -> set[str]:
        return {*self.counted, *(self.planned or ()), *self.before}

    def first(self, site: str) -> int:
        """The first round that has anything of a site in it; 0 where the plan or the first weights have."""
        return 0 if site in self.before or site in (self.planned or ()) else self.counted[site]


def planners(folder: Path) -> dict[str, tuple[str, ...]]:
    """Run -> the sites whose counts made its plan, as the log in the folder of a federation has it."""
    return {line["facts"]["run"]: tuple(line["facts"]["sites"]) for line in every_event(folder, ("plan-made",))}


def held(run: RunFolder, planned_by: Mapping[str, Sequence[str]], most: int | None = None) -> Held:
    """What the weights of a run hold after its round `most`, None for the last.

    Args:
        planned_by: see `planners`.

    Raises:
        one of UNREADABLE: the run itself is gone or damaged; of those that it goes back to, the name is told.
    """
    before, unread = dict[str, str](), list[str]()
    counted, planned = _own(run, planned_by, most)
    for each in earlier(run):  # the latest first: who stands in several is named with the earliest
        name = each.lost if each.run is None else each.run.id
        try:
            theirs, plan = ({}, frozenset[str]()) if each.run is None else _own(each.run, planned_by, each.round)
        except UNREADABLE:
            unread.append(name)
            continue
        before |= dict.fromkeys({*theirs, *(plan or ())}, name)
        unread += [name] if plan is None or each.lost else []
    return Held(counted, planned, before, tuple(unread))


def _own(
    run: RunFolder, planned_by: Mapping[str, Sequence[str]], most: int | None
) -> tuple[dict[str, int], frozenset[str] | None]:
    state = read_json(run.path / "state.json")
    lines = [line for line in read_lines(run.metrics) if not line.get("final")]
    if state["round"] and not lines:
        raise StateInvalid(f"{run.metrics}: is missing. Restore the folder from its backup.")
    counted = dict[str, int]()
    for line in lines:
        if most is None or line["round"] <= most:
            counted |= dict.fromkeys(sites_counted([line], line["round"]) - counted.keys(), int(line["round"]))
    return counted, frozenset() if state.get("plan_sha256") is None else _planned(run, planned_by)


def _planned(run: RunFolder, planned_by: Mapping[str, Sequence[str]]) -> frozenset[str] | None:
    """Whose counts made the plan of a run, which may be that of the run it goes on from."""
    seen = set[str]()
    while run.id not in planned_by:
        if run.id in seen or not (run.path / RETRAINED).exists():
            return None
        seen.add(run.id)
        run = RunFolder(run.path.parent / str(read_json(run.path / RETRAINED)["run"]))
    return frozenset(planned_by[run.id])
