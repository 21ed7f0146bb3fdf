"""All models of a comparison at one site, in a process of its own: what comes back are counts and intervals.

Scores of single cases, and whose they are, end with the process; see fedclient/worth.py.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case
from fedclient.gate.run import usable_cases
from fedclient.site import Site, open_site
from fedclient.worth import AnyScores, Difference, Interval, difference, interval, part_of, worst_tenth
from fedserver.checkpoint import RunFolder, read_state, trained_study
from shared_models.control import without_control
from shared_models.scores import row_of
from shared_models.seeds import rng
from shared_models.study import Study
from shared_models.weights import Arrays, load
from simulations.engine import NodeConfig
from simulations.run import own_weights_of

Kind = Literal["local", "pooled", "federated", "personalised", "left out"]
SUBGROUPS = ("sex", "age", "manufacturer", "scanner")  # columns of a case's table
AGE_BANDS = (40, 65)
FEWEST_IN_GROUP = 11  # patients; a smaller group is not told (CMS and PCORnet)


@dataclass(frozen=True, slots=True)
class Model:
    """One trained model of a comparison.

    Attributes:
        setting: of the federation; empty for the baselines, which are shared.
        trained: the site that trained alone, or was left out; else empty.
        run: its run folder.
        config: of the one site that trained it, whose layers may have stayed there.
    """

    kind: Kind
    setting: str
    seed: int
    trained: str
    run: Path
    config: NodeConfig | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What a site's process gives back.

    Attributes:
        rows: for each model, split and answer: who made it, and its row of scores.
        worth: for each setting and kind: the interval of its measure, the difference to the site's own model, over all
            seeds, and its worst tenth.
        subgroups: the same difference of the federated model in groups of the site's patients.
    """

    rows: list[dict[str, Any]]
    worth: list[dict[str, Any]]
    subgroups: list[dict[str, Any]]


def score_site(name: str, config: NodeConfig, models: Sequence[Model]) -> Told:
    """Scores each model on the site's validation and test patients, and compares them with its own.

    A model that left this site out is tested here alone; one that left another out, not at all.
    """
    site = open_site({**config, "site": name})
    cases = {case.key: case for case in usable_cases(site)}
    rows: list[dict[str, Any]] = []
    found: dict[tuple[Kind, str], list[AnyScores]] = defaultdict(list)
    order: list[str] = []
    for model in models:
        if model.kind == "left out" and model.trained != name:
            continue
        study, weights = _weights_at(model, site)
        if weights is None:
            continue
        for split in ("test",) if model.kind == "left out" else ("val", "test"):
            scores, of_cases, keys = _scored(site, study, weights, split)
            rows += [
                {"kind": model.kind, "setting": model.setting, "seed": model.seed, "trained": model.trained,
                 "split": split, "label": label, "row": row_of(score)}
                for label, score in scores.items()
            ]  # fmt: skip
            if split == "test" and (model.kind != "local" or model.trained == name):
                found[model.kind, model.setting].append(of_cases)
                order = keys
    return Told(rows, *_compared(name, found, [cases[key] for key in order]))


def _weights_at(model: Model, site: Site) -> tuple[Study, Arrays | None]:
    run = RunFolder(model.run)
    study, weights = trained_study(run), without_control(load(run.weights(read_state(run).round)))
    if model.kind == "personalised":
        return study, own_weights_of(run, site, study, weights)
    if model.config is not None and study.personal.any:
        own = own_weights_of(run, open_site(model.config), study, weights)
        return study, weights if own is None else own
    return study, weights


def _scored(site: Site, study: Study, weights: Arrays, split: str) -> tuple[Mapping[str, Any], AnyScores, list[str]]:
    """Counts by answer, the first answer's scores case by case, and the keys of the cases."""
    from fedclient.training.case_scores import scored  # imports torch
    from fedclient.training.evaluate import answers
    from fedclient.training.learner import data_set, device_of, settle
    from shared_models import nets
    from shared_models.tasks.chosen import functions_of

    device = device_of(site)
    settle(site, study, 0)
    net = nets.network(study)
    nets.load_arrays(net, weights)
    task, cases = functions_of(study.task, site.labelled), data_set(site, study, split)
    given = answers(net.to(device), cases, study, task, device)
    counts, of_cases = scored(study.task, task, given, study.evaluate.threshold, site.smallest_count)
    return counts, of_cases, [case.key for case in cases.cases]


def _compared(
    name: str, found: Mapping[tuple[Kind, str], Sequence[AnyScores]], cases: Sequence[Case]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    own = found.get(("local", ""), [])
    patients = [case.patient for case in cases]
    worth: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for (kind, setting), scores in found.items():
        who = {"kind": kind, "setting": setting}
        mine = interval(scores, patients, rng("interval", name, kind, setting))
        line = {**who, "worst_tenth": _number(worst_tenth(scores)), "here": _ends(mine)}
        if kind != "local" and len(own) == len(scores):
            line |= told(difference(scores, own, patients, rng("worth", name, kind, setting)))
        worth.append(line)
        if kind not in ("federated", "personalised") or len(own) != len(scores):
            continue
        for group, places in subgroups(cases):
            few = [part_of(each, places) for each in scores], [part_of(each, places) for each in own]
            found_here = difference(*few, [patients[n] for n in places], rng("worth", name, kind, setting, group))
            groups.append({**who, "group": group, **told(found_here)})
    return worth, groups


def _ends(of: Interval) -> dict[str, float | None]:
    return {key: _number(getattr(of, key)) for key in ("low", "high")}


def told(found: Difference) -> dict[str, Any]:
    numbers = {key: _number(getattr(found, key)) for key in ("value", "low", "high")}
    return {**numbers, "patients": found.patients, "verdict": found.verdict}


def subgroups(cases: Sequence[Case]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """(name, places of its cases) of each group that the table of the data tells and that has patients enough."""
    for column in SUBGROUPS:
        named = [_group(column, {k.casefold(): v for k, v in case.facts.items()}.get(column, "")) for case in cases]
        for group in sorted(filter(None, set(named))):
            places = np.array([n for n, each in enumerate(named) if each == group], dtype=np.intp)
            if len({cases[n].patient for n in places}) >= FEWEST_IN_GROUP:
                yield f"{column} {group}", places


def _group(column: str, value: str) -> str:
    if column != "age" or not value:
        return value
    try:
        years = float(value.rstrip("Yy"))
    except ValueError:
        return ""
    young, old = AGE_BANDS
    return f"under {young}" if years < young else f"{young} to {old - 1}" if years < old else f"{old} or more"


def _number(value: float | None) -> float | None:
    return round(value, 6) if value is not None and np.isfinite(value) else None
