"""What the command line asks of a comparison, put together: studies, their sites, settings, and what is printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from fedclient.data.manifest import Progress
from shared_models.errors import StudyInvalid
from shared_models.study import load_study
from simulations.compare import Asked, compare
from simulations.compare_page import write_all
from simulations.compare_tables import markdown
from simulations.folds import at_several, folded
from simulations.run import Machine, Say, machine
from simulations.settings import changed, settings_named
from simulations.site_options import SiteOptions, sites_of

RUNS_PER_GPU = 2


@dataclass(frozen=True, slots=True)
class Request:
    """The options of `fedsim compare`, as they were typed."""

    studies: Sequence[str]
    strategies: Sequence[str]
    out: Path
    sets: Sequence[str] = ()
    files: Sequence[Path] = ()
    data: Sequence[str] = ()
    options: SiteOptions = field(default_factory=SiteOptions)
    seeds: int = 1
    leave_one_out: bool = False
    folds: int = 1


def machine_of(workers: int | None, threads: int | None, device: str) -> Machine:
    """Runs at once: as many as cores, or two for each GPU where there are some, unless told otherwise."""
    how = machine("local", workers, threads, device)
    if workers is None and device != "cpu":
        from fedclient.training.device import gpus  # torch: seconds

        there = gpus() if device == "auto" else 1
        return replace(how, workers=there * RUNS_PER_GPU) if there else how
    return how


def carry_out_request(asked: Request, how: Machine, cache: Path, say: Say, rounds: Progress) -> dict[str, Any]:
    """Carries out a comparison and writes its files; returns all figures, and `files`: what each holds -> its path.

    Raises:
        StudyInvalid: settings, options, or too few patients.
    """
    settings, for_all = settings_named(asked.strategies, asked.files, asked.sets)
    if not settings:
        raise StudyInvalid("--strategies: names no setting. Name one or more, for example fedavg,fedprox.")
    if asked.folds > 1 and asked.seeds % asked.folds:
        raise StudyInvalid(
            f"--folds {asked.folds}: each seed tests in another fold, so that --seeds must be a multiple of the folds; "
            f"it is {asked.seeds}. Say --seeds {ceil(asked.seeds / asked.folds) * asked.folds}."
        )
    if asked.folds > 1 and (asked.options.labelled < 1 or asked.options.test_labels == "truth"):
        raise StudyInvalid(
            "--folds deals all patients out anew, and --labelled and --test-labels truth choose some of one split. "
            "Leave one out."
        )
    studies = [changed(load_study(name), "--set", for_all) for name in asked.studies]
    whose = data_of(asked.data, [study.name for study in studies])
    todo = []
    for study in studies:
        options = replace(asked.options, data=whose[study.name])
        nodes = sites_of(study, asked.out / study.name, options, how, cache, say)
        if len(nodes) < 2:
            raise StudyInvalid(
                f"study {study.name!r}: its data are one site, and nothing can be compared. Give more --data, or make "
                f"up sites with --partition iid --sites 3."
            )
        folder = (asked.out / study.name).resolve()
        folds = folded(study, nodes, asked.folds, folder) if asked.folds > 1 else ()
        known = at_several(nodes) if asked.leave_one_out else frozenset[str]()
        truth = asked.options.test_labels == "truth"  # which test patients alone have
        todo.append(Asked(study, nodes, folds, None if truth else known))
    results = compare(todo, settings, asked.seeds, asked.out, how, say, rounds, asked.leave_one_out)
    results["folds"] = asked.folds
    results |= {key: getattr(asked.options, key) for key in ("partition", "shift", "test_labels", "labelled")}
    results["files"] = write_all(results, asked.out)
    return results


def data_of(texts: Sequence[str], names: Sequence[str]) -> dict[str, list[Path]]:
    """Study -> its folders: DIR is for all of them, STUDY=DIR for one."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    for text in texts:
        name, equals, folder = text.partition("=")
        for each in [name] if equals and name in found else names:
            found[each].append(Path(folder if equals and name in found else text))
    return found


def told(results: Mapping[str, Any]) -> str:
    """For the terminal: the tables, and where everything lies."""
    files = "\n".join(f"{kind:8} {path}" for kind, path in results["files"].items())
    return f"{markdown(results)}\n{files}"
