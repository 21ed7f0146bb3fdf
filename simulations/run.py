"""A study on one machine: federated, pooled, and every site alone, with the real client and server code.

    OUT/seed-0/federated/      a run folder like a deployment's, with the report, and which sites took part
    OUT/seed-0/pooled/, local-SITE/    run folders of the comparisons
    OUT/seed-0/without-SITE/   with --leave-one-out: the federation of the other sites
    OUT/results.json           every number, by seed

Pooled and local training are runs with one site, so that nothing but the data differs: pooled takes as many gradient
steps as all sites together, a site alone as many as it takes in the federation. Where a study counts in epochs pooled
takes as many of them, and so a few steps fewer: of 3 sites with 84 images each, 16 batches of 16 where the sites take
18. A run that was interrupted goes on.

What a site remembers between rounds lies in OUT/states, as it lies in a hospital's own folder in a deployment.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from fedclient.alone import plain_study
from fedclient.data.cases import state_of
from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import Site, open_site
from fedclient.work import own_model
from fedserver.checkpoint import RunFolder, create_run, read_state, trained_study
from fedserver.report import Comparison, write_report
from shared_models.control import without_control
from shared_models.errors import ManifestInvalid, StateInvalid, StudyInvalid
from shared_models.files import canonical_json, read_json, write_json
from shared_models.protect.context import LEAST_SITES
from shared_models.scores import NAMES, Score, measure_of, row_of
from shared_models.size import size_in_words
from shared_models.study import Study, sha256
from shared_models.weights import Arrays, load, schema_of
from shared_models.wire import Order
from simulations.at_once import at_once
from simulations.engine import NodeConfig, kept_workers, run_local
from simulations.phantoms import PhantomPlan, Shift, TestLabels, in_lines, phantom
from simulations.sources import config_of, pooled, sites_at
from simulations.vois import RegionPlan, regions

Engine = Literal["local", "ray"]
SHOWN = 5  # findings in one message
Say = Callable[[str], None]
NODES = "nodes.json"  # in a run folder: its sites and where their data is, on this machine


@dataclass(frozen=True, slots=True)
class Machine:
    """How a simulation uses this machine.

    Attributes:
        workers: orders carried out at once, each in a process of its own; 0 is no process but this one.
        threads: of PyTorch in each; the same number gives the same weights, whatever `workers` and `engine`.
    """

    engine: Engine = "local"
    workers: int = 0
    threads: int = 1
    device: str = "auto"


def machine(engine: str, workers: int | None, threads: int | None, device: str) -> Machine:
    """Every core, one thread each, unless told otherwise: small networks gain little from threads, and lose much
    when another program runs beside them.

    Raises:
        StudyInvalid: no such engine, or one that is not installed.
    """
    if engine not in ("local", "ray"):
        raise StudyInvalid(f"--engine {engine!r}: allowed are local and ray.")
    if engine == "ray" and find_spec("ray") is None:
        raise StudyInvalid(
            "--engine ray: Ray is not installed. Install the package with its extra `ray`, or use local."
        )
    if engine == "ray" and device not in ("auto", "cpu"):
        raise StudyInvalid(f"--device {device}: Ray deals out the GPUs itself. Leave it out, or say cpu.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cast(Engine, engine), cores if workers is None else workers, threads or 1, device)


def data_folders(
    study: Study,
    data: Sequence[Path],
    sites: int | None,
    cache: Path,
    say: Say,
    shift: str = "both",
    test_labels: str = "site",
) -> Sequence[Path]:
    """The given folders, or the phantom for a CT study.

    Raises:
        StudyInvalid: the phantom has no such images; or options of the phantom where it is not used.
    """
    if data:
        if (shift, test_labels) != ("both", "site"):
            raise StudyInvalid("--shift and --test-labels are for the phantom, and --data was given. Leave one out.")
        return data

    if study.modality == "ct" and study.task.kind == "classification" and study.task.labels == ("nodule",):
        if (shift, test_labels) != ("both", "site"):
            raise StudyInvalid("--shift and --test-labels are for the phantom of lungs, this study is of nodules.")
        return [regions(cache, RegionPlan(sites or 3), processes=2, progress=in_lines(say))]
    drawn = {"segmentation": (("lung",),), "detection": (("nodule",), ("lesion",))}
    if study.modality != "ct" or study.task.labels not in drawn.get(study.task.kind, ()):
        raise StudyInvalid(
            f"study {study.name!r}: the built-in phantom holds lungs to segment, nodules to detect, and regions with a "
            f"nodule or without to tell apart, on CT only. Give --data DIR with a manifest.csv, or another known "
            f"layout."
        )
    kinds = cast(Shift, shift), cast(TestLabels, test_labels)  # which the plan checks
    plan = replace(phantom_plan(study, sites), shift=kinds[0], test_labels=kinds[1])
    return [phantom(cache, plan, processes=2, progress=in_lines(say))]


def phantom_plan(study: Study, sites: int | None = None) -> PhantomPlan:
    """The phantom of a study: pixels as the plan asks for, three sites unless told otherwise; for detection more
    patients and nodules, and each scanner's own pixels. Its test patients are so many (some 850 nodules at three sites)
    because CPM moves by 0.02 with whom one happens to test on where there are a third of them."""
    if study.task.kind == "detection":
        return PhantomPlan(sites=sites or 3, train=96, val=12, test=72, slices=6, size=256, nodules=4.0)
    return PhantomPlan(sites=sites or 3, train=14, val=4, test=12, slices=6, size=max(128, study.preprocess.size[0]))


def node_configs(
    folder: Path, data: Sequence[Path], how: Machine, sites: int | None, layout: str = "auto"
) -> dict[str, NodeConfig]:
    """Site -> what its simulated node is told; see `sites_at` for which sites a folder has.

    Raises:
        ManifestInvalid, StudyInvalid: see `sites_at`.
    """
    alike: NodeConfig = {"work": str(folder), "threads": how.threads, "device": how.device}
    return {site: {"site": site, **config_of(where), **alike} for site, where in sites_at(data, layout, sites).items()}


@dataclass(frozen=True, slots=True)
class Job:
    """One run folder to be carried out: the federation, everything pooled, or one site alone."""

    name: str
    study: Study
    nodes: Mapping[str, NodeConfig]
    weights: Path | None = None  # the file that the study begins from, where it names one


def jobs(study: Study, nodes: Mapping[str, NodeConfig], compare: bool) -> list[Job]:
    alone = plain_study(study)
    listed = [federation("federated", study, nodes)]
    if not compare:
        return listed
    steps = study.train.local_steps
    if study.protect.privacy is not None:  # as many patients a step as all sites together: the same epsilon
        together = replace(alone, train=replace(alone.train, batch_size=alone.train.batch_size * len(nodes)))
    else:
        together = replace(alone, train=replace(alone.train, local_steps=steps * len(nodes) if steps else None))
    listed.append(Job("pooled", together, {"pooled": {**pooled([*nodes.values()]), "site": "pooled"}}))
    able = {site: config for site, config in nodes.items() if has_labels(study, config)}
    return listed + [Job(f"local-{site}", alone, {site: config}) for site, config in able.items()]


def federation(name: str, study: Study, nodes: Mapping[str, NodeConfig]) -> Job:
    """The study with these sites; its quorum is no larger than their number.

    Raises:
        StudyInvalid: too few sites for the study's robust rule, or for a secure sum.
    """
    if len(nodes) < (needed := study.strategy.fewest_updates):
        raise StudyInvalid(
            f'study {study.name!r}: strategy.robust = "{study.strategy.robust}" with malicious = '
            f"{study.strategy.malicious} needs {needed} sites, there are {len(nodes)}. Take more sites or another rule."
        )
    quorum = min(study.rounds.quorum, len(nodes))
    if study.protect.secure_aggregation is not None and len(nodes) < LEAST_SITES:
        raise StudyInvalid(
            f"study {study.name!r}: a secure sum needs {LEAST_SITES} sites, there are {len(nodes)}. Take more sites, "
            f"or leave out protect.secure_aggregation."
        )
    return Job(name, replace(study, rounds=replace(study.rounds, quorum=quorum)), nodes)


def left_out_jobs(study: Study, nodes: Mapping[str, NodeConfig]) -> list[Job]:
    """For each site the federation of all the others, which is then tested on it.

    Raises:
        StudyInvalid: there are no others, or too few for the study's robust rule.
    """
    if len(nodes) < 2:
        raise StudyInvalid(f"study {study.name!r}: --leave-one-out needs at least 2 sites, there is {len(nodes)}.")
    plain = replace(study, evaluate=replace(study.evaluate, every=0, reference=False))
    return [
        federation(f"without-{site}", plain, {s: config for s, config in nodes.items() if s != site}) for site in nodes
    ]


def carry_out(job: Job, folder: Path, how: Machine, stop: threading.Event | None = None) -> RunFolder:
    """Starts the run of a job, or goes on with it; `stop` ends one of the local engine with a ProcessFailed."""
    from shared_models.pretrained import first_weights  # imports torch

    run, inputs = RunFolder(folder / job.name), _inputs(job)
    if not (run.path / "state.json").exists():
        initial = None if job.study.plan == "federated" else first_weights(job.study, job.weights)[0]
        write_json(run.path / "inputs.json", inputs)  # first: a run that is there has it
        create_run(folder, job.name, job.study, initial)
    elif not (run.path / "inputs.json").exists() or read_json(run.path / "inputs.json") != inputs:
        raise StateInvalid(f"{run.path}: holds a run of another study or other data. Give --out another folder.")
    write_json(run.path / NODES, job.nodes)
    if how.engine == "ray":
        from simulations.ray_engine import run_ray  # imports Ray

        run_ray(run.path, job.nodes, how.workers, gpu_share(how))
    else:
        run_local(run.path, job.nodes, workers=how.workers, stop=stop)
    return run


def gpu_share(how: Machine) -> float:
    """What each of Ray's orders has of a GPU: without a share Ray hides all of them from it."""
    from fedclient.training.device import gpus  # torch

    return 0.0 if how.device == "cpu" else min(1.0, gpus() / max(1, how.workers))


def nodes_of(run: RunFolder) -> Mapping[str, NodeConfig]:
    """The sites of a run of this machine, as it was carried out last.

    Raises:
        StateInvalid: a run of elsewhere, whose sites have their data at home, or one whose data has gone.
    """
    try:
        nodes: Mapping[str, NodeConfig] = read_json(run.path / NODES)
    except FileNotFoundError:
        raise StateInvalid(f"{run.path}: does not say where its sites' data is. Say it with --data.") from None
    for site, config in nodes.items():
        if not Path(str(config["data"])).exists():
            raise StateInvalid(f"{config['data']}: the data of site {site} has gone. Say with --data where it is now.")
    return nodes


def side_by_side(todo: Sequence[Job], folder: Path, how: Machine, say: Say) -> dict[str, RunFolder]:
    """Carries out jobs at once, each with one worker; the first that fails, or Ctrl-C, ends them all.

    Returns the run folders by the names of the jobs.
    """
    one_each = replace(how, workers=min(1, how.workers))
    with kept_workers():
        runs = at_once(
            todo, lambda j, stop: carry_out(j, folder, one_each, stop), how.workers, lambda j, _: say(j.name)
        )
    return {job.name: run for job, run in zip(todo, runs, strict=True)}


def _inputs(job: Job) -> dict[str, Any]:
    """What a run folder's results follow from, so that an edited study or other data are not answered with old ones."""
    files = {str(config["hidden"]) for config in job.nodes.values() if config.get("hidden")}
    return {
        **({"hidden": read_json(Path(files.pop()))["hidden"]} if files else {}),
        "study_sha256": sha256(job.study),
        "sites": {site: str(config["manifest-site"]) for site, config in job.nodes.items()},
        "cases_sha256": {site: _cases_sha256(config) for site, config in job.nodes.items()},
    }


def check_cases(study: Study, name: str, config: NodeConfig, splits: Sequence[str] = ("train", "test")) -> None:
    """Raises ManifestInvalid where a site has no labelled case of one of the splits.

    For training a study that learns from unlabelled cases needs no label.
    """
    site = open_site(config)
    listing = list_cases(site.where, site.salt)
    bare = {"train"} if study.unlabelled.method != "none" else set[str]()
    used = [case for case in listing.cases if has_truth(case, study.task) or case.split in bare]
    labelled: Counter[str] = Counter(case.split for case in used)
    lacking = [f"to {split} on" for split in splits if not labelled[split]]
    if lacking:
        raise ManifestInvalid(
            f"{site.data}: site {name} ({listing.layout}) has no labelled case {' and none '.join(lacking)}. "
            f"Models are scored on the sites' test patients: add patients, or leave the site out. "
            + " ".join(f"{found.code}: {found.what}." for found in listing.findings[:SHOWN])
        )


def check_sites(study: Study, nodes: Mapping[str, NodeConfig]) -> set[str]:
    """The sites that have labelled cases to test on; one of few patients may have none.

    Raises:
        ManifestInvalid: a site has none to train on, or no site has one to test on.
    """
    tested: set[str] = set()
    refused: ManifestInvalid | None = None
    for name, config in nodes.items():
        check_cases(study, name, config, ("train",))
        try:
            check_cases(study, name, config)
            tested.add(name)
        except ManifestInvalid as e:
            refused = refused or e
    if not tested and refused is not None:
        raise refused
    return tested


def has_labels(study: Study, config: NodeConfig) -> bool:
    """Whether a site has a label to train on; without any it can learn with others, not alone."""
    if study.unlabelled.method == "none":
        return True  # which `check_cases` has seen to
    site = open_site(config)
    cases = list_cases(site.where, site.salt).cases
    return any(c.split == "train" and has_truth(c, study.task) and c.key not in site.hidden for c in cases)


def _cases_sha256(config: NodeConfig) -> str:
    """Of which cases a node has, what each is for, and the state of its files; whatever layout they are found by."""
    site = open_site(config)
    cases = list_cases(site.where, site.salt).cases
    return hashlib.sha256(canonical_json([[c.key, c.split, state_of(c)] for c in cases])).hexdigest()


def simulate_seed(
    study: Study,
    nodes: Mapping[str, NodeConfig],
    folder: Path,
    how: Machine,
    compare: bool,
    say: Say,
    leave_one_out: bool,
    weights: Path | None,
) -> Comparison:
    """Federated, then the rest side by side, then each model scored on each site's test patients."""
    listed = jobs(study, nodes, compare) + (left_out_jobs(study, nodes) if leave_one_out else [])
    todo = [replace(job, weights=weights) for job in listed]
    runs = {todo[0].name: carry_out(todo[0], folder, how)}
    say("federated")
    runs |= side_by_side(todo[1:], folder, how, say)
    without = {name.removeprefix("without-"): run for name, run in runs.items() if name.startswith("without-")}
    left_out = {site: score(run, {site: nodes[site]})[site] for site, run in without.items()}
    scores = {job.name: score(runs[job.name], nodes, job.nodes) for job in todo if not job.name.startswith("without-")}
    local = {name.removeprefix("local-"): s for name, s in scores.items() if name.startswith("local-")}
    own = own_scores(runs["federated"], nodes)
    partial = bool(study.personal.keep)
    return Comparison(local, scores.get("pooled", {}), scores["federated"], own, left_out, partial)


def score(
    run: RunFolder, nodes: Mapping[str, NodeConfig], trained_by: Mapping[str, NodeConfig] | None = None
) -> dict[str, Score]:
    """Site -> score of the run's last weights on its test patients, for the first label (or region).

    Args:
        trained_by: who trained; a model of one site alone has that site's own norm layers, where these stay there.
    """
    from fedclient.training.learner import ImageLearner  # imports torch

    study, weights = trained_study(run), without_control(load(run.weights(read_state(run).round)))
    if trained_by is not None and len(trained_by) == 1 and study.personal.any:
        weights = own_weights_of(run, open_site(next(iter(trained_by.values()))), study, weights) or weights
    label = study.task.answers[0]
    return {s: ImageLearner().score(open_site(c), study, weights, "test")[label] for s, c in nodes.items()}


def own_scores(run: RunFolder, nodes: Mapping[str, NodeConfig]) -> dict[str, Score]:
    """Site -> score of its own model on its test patients; empty where the study gives the sites none."""
    from fedclient.training.learner import ImageLearner  # imports torch

    study, weights = trained_study(run), without_control(load(run.weights(read_state(run).round)))
    scores: dict[str, Score] = {}
    for name, config in nodes.items():
        site = open_site(config)
        if (own := own_weights_of(run, site, study, weights)) is not None:
            scores[name] = ImageLearner().score(site, study, own, "test")[study.task.answers[0]]
    return scores


def own_weights_of(run: RunFolder, site: Site, study: Study, weights: Arrays) -> Arrays | None:
    """A site's own model after the last round, asked for as its coordinator would."""
    from fedclient.training.learner import ImageLearner  # imports torch

    state = read_state(run)
    digests = (state.study_sha256, state.weights_sha256)
    order = Order("evaluate", state.run, state.round, 1, "", *digests, counted=state.counted.get(site.name, 0))
    return own_model(order, study, weights, site, ImageLearner())


def simulate(
    study: Study,
    nodes: Mapping[str, NodeConfig],
    out: Path,
    how: Machine,
    seeds: int,
    compare: bool,
    say: Say,
    leave_one_out: bool = False,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Every seed from `study.seed` on; writes results.json and a report, and returns the results.

    Raises:
        ManifestInvalid: a site that has no labelled case to train on, or none at any site to test on.
    """
    tested = check_sites(study, nodes)
    if untested := sorted(nodes.keys() - tested):
        say(f"{', '.join(untested)}: trains, and has no patient to test on")
    comparisons: list[Comparison] = []
    tell_size(study, weights, say)
    results: dict[str, Any] = {"study": study.name, "measure": NAMES[measure_of(study.task)], "seeds": []}
    for seed in range(study.seed, study.seed + seeds):
        folder = out / f"seed-{seed}"
        of_seed = partial(_say_of, say, seed)
        comparison = simulate_seed(
            replace(study, seed=seed), nodes, folder, how, compare, of_seed, leave_one_out, weights
        )
        comparisons.append(comparison)
        results["seeds"].append({"seed": seed} | as_numbers(comparison))
        results["summary"] = summary(results["seeds"])
        write_json(out / "results.json", results)
    first = RunFolder(out / f"seed-{study.seed}" / "federated")
    results["report"] = str(write_report(first, comparisons))
    results["weights"] = str(first.weights(study.rounds.count))
    write_json(out / "results.json", results)
    return results


def tell_size(study: Study, weights: Path | None, say: Say) -> None:
    """Says what begins a run, and what each update weighs; a federated plan has no network yet."""
    from shared_models.pretrained import first_weights  # imports torch

    if study.plan == "given":
        initial, came = first_weights(study, weights)
        for words in filter(None, [came, size_in_words(schema_of(initial))]):
            say(words)


def _say_of(say: Say, seed: int, news: str) -> None:
    say(f"seed {seed}: {news} is done")


def as_numbers(comparison: Comparison) -> dict[str, Any]:
    """The headline score of each model at each site, and all that is behind it; None where a site cannot tell one, as
    it has no test patients or none with a lesion."""

    def means(of: Mapping[str, Score]) -> dict[str, float | None]:
        return {site: round(part.value, 6) if isfinite(part.value) else None for site, part in of.items()}

    def rows(of: Mapping[str, Score]) -> dict[str, Any]:
        return {site: row_of(part) for site, part in of.items()}

    return {
        "local": {trained: means(of) for trained, of in comparison.local.items()},
        "pooled": means(comparison.pooled),
        "federated": means(comparison.federated),
        "personalised": means(comparison.personalised),
        "left_out": means(comparison.left_out),
        "partial": comparison.partial,
        "details": {
            "local": {trained: rows(of) for trained, of in comparison.local.items()},
            "pooled": rows(comparison.pooled),
            "federated": rows(comparison.federated),
            "personalised": rows(comparison.personalised),
            "left_out": rows(comparison.left_out),
        },
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the seeds: of the site means, of the worst site, and of the worst cell of the local models."""

    def over(values: Sequence[Sequence[float | None]], take: Callable[[Sequence[float]], float]) -> float | None:
        known = [[v for v in of if v is not None] for of in values]
        found = [take(of) for of in known if of]
        return round(fmean(found), 6) if found else None

    def of(name: str) -> list[list[float | None]]:
        return [[*seed[name].values()] for seed in seeds]

    local = [seed["local"] for seed in seeds]
    return {
        "federated_mean": over(of("federated"), fmean),
        "federated_worst": over(of("federated"), min),
        "pooled_mean": over(of("pooled"), fmean),
        "pooled_worst": over(of("pooled"), min),
        "personalised_mean": over(of("personalised"), fmean),
        "personalised_worst": over(of("personalised"), min),
        "left_out_mean": over(of("left_out"), fmean),
        "local_home_mean": over([[cells[t] for t, cells in models.items()] for models in local], fmean),
        "local_worst_cell": over([[v for cells in models.values() for v in cells.values()] for models in local], min),
    }
