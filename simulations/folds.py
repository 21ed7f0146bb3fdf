"""Cross-validation: each site's patients are dealt out anew, so that over all folds each of them is tested on once."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fedclient.data.cases import Case, Split
from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import open_site
from shared_models.errors import ImageUnreadable, StudyInvalid
from shared_models.files import write_json
from shared_models.study import Study
from simulations.engine import NodeConfig
from simulations.partition import statistic

VALIDATE = 1 / 8  # of those who are not tested on: 10 of 80, as where the data set does not say
Nodes: TypeAlias = Mapping[str, NodeConfig]


def folded(study: Study, nodes: Nodes, folds: int, folder: Path) -> list[Nodes]:
    """What the nodes are told in each of `folds` folds, whatever splits the data set has of its own.

    Who is in which fold is a function of a site's patients and their classes. Who has no label keeps his split.
    Writes FOLDER/folds/N-of-FOLDS.json for all nodes, and for their data pooled: the split of each case, by its key.

    Raises:
        StudyInvalid: a site has fewer patients with a label than folds, or too few to train and to validate as well;
            or a patient is at several sites, and would be dealt out at each.
    """
    if shared := len(at_several(nodes)):
        raise StudyInvalid(
            f"--folds {folds}: {shared} patients are at several sites, and would train at one while they are tested on "
            f"at another. Leave out their rows at all sites but one."
        )
    splits: list[dict[str, Split]] = [{} for _ in range(folds)]
    for name, config in nodes.items():
        site = open_site(config)
        cases = list_cases(site.where, site.salt).cases
        strata = _strata([case for case in cases if has_truth(case, study.task)], study)
        people = sum(map(len, strata))
        if people < (fewest := max(folds, 4 if folds == 2 else 3)):  # two of the rest train and validate
            raise StudyInvalid(
                f"--folds {folds}: site {name} has {people} patients with a label, and {fewest} are needed. Ask for "
                f"fewer folds, or leave the site out."
            )
        for number, of in enumerate(splits):
            dealt = deal(strata, number, folds)
            of |= {case.key: dealt[case.patient] for case in cases if case.patient in dealt}
    found: list[Nodes] = []
    for number, of in enumerate(splits, start=1):
        path = folder / "folds" / f"{number}-of-{folds}.json"
        write_json(path, {"splits": dict(sorted(of.items()))})
        found.append({name: {**config, "dealt": str(path)} for name, config in nodes.items()})
    return found


def at_several(nodes: Nodes) -> frozenset[str]:
    """The patients of one data set that are at more than one of its sites; those of unlike folders are other people."""
    if len({config["data"] for config in nodes.values()}) > 1:
        return frozenset()
    seen: Counter[str] = Counter()
    for config in nodes.values():
        site = open_site(config)
        seen.update({case.patient for case in list_cases(site.where, site.salt).cases})
    return frozenset(who for who, times in seen.items() if times > 1)


def _strata(cases: Sequence[Case], study: Study) -> list[list[str]]:
    """The patients by class, or by whether the event came, so that each fold has a share of each; else together."""
    labels: dict[str, set[str]] = {case.patient: set() for case in cases}
    for case in cases if study.task.kind in ("classification", "prognosis") else ():
        with suppress(ImageUnreadable):  # what is wrong with a label is told when its case is looked at
            labels[case.patient].add(str(statistic(case, study)))
    strata: dict[str, list[str]] = {}
    for who in sorted(labels, key=_lot):
        strata.setdefault("+".join(sorted(labels[who])), []).append(who)
    return [strata[label] for label in sorted(strata)]


def deal(strata: Sequence[Sequence[str]], fold: int, folds: int) -> dict[str, Split]:
    """Patient -> split in one fold: every `folds`-th is tested on; of the rest an eighth validates, one at least."""
    dealt: dict[str, Split] = {}
    rests: list[list[str]] = []
    before = 0
    for people in strata:
        dealt |= dict.fromkeys(people[(fold - before) % folds :: folds], "test")
        before += len(people)  # so that the first fold does not get what is left over of each
        rests.append([who for who in people if who not in dealt])
    validate = [round(VALIDATE * len(rest)) for rest in rests]
    if not any(validate):
        validate[max(range(len(rests)), key=lambda n: len(rests[n]))] = 1
    for rest, of in zip(rests, validate, strict=True):
        for place, who in enumerate(rest):
            turned = (place - fold * of) % len(rest)  # other patients in each fold
            dealt[who] = "val" if turned < of else "train"
    return dealt


def _lot(patient: str) -> str:
    return hashlib.sha256(f"fold {patient}".encode()).hexdigest()
