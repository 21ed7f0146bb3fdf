"""All models of a comparison at one site, in a process of its own: what comes back are counts and intervals.

Scores of single cases, and whose they are, end with the process; see fedclient/worth.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedclient.comparing import Kind, compared
from fedclient.data.cases import ALL
from fedclient.gate.run import usable_cases
from fedclient.site import Once, Site, open_site
from fedclient.worth import AnyScores, joined
from fedserver.checkpoint import RunFolder, read_state, trained_study
from shared_models.control import without_control
from shared_models.scores import row_of
from shared_models.study import Study
from shared_models.weights import Arrays, load
from simulations.engine import NodeConfig
from simulations.run import own_weights_of


@dataclass(frozen=True, slots=True)
class Model:
    """One trained model of a comparison.

    Attributes:
        setting: of the federation; empty for the baselines, which are shared.
        trained: the site that trained alone, or was left out; else empty.
        fold: in which it was trained, of the folds that patients were dealt out to.
        run: its run folder.
        config: of the one node that trained it, a site or all pooled, where layers may have stayed.
    """

    kind: Kind
    setting: str
    seed: int
    trained: str
    run: Path
    config: NodeConfig | None = None
    fold: int = 0


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


def score_site(
    name: str, configs: Sequence[NodeConfig], models: Sequence[Model], known: frozenset[str] | None = frozenset()
) -> Told:
    """Scores each model on the site's validation and test patients, and compares them with its own.

    A model that left this site out is tested here alone; one that left another out, not at all. What it and the
    models of other sites alone have never seen are all patients of this site, and they are scored on all (`ALL`).

    Args:
        configs: of the site, one for each fold.
        known: patients whom other sites have too, who do not count among all; None has only the test patients count.
    """
    from fedclient.training.scoring import score_cases  # imports torch

    sites = [open_site({**config, "site": name}) for config in configs]
    cases = {case.key: case for case in usable_cases(sites[0])}
    everybody = known is not None and any(model.kind == "left out" for model in models)
    new = frozenset(case.key for case in cases.values() if case.patient not in (known or ()))
    whole = replace(sites[0], hidden=frozenset(), chosen=new, once=Once())  # listed once for all models
    rows: list[dict[str, Any]] = []
    found: dict[tuple[Kind, str], dict[int, AnyScores]] = defaultdict(dict)
    keys: dict[int, list[str]] = {}
    for model in models:
        if model.kind == "left out" and model.trained != name:
            continue
        site = sites[model.fold]
        study, weights = _weights_at(model, site)
        if weights is None:
            continue
        stranger = model.kind == "left out" or (model.kind == "local" and model.trained != name)
        splits = ("test",) if model.kind == "left out" else ("val", "test")
        for split in (*splits, ALL) if stranger and everybody else splits:
            scores, of_cases, keys_here = score_cases(whole if split == ALL else site, study, weights, split)
            rows += [
                {"kind": model.kind, "setting": model.setting, "seed": model.seed, "trained": model.trained,
                 "split": split, "label": label, "row": row_of(score)}
                for label, score in scores.items()
            ]  # fmt: skip
            if split == "test" and (model.kind != "local" or model.trained == name):
                found[model.kind, model.setting][model.seed] = of_cases
                keys[model.fold] = keys_here
    over = {key: _whole(of, len(sites), min(model.seed for model in models)) for key, of in found.items()}
    told = {key: of for key, of in over.items() if of}
    return Told(rows, *compared(name, told, [cases[key] for fold in sorted(keys) for key in keys[fold]]))


def _whole(of: Mapping[int, AnyScores], folds: int, first: int) -> list[AnyScores]:
    """Scores of each seed on the same cases: those of as many seeds as there are folds are put together."""
    if folds == 1:
        return list(of.values())
    begun = sorted({(seed - first) // folds * folds + first for seed in of})
    runs = [range(seed, seed + folds) for seed in begun]
    return [joined([of[seed] for seed in run]) for run in runs if all(seed in of for seed in run)]


def _weights_at(model: Model, site: Site) -> tuple[Study, Arrays | None]:
    run = RunFolder(model.run)
    study, weights = trained_study(run), without_control(load(run.weights(read_state(run).round)))
    if model.kind == "personalised":
        return study, own_weights_of(run, site, study, weights)
    if model.config is not None and study.personal.any:
        own = own_weights_of(run, open_site(model.config), study, weights)
        return study, weights if own is None else own
    return study, weights
