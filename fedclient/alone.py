"""A study as one site alone carries it out: its own patients, as many steps, nobody else's updates, and nothing sent.

    FOLDER/round-0003.safetensors     weights after round 3; the last alone is kept
    FOLDER/memory-0003.safetensors    what the site remembers of it, where the study keeps layers here

A training that was interrupted goes on with the round after the last that is there.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedclient.site import Site
from fedclient.work import Rememberer
from shared_models.errors import OrderRefused
from shared_models.strategy import Personal, Strategy
from shared_models.study import Study
from shared_models.weights import Arrays, load, save_arrays

Told = Callable[[int, int], None]  # rounds done, rounds in all


def plain_study(study: Study) -> Study:
    """The study for one site: what combines sites, or keeps them together, has no meaning there."""
    private = study.protect.privacy is not None
    return replace(
        study,
        train=replace(study.train, proximal_mu=0.0, scaffold=False, moon_mu=0.0),
        strategy=Strategy(weighting="uniform") if private else Strategy(),  # of one; no count of examples is told
        personal=Personal(keep=("norm",) if study.model.norm == "batch" else ()),
        rounds=replace(study.rounds, quorum=1, cohort=1.0),
        evaluate=replace(study.evaluate, every=0, reference=False),
        protect=replace(study.protect, secure_aggregation=None),
    )


def train_alone(site: Site, study: Study, first: Arrays, folder: Path, learner: Rememberer, told: Told) -> Arrays:
    """The model that this site's patients alone come to, after the study's rounds; what is done is not done again.

    Args:
        study: as its plan has it; made plain by `plain_study`.
        first: the weights that the study begins from.

    Raises:
        OrderRefused: training left numbers that are not finite, or the site may not go on.
    """
    done, weights, memory = _last(folder, first)
    for number in range(done + 1, study.rounds.count + 1):
        told(number - 1, study.rounds.count)
        site.go_on()
        learned, memory = learner.learn_on(site, study, number, weights, memory)
        weights = learned.weights
        save_arrays(folder / f"memory-{number:04d}.safetensors", memory)
        save_arrays(folder / f"round-{number:04d}.safetensors", weights)  # last: a round that is there has both
        for path in folder.glob("*-*.safetensors"):
            if _number(path) < number:
                path.unlink()
    told(study.rounds.count, study.rounds.count)
    own = learner.own(site, study, weights, memory, tuned=False)
    return weights if own is None else own


def _last(folder: Path, first: Arrays) -> tuple[int, Arrays, Arrays]:
    """Rounds that are done, and what the last of them left."""
    done = max((_number(path) for path in folder.glob("round-*.safetensors")), default=0)
    if done == 0:
        return 0, first, {}
    memory = folder / f"memory-{done:04d}.safetensors"
    if not memory.exists():
        raise OrderRefused("STATE_LOST", f"{memory}: is missing. Remove {folder}, and the training begins anew.")
    return done, load(folder / f"round-{done:04d}.safetensors"), load(memory)


def _number(path: Path) -> int:
    found = re.fullmatch(r"(?:round|memory)-(\d+)\.safetensors", path.name)
    return int(found[1]) if found else 10**9
