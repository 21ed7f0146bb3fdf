"""Labels that a simulation hides, to see what a study does with few of them: the same patients, however it is run."""

import hashlib
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path

from fedclient.data.listing import list_cases
from fedclient.data.truths import has_truth
from fedclient.site import open_site
from shared_models.errors import StudyInvalid
from shared_models.files import write_named
from shared_models.study import Study
from simulations.engine import NodeConfig


def hidden(
    study: Study, nodes: Mapping[str, NodeConfig], share: float, folder: Path, say: Callable[[str], None]
) -> Mapping[str, NodeConfig]:
    """What the nodes are told, so that of each only a `share` of the training patients, rounded up, has labels.

    Who has is a function of the patient: a smaller share is a part of a larger one. Writes FOLDER/hidden-HASH.json,
    the keys of the cases whose labels are hidden, for all nodes; validation and test patients keep theirs.

    Raises:
        StudyInvalid: a share that is not above 0, or above 1.
    """
    if not 0 < share <= 1:
        raise StudyInvalid(f"--labelled {share:g}: give a share of the patients, above 0 and at most 1.")
    if share == 1:
        return nodes
    keys: set[str] = set()
    for name, config in nodes.items():
        site = open_site(config)
        listed = list_cases(site.where, site.salt).cases
        cases = [case for case in listed if case.split == "train" and has_truth(case, study.task)]
        ordered = sorted({case.patient for case in cases}, key=_lot)
        kept = set(ordered[: ceil(share * len(ordered))])
        keys |= {case.key for case in cases if case.patient not in kept}
        say(f"{name}: labels of {len(kept)} of {len(ordered)} training patients")
    path = write_named(folder, "hidden", {"hidden": sorted(keys)})
    return {name: {**config, "hidden": str(path)} for name, config in nodes.items()}


def _lot(patient: str) -> str:
    return hashlib.sha256(f"labelled {patient}".encode()).hexdigest()
