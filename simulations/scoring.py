"""All models of a comparison at one site, in a process of its own: what comes back are counts and intervals.

Scores of single cases, and whose they are, end with the process; see fedclient/worth.py.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedclient.comparing import Kind, compared
from fedclient.gate.run import usable_cases
from fedclient.site import Site, open_site
from fedclient.worth import AnyScores
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
        run: its run folder.
        config: of the one node that trained it, a site or all pooled, where layers may have stayed.
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
    from fedclient.training.scoring import score_cases  # imports torch

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
            scores, of_cases, keys = score_cases(site, study, weights, split)
            rows += [
                {"kind": model.kind, "setting": model.setting, "seed": model.seed, "trained": model.trained,
                 "split": split, "label": label, "row": row_of(score)}
                for label, score in scores.items()
            ]  # fmt: skip
            if split == "test" and (model.kind != "local" or model.trained == name):
                found[model.kind, model.setting].append(of_cases)
                order = keys
    return Told(rows, *compared(name, found, [cases[key] for key in order]))


def _weights_at(model: Model, site: Site) -> tuple[Study, Arrays | None]:
    run = RunFolder(model.run)
    study, weights = trained_study(run), without_control(load(run.weights(read_state(run).round)))
    if model.kind == "personalised":
        return study, own_weights_of(run, site, study, weights)
    if model.config is not None and study.personal.any:
        own = own_weights_of(run, open_site(model.config), study, weights)
        return study, weights if own is None else own
    return study, weights
