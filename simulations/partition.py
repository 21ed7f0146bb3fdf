"""Made-up sites from pooled patients: label skew, quantity skew or neither, by patient and by seed alone.

A patient keeps the split that it has, all its cases stay together, and every patient is at exactly one site. Shares are
drawn once and used in each split, so that what a site is tested on resembles what it trains on.
"""

import json
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case, read_case, read_case_labels
from fedclient.data.lesions import lesions_of
from fedclient.data.listing import list_cases
from fedclient.data.truths import classes_of, has_truth, number_in
from fedclient.site import open_site
from shared_models.errors import ImageUnreadable, StudyInvalid
from shared_models.files import write_named
from shared_models.seeds import rng
from shared_models.study import Study
from simulations.engine import NodeConfig
from simulations.sources import pooled

Kind = Literal["natural", "iid", "dirichlet", "quantity"]
Say = Callable[[str], None]
SPLITS = ("train", "val", "test")
BANDS = 4  # of a segmentation's label statistic: quarters of the patients


@dataclass(frozen=True, slots=True)
class Partition:
    """How patients come to sites.

    Attributes:
        kind: `natural` sites of the data, `iid`, `dirichlet` shares of each class (Hsu et al. 2019, section 3), or
            `quantity`: Dirichlet shares of all patients (Li et al. 2022, section IV-C).
        alpha: concentration of the Dirichlet distribution; the smaller, the more unlike the sites.
    """

    kind: Kind = "natural"
    alpha: float = math.inf


@dataclass(frozen=True, slots=True)
class Person:
    """One patient: never leaves this process, only the keys of its cases do.

    Attributes:
        label: a class, or a quarter of the label statistic.
    """

    who: str
    split: str
    label: str
    keys: tuple[str, ...]


def partition_named(text: str) -> Partition:
    """`natural`, `iid`, `dirichlet:ALPHA` or `quantity:ALPHA`.

    Raises:
        StudyInvalid: anything else.
    """
    kind, _, alpha = text.partition(":")
    if kind in ("natural", "iid") and not alpha:
        return Partition(cast(Kind, kind))
    if kind in ("dirichlet", "quantity") and re.fullmatch(r"\d+(\.\d+)?([eE]-?\d+)?", alpha) and float(alpha) > 0:
        return Partition(cast(Kind, kind), float(alpha))
    raise StudyInvalid(
        f"--partition {text!r}: allowed are natural, iid, dirichlet:ALPHA and quantity:ALPHA with ALPHA above 0, for "
        f"example dirichlet:0.5."
    )


def split_people(people: Sequence[Person], how: Partition, sites: int, seed: int) -> list[list[Person]]:
    """The patients of each site, in the order of sites; a function of the patients, `how`, `sites` and `seed` alone.

    A site that the draw leaves without a patient of a split gets one from the site that has most of them, as long as
    there are enough: each site trains, validates and tests on somebody.

    Raises:
        StudyInvalid: fewer patients to train or to test on than sites.
    """
    counts = Counter(person.split for person in people)
    for split in ("train", "test"):
        if counts[split] < sites:
            raise StudyInvalid(
                f"--sites {sites}: there are {counts[split]} patients of split {split}, and each site needs one. Ask "
                f"for at most {min(counts['train'], counts['test'])} sites."
            )
    draw = rng(seed, "partition", how.kind, how.alpha, sites)
    ordered = sorted(people, key=lambda person: person.who)
    labels = sorted({person.label for person in ordered}) if how.kind == "dirichlet" else [""]
    found: list[list[Person]] = [[] for _ in range(sites)]
    for label in labels:
        shares = np.full(sites, 1 / sites) if math.isinf(how.alpha) else _dirichlet(how.alpha, sites, draw)
        for split in SPLITS:
            mine = [p for p in ordered if p.split == split and (how.kind != "dirichlet" or p.label == label)]
            mine = [mine[n] for n in draw.permutation(len(mine))]
            for person, site in zip(mine, _places(shares, len(mine), draw), strict=True):
                found[site].append(person)
    for split in SPLITS:
        if counts[split] >= sites:
            _give_each_one(found, split)
    return found


def _dirichlet(alpha: float, sites: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """Shares that add up to 1; in logarithms, as gamma variates of a small alpha are 0 in floats."""
    logs = np.log(draw.gamma(alpha + 1, size=sites)) + np.log(draw.uniform(size=sites)) / alpha
    parts: NDArray[np.float64] = np.exp(logs - logs.max())
    shares: NDArray[np.float64] = parts / parts.sum()
    return shares


def _places(shares: NDArray[np.float64], count: int, draw: np.random.Generator) -> list[int]:
    """A site for each of `count` patients: whole numbers next to the shares, ties by lot."""
    wanted = shares * count
    numbers = np.floor(wanted).astype(int)
    rest = wanted - numbers + draw.uniform(0, 1e-9, len(shares))
    numbers[np.argsort(-rest)[: count - numbers.sum()]] += 1
    return [site for site, number in enumerate(numbers) for _ in range(number)]


def _give_each_one(found: list[list[Person]], split: str) -> None:
    while empty := [n for n, people in enumerate(found) if not any(p.split == split for p in people)]:
        most = max(range(len(found)), key=lambda n: (sum(p.split == split for p in found[n]), -n))
        last = max((p for p in found[most] if p.split == split), key=lambda p: p.who)
        found[most].remove(last)
        found[empty[0]].append(last)


def partitioned(
    study: Study,
    nodes: Mapping[str, NodeConfig],
    how: Partition,
    sites: int,
    folder: Path,
    say: Say,
) -> dict[str, NodeConfig]:
    """Site -> what its node is told, of `sites` made-up sites over all cases of `nodes`.

    Writes FOLDER/partition-HASH.json: the keys of each site's cases. They say nothing without the data.

    Raises:
        StudyInvalid: too few patients.
        ImageUnreadable: for a label skew: a label that cannot be read.
    """
    if how.kind == "natural":
        return dict(nodes)
    people = people_of(study, nodes, how.kind == "dirichlet")
    names = [f"part-{n:02d}" for n in range(1, sites + 1)]
    parts = split_people(people, how, sites, study.seed)
    keys = {name: sorted(key for p in part for key in p.keys) for name, part in zip(names, parts, strict=True)}
    for name, part in zip(names, parts, strict=True):
        of = Counter(person.split for person in part)
        say(f"{name}: {', '.join(f'{of[split]} {split}' for split in SPLITS)} patients")
    path = write_named(
        folder, "partition", {"kind": how.kind, "alpha": str(how.alpha), "seed": study.seed, "sites": keys}
    )
    whole = pooled([*nodes.values()])
    return {name: {**whole, "site": name, "chosen": str(path), "part": name} for name in names}


def people_of(study: Study, nodes: Mapping[str, NodeConfig], labelled: bool) -> list[Person]:
    """Every patient of the nodes, with the keys of its cases; its label only where `labelled`, as images must be read.

    Patients of unlike data folders are different people, whatever they are called there.
    """
    cases: dict[str, list[Case]] = {}
    for config in nodes.values():
        site = open_site(config)
        for case in list_cases(site.where, site.salt).cases:
            cases.setdefault(json.dumps([str(config["data"]), case.patient]), []).append(case)
    numbers: dict[str, list[str | float]] = {}
    for who, mine in cases.items():
        numbers[who] = []
        for case in mine if labelled else ():
            if has_truth(case, study.task):
                numbers[who].append(statistic(case, study))
    labels = _labels(numbers)
    return [
        Person(who, mine[0].split, labels[who], tuple(sorted(case.key for case in mine))) for who, mine in cases.items()
    ]


def statistic(case: Case, study: Study) -> str | float:
    """Of one case: its classes; whether the event came; how many lesions; or the labelled share of its voxels."""
    task = study.task
    if task.kind == "classification":
        return "|".join(name for name, there in zip(task.labels, classes_of(case, task), strict=True) if there)
    if task.kind == "prognosis":
        return f"{task.event_column}={number_in(case, task.event_column):g}"
    if task.kind == "detection":
        try:
            found = lesions_of(case, read_case(case, study.channels), task)
        except ImageUnreadable as e:
            raise ImageUnreadable(f"{case.where}: {e}", e.code) from None
        return float(((found[:, 0] >= 1) & (found[:, 0] <= len(task.labels))).sum())
    try:
        marks = read_case_labels(case, read_case(case, study.channels), task.labels)
    except ImageUnreadable as e:
        raise ImageUnreadable(f"{case.where}: {e}", e.code) from None
    return float(((marks > 0) & (marks <= len(task.labels))).mean())


def _labels(numbers: Mapping[str, Sequence[str | float]]) -> dict[str, str]:
    """Patient -> class. Shares become quarters of the patients by their mean; classes of several images are joined."""
    shares = {who: [n for n in of if isinstance(n, float)] for who, of in numbers.items()}
    means = {who: fmean(of) for who, of in shares.items() if of}
    edges = [float(e) for e in np.quantile([*means.values()], np.arange(1, BANDS) / BANDS)] if means else []
    banded = {who: f"quarter {bisect_left(edges, mean) + 1}" for who, mean in means.items()}
    return {who: banded.get(who, "+".join(sorted({str(n) for n in of}))) for who, of in numbers.items()}
