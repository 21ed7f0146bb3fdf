"""Whose pictures are attacked: patients of the study's own data, as its preprocessing has them, made small."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedclient.data.cache import Facts, Stored
from fedclient.data.dataset import DataSet
from fedclient.gate.run import usable_cases
from fedclient.site import open_site
from fedclient.training.learner import data_set
from shared_models.errors import StudyInvalid
from shared_models.preprocess import Geometry
from shared_models.protect.privacy import Privacy, Protect
from shared_models.study import Study
from simulations.engine import NodeConfig

GRID = Geometry((1, 1, 1), (1.0, 1.0, 1.0), (1,), (0.0,), (1.0,))
SPLITS = ("train", "val", "test")
MOST_SLICES = 4  # of a patient
EXAMPLE = Privacy(noise_multiplier=1.46, sample_rate=0.5, delta=1e-3)  # tried where the study has none: epsilon 8


@dataclass(frozen=True, slots=True)
class Patient:
    """A patient of one site: float32[N, E, E] slices, 0 to 1."""

    site: str
    slices: NDArray[np.float32]


def as_sent(study: Study) -> Study:
    """The study with its differential privacy and no other protection: what a site would send, bare."""
    return replace(study, protect=Protect(privacy=study.protect.privacy))


def secured(study: Study) -> bool:
    """Whether the study's updates are summed securely."""
    return study.protect.secure_aggregation is not None


def people_of(study: Study, nodes: Mapping[str, NodeConfig], edge: int, most: int) -> list[Patient]:
    """Up to `most` patients of all sites and splits, site by site in turn; their slices scaled to `edge` pixels.

    Of volumes the middle plane is taken, of several channels the first. Of one patient's images all count as one.

    Raises:
        StudyInvalid: a study without images, or data of fewer than eight patients.
    """
    if study.table_only:
        raise StudyInvalid(f"study {study.name!r}: sees tables and no images. The attacks are for studies of images.")
    of_site: dict[str, list[Patient]] = {}
    for name, config in nodes.items():
        site = open_site(config)
        person = {case.key: case.patient for case in usable_cases(site)}
        found: dict[str, list[NDArray[np.float32]]] = {}
        for split in SPLITS:
            for case in data_set(site, study, split).cases:
                found.setdefault(person[case.key], []).append(small(case.images, edge))
        of_site[name] = [Patient(name, _some(np.concatenate(parts))) for parts in found.values()]
    turns = max(map(len, of_site.values()), default=0)
    listed = [people[n] for n in range(turns) for people in of_site.values() if n < len(people)][:most]
    if len(listed) < 8:
        raise StudyInvalid(f"study {study.name!r}: {len(listed)} patients; the attacks need at least 8.")
    return listed


def _some(slices: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most `MOST_SLICES`, evenly spread: the first and the last show least."""
    places = np.linspace(0, len(slices) - 1, min(MOST_SLICES, len(slices)) + 2).round().astype(int)[1:-1]
    return slices[np.unique(places)] if len(slices) > 2 else slices


def small(images: NDArray[np.floating], edge: int) -> NDArray[np.float32]:
    """float32[N, edge, edge] of images [N, C, *size]: each scaled to 0 to 1, averaged down or repeated up."""
    first = torch.from_numpy(np.ascontiguousarray(images[:, 0], dtype=np.float32))
    if first.ndim == 4:
        first = first[..., first.shape[-1] // 2]
    low, high = first.amin((1, 2), keepdim=True), first.amax((1, 2), keepdim=True)
    scaled = torch.nn.functional.adaptive_avg_pool2d(((first - low) / (high - low).clamp(min=1e-6))[:, None], edge)
    return scaled[:, 0].numpy()


def stored(number: int, patient: Patient, label: int) -> Stored:
    """A patient as the client's data sets hold one, with one class for all slices."""
    images = patient.slices[:, None].astype(np.float16)
    return Stored(f"{number:06d}", images, np.full((len(images), 1), label, np.uint8), Facts(GRID, 0))


def places_of(cases: DataSet) -> list[NDArray[np.intp]]:
    """Where the slices of each case stand, a case being a patient here."""
    ends = np.cumsum([len(case.masks) for case in cases.cases], dtype=np.intp)
    return [np.arange(end - len(case.masks), end) for end, case in zip(ends, cases.cases, strict=True)]
