"""Studies x settings x seeds in one command: what is done is not done again, what was interrupted goes on.

    OUT/STUDY/seed-0/SETTING/                  the federation of a setting, a run folder with its report
    OUT/STUDY/seed-0/SETTING-without-01/       the same without a site, with --leave-one-out
    OUT/STUDY/seed-0/pooled/, local-SITE/      baselines, shared by all settings
    OUT/results.csv, results.json, report.html, table.md, table.tex, *.png, sites/STUDY/SITE.html

Settings are chosen by their scores on validation patients; test patients are looked at once, at the end.
"""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any

from fedclient.data.manifest import Progress
from fedserver.checkpoint import RunFolder, read_progress
from fedserver.report import curves, facts, updates_told, write_report
from shared_models.dates import span_text
from shared_models.errors import StateInvalid
from shared_models.scores import measure_of, value_in
from shared_models.study import Study
from simulations.at_once import at_once
from simulations.engine import NodeConfig, kept_workers
from simulations.run import Job, Machine, Say, carry_out, check_cases, federation, jobs, left_out_jobs
from simulations.scoring import Model, Told, score_site
from simulations.settings import Changes, changed


@dataclass(frozen=True, slots=True)
class Asked:
    """A study to compare settings on; `study` has the changes that are for all, `nodes` are its sites.

    Attributes:
        folds: what the nodes are told in each fold of their patients; seed after seed takes the next. None without.
        known: see `score_site`.
    """

    study: Study
    nodes: Mapping[str, NodeConfig]
    folds: Sequence[Mapping[str, NodeConfig]] = ()
    known: frozenset[str] | None = frozenset()

    def fold(self, seed: int) -> int:
        return (seed - self.study.seed) % max(1, len(self.folds))

    def at(self, seed: int) -> Mapping[str, NodeConfig]:
        """What the nodes are told in a run of this seed."""
        return self.folds[self.fold(seed)] if self.folds else self.nodes

    def configs(self, site: str) -> list[NodeConfig]:
        """What one site's node is told, fold by fold."""
        return [each[site] for each in self.folds or (self.nodes,)]


@dataclass(frozen=True, slots=True)
class Trained:
    """A run to carry out, where, and what becomes of it: a model, and where a setting gives one each site's own."""

    job: Job
    folder: Path
    model: Model


def planned_runs(
    asked: Asked, settings: Mapping[str, Changes], seeds: int, out: Path, leave_one_out: bool
) -> list[Trained]:
    """Every run, seed by seed, the baselines first.

    Raises:
        StudyInvalid: a setting that the study cannot have, or too few sites for it.
    """
    found: list[Trained] = []
    for seed in range(asked.study.seed, asked.study.seed + seeds):
        study, folder = replace(asked.study, seed=seed), out / asked.study.name / f"seed-{seed}"
        nodes, fold = asked.at(seed), asked.fold(seed)

        def add(
            job: Job,
            *model: Any,
            folder: Path = folder,
            seed: int = seed,
            config: NodeConfig | None = None,
            fold: int = fold,
        ) -> None:
            kind, setting, trained = model
            found.append(Trained(job, folder, Model(kind, setting, seed, trained, folder / job.name, config, fold)))

        for job in jobs(study, nodes, compare=True)[1:]:
            (site, config), *_ = job.nodes.items()
            if job.name == "pooled":
                add(job, "pooled", "", "", config=config)
            else:
                add(job, "local", "", site, config=config)
        for name, changes in settings.items():
            mine = changed(study, name, changes)
            add(federation(_run_name(name), mine, nodes), "federated", name, "")
            if leave_one_out:
                without = zip(nodes, left_out_jobs(mine, nodes), strict=True)
                for number, (site, job) in enumerate(without, start=1):
                    add(replace(job, name=f"{_run_name(name)}-without-{number:02d}"), "left out", name, site)
    return found


def _run_name(setting: str) -> str:
    """A run's id has no plus sign, a setting's name no underscore."""
    return setting.replace("+", "_")


def compare(
    asked: Sequence[Asked],
    settings: Mapping[str, Changes],
    seeds: int,
    out: Path,
    how: Machine,
    say: Say,
    rounds: Progress,
    leave_one_out: bool = False,
) -> dict[str, Any]:
    """Carries out what is not done yet, scores every model at every site, and returns all figures.

    Args:
        rounds: hears (rounds done, rounds in all) every half second while runs go on.

    Raises:
        StudyInvalid: see `planned_runs`; checked for all studies before anything is trained.
        StateInvalid: OUT holds runs of another study, setting or data.
    """
    runs = {each.study.name: planned_runs(each, settings, seeds, out, leave_one_out) for each in asked}
    if len(runs) < len(asked):
        raise StateInvalid("fedsim compare: two of the studies have one name. Rename one.")
    for each in asked:
        for site in each.nodes:
            for config in each.configs(site):
                check_cases(each.study, site, config)
    todo = [run for of in runs.values() for run in of]
    devices = devices_of(how)

    def train(place: int, stop: threading.Event) -> None:
        run = todo[place]
        nodes = {s: {**c, "device": devices[place % len(devices)]} for s, c in run.job.nodes.items()}
        one = replace(how, workers=min(1, how.workers))
        carry_out(replace(run.job, nodes=nodes), run.folder, one, stop)

    began, before = time.monotonic(), sum(map(_rounds_done, todo))

    def done(place: int, of: int) -> None:
        run = todo[place]
        left = time_left(before, sum(map(_rounds_done, todo)), _rounds(todo), time.monotonic() - began)
        say(f"{of} of {len(todo)}: {run.job.study.name} seed {run.model.seed} {run.job.name}{left}")

    with watched(todo, rounds), kept_workers():
        at_once(range(len(todo)), train, how.workers, done)
    say("scoring every model at every site")
    told = scored(asked, runs, how, devices)
    return {
        "settings": {name: changes for name, changes in settings.items()},
        "seeds": seeds,
        "studies": {
            each.study.name: _of_study(each, runs[each.study.name], told[each.study.name]) for each in asked
        },
    }  # fmt: skip


def time_left(before: int, now: int, of: int, seconds: float) -> str:
    """`, about 12 minutes left`: rounds of all runs that are done now and were before, and of all; empty at the end."""
    if now <= before or now >= of:
        return ""
    return f", about {span_text(seconds * (of - now) / (now - before))} left"


def devices_of(how: Machine) -> list[str]:
    """What runs are dealt out to: each GPU in turn where nobody chose one."""
    if how.device != "auto":
        return [how.device]
    from fedclient.training.device import gpus  # torch: seconds, and only here needed before there are workers

    return [f"cuda:{n}" for n in range(gpus())] or ["auto"]


def scored(
    asked: Sequence[Asked], runs: Mapping[str, Sequence[Trained]], how: Machine, devices: Sequence[str]
) -> dict[str, dict[str, Told]]:
    """Study -> site -> what its process tells of all models there."""
    work: list[tuple[Asked, str, list[NodeConfig], list[Model]]] = []
    for each in asked:
        models = [run.model for run in runs[each.study.name]]
        own = [
            replace(run.model, kind="personalised")
            for run in runs[each.study.name]
            if run.model.kind == "federated" and run.job.study.personal.any
        ]
        for number, site in enumerate(each.nodes):
            at: list[NodeConfig] = [
                {**config, "device": devices[number % len(devices)]} for config in each.configs(site)
            ]
            work.append((each, site, at, models + own))
    found: dict[str, dict[str, Told]] = {each.study.name: {} for each in asked}
    if how.workers == 0:
        for of, site, configs, models in work:
            found[of.study.name][site] = score_site(site, configs, models, of.known)
        return found
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(how.workers, len(work)), spawn, initializer=_leave_ctrl_c_to_the_caller) as pool:
        futures = [
            (of, site, pool.submit(score_site, site, configs, models, of.known)) for of, site, configs, models in work
        ]
        for of, site, future in futures:
            found[of.study.name][site] = future.result()
    return found


def _leave_ctrl_c_to_the_caller() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _of_study(asked: Asked, runs: Sequence[Trained], told: Mapping[str, Told]) -> dict[str, Any]:
    """All that is known of one study, as plain numbers."""
    rows = [{"site": site, **row} for site, of in told.items() for row in of.rows]
    label = asked.study.task.answers[0]
    federations = [run for run in runs if run.model.kind == "federated"]
    costs = []
    for run in federations:
        folder = RunFolder(run.folder / run.job.name)
        write_report(folder)
        found = facts(folder)
        trained = sum(update["seconds"] for _, update in updates_told(found["rounds"]))
        costs.append(
            {
                "setting": run.model.setting,
                "seed": run.model.seed,
                "bytes": found["totals"]["bytes_down"] + found["totals"]["bytes_up"],
                "training_seconds": round(trained, 3),
                "rounds": _by_round(curves(found)[1][label], rows, run.model, run.job.study.rounds.count, label),
                "report": str(folder.path / "report.html"),
            }
        )
    return {
        "title": asked.study.title or asked.study.name,
        "measure": measure_of(asked.study.task),
        "label": asked.study.task.answers[0],
        "publish_sites": asked.study.evaluate.publish_sites,
        "sites": list(asked.nodes),
        "folds": max(1, len(asked.folds)),
        "partial": sorted({run.model.setting for run in federations if run.job.study.personal.keep}),
        "rows": rows,
        "costs": costs,
        "worth": {site: of.worth for site, of in told.items()},
        "subgroups": {site: of.subgroups for site, of in told.items()},
    }


def _by_round(
    series: Mapping[str, Sequence[tuple[int, float | None]]],
    rows: Sequence[Mapping[str, Any]],
    model: Model,
    last: int,
    label: str,
) -> list[tuple[int, float]]:
    """Validation of the received weights round by round, and of the last weights, which no round begins from."""
    at_end = [
        headline(row)
        for row in rows
        if (row["kind"], row["setting"], row["seed"], row["split"], row["label"])
        == ("federated", model.setting, model.seed, "val", label)
    ]
    end = sum(at_end) / len(at_end) if at_end else nan
    return [*mean_by_round(series), *([(last, end)] if isfinite(end) else [])]


def mean_by_round(series: Mapping[str, Sequence[tuple[int, float | None]]]) -> list[tuple[int, float]]:
    """The mean over sites at each round where every site has a value."""
    at: dict[int, list[float]] = {}
    for points in series.values():
        for number, value in points:
            if value is not None:
                at.setdefault(number, []).append(value)
    return [(number, sum(v) / len(v)) for number, v in sorted(at.items()) if len(v) == len(series)]


def tidy(results: Mapping[str, Any]) -> Iterable[list[Any]]:
    """results.csv: study, strategy, seed, model, site, split, label, measure, value; a heading first.

    Every number of a row of scores stands there under its name; bytes and seconds belong to a run and no site.
    """
    yield ["study", "strategy", "seed", "model", "site", "split", "label", "measure", "value"]
    for study, of in results["studies"].items():
        for line in of["rows"]:
            model = f"{line['kind']} {line['trained']}".strip() if line["kind"] == "local" else line["kind"]
            who = [study, line["setting"], line["seed"], model, line["site"], line["split"], line["label"]]
            yield from ([*who, name, value] for name, value in line["row"].items() if isinstance(value, int | float))
        for cost in of["costs"]:
            for name in ("bytes", "training_seconds"):
                yield [study, cost["setting"], cost["seed"], "federated", "", "", "", name, cost[name]]


@contextmanager
def watched(todo: Sequence[Trained], rounds: Progress) -> Iterator[None]:
    """Tells `rounds` how far all runs are, until the block ends."""
    ended, in_all = threading.Event(), _rounds(todo)

    def watch() -> None:
        while not ended.wait(0.5):
            rounds(sum(_rounds_done(run) for run in todo), in_all)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _rounds(todo: Sequence[Trained]) -> int:
    return sum(run.job.study.rounds.count for run in todo)


def _rounds_done(run: Trained) -> int:
    at = read_progress(RunFolder(run.folder / run.job.name))
    if at.get("phase") == "finished":
        return run.job.study.rounds.count
    return max(0, int(at["round"]) - (at["phase"] == "train")) if at else 0


def headline(line: Mapping[str, Any]) -> float:
    value = value_in(line["row"])
    return nan if value is None else value
