"""Cross-validation: each site's patients are dealt out anew, so that over all folds each of them is tested on once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from fedclient.data.cases import Split
from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import open_site
from shared_models.errors import StudyInvalid
from shared_models.files import write_json
from shared_models.study import Study
from simulations.engine import NodeConfig

VALIDATE = 1 / 8  # of those who are not tested on: 10 of 80, as where the data set does not say
Nodes: TypeAlias = Mapping[str, NodeConfig]


def folded(study: Study, nodes: Nodes, folds: int, folder: Path) -> list[Nodes]:
    """What the nodes are told in each of `folds` folds, whatever splits the data set has of its own.

    Who is in which fold is a function of the patients of a site alone. Who has no label keeps the split that he had.
    Writes FOLDER/folds/N-of-FOLDS.json for all nodes, and for their data pooled: the split of each case, by its key.

    Raises:
        StudyInvalid: a site has fewer patients with a label than folds, or too few to train and to validate as well.
    """
    splits: list[dict[str, Split]] = [{} for _ in range(folds)]
    for name, config in nodes.items():
        site = open_site(config)
        cases = [case for case in list_cases(site.where, site.salt).cases if has_truth(case, study.task)]
        people = sorted({case.patient for case in cases}, key=_lot)
        if len(people) < (fewest := max(folds, 4 if folds == 2 else 3)):  # two of the rest train and validate
            raise StudyInvalid(
                f"--folds {folds}: site {name} has {len(people)} patients with a label, and {fewest} are needed. Ask "
                f"for fewer folds, or leave the site out."
            )
        for number, of in enumerate(splits):
            dealt = deal(people, number, folds)
            of |= {case.key: dealt[case.patient] for case in cases}
    found: list[Nodes] = []
    for number, of in enumerate(splits, start=1):
        path = folder / "folds" / f"{number}-of-{folds}.json"
        write_json(path, {"splits": dict(sorted(of.items()))})
        found.append({name: {**config, "dealt": str(path)} for name, config in nodes.items()})
    return found


def deal(people: list[str], fold: int, folds: int) -> dict[str, Split]:
    """Patient -> split in one fold: every `folds`-th is tested on; of the rest an eighth validates, one at least."""
    dealt: dict[str, Split] = {who: "test" for who in people[fold::folds]}
    rest = [who for who in people if who not in dealt]
    validate = max(1, round(VALIDATE * len(rest)))
    for place, who in enumerate(rest):
        turned = (place - fold * validate) % len(rest)  # other patients in each fold
        dealt[who] = "val" if turned < validate else "train"
    return dealt


def _lot(patient: str) -> str:
    return hashlib.sha256(f"fold {patient}".encode()).hexdigest()
