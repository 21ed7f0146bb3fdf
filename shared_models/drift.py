"""What a model was asked and what it answered, as counts of cases on fixed grids, so that a drift can be told.

A profile holds no image and no identifier: for each feature of a case (voxel size, intensities before and after the
study's preprocessing, share of voxels marked, ...) how many cases lie in each cell of a grid that follows from the
study alone. Profiles of sites, or of weeks, add up. A release carries those of the patients that its sites kept out of
training, a site apart, because a hospital is like itself and not like the mean of all; `shared_models/betting.py` says
whether what a site predicts on is still like one of them.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import log
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared_models.errors import OrderRefused, StateInvalid, UpdateRejected
from shared_models.files import canonical_json
from shared_models.parse import STRICT, Counts, Sha256, SiteName, parse, plain
from shared_models.study import Study, Task

Edges: TypeAlias = NDArray[np.floating[Any]]
Cells: TypeAlias = Mapping[str, int]  # feature -> the cell that one case lies in

MOST_CASES = 2**20
MOST_PROFILES = 1000
MOST_VOXELS = 2**20  # of an image that its quantiles are taken from, evenly spread
AXES = ("rows", "columns", "planes")
QUANTILES = (5, 25, 50, 75, 95)  # contrast agent or bone show in the last, padding and air in the first
LARGER_MM3 = 4.0  # a lesion is a connected piece of at least so much; single voxels come and go with noise

SPACING_MM = 0.1 * 2 ** (np.arange(29) / 4)  # edges of the cells, in quarters of an octave: 0.1 to 12.8 mm
LENGTH = 2 ** (np.arange(25) / 2)
HU = np.r_[-1024:512:16, 512:3073:256].astype(np.float64)
GREY = np.r_[0.0, 2 ** (np.arange(33) / 2)]
WINDOWED = np.arange(1, 40) / 40
STANDARDISED = np.arange(-20, 21) / 4
TEXTURE = 2 ** (np.arange(-48, 9) / 4)
SHARE = np.r_[2.0**-30, 2 ** (np.arange(-40, 0) / 2)]  # the first cell is none at all
NUMBER = np.arange(1, 17) - 0.5
CHANCE = np.arange(1, 20) / 20


@dataclass(frozen=True, slots=True)
class Profile:
    """Cases by the cell of each feature.

    Raises:
        ValueError: counts that no cases can have; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    cases: int
    counts: Mapping[str, Counts]

    def __post_init__(self) -> None:
        if not 0 <= self.cases <= MOST_CASES or len(self.counts) > 256:
            raise ValueError(f"a profile is of at most {MOST_CASES} cases and 256 features")
        for name, counts in self.counts.items():
            if not re.fullmatch(r"[a-z0-9.-]{1,80}", name):
                raise ValueError("a feature's name holds other than small letters, digits, dots and dashes")
            if not 2 <= len(counts) <= 256 or min(counts) < 0 or sum(counts) != self.cases:
                raise ValueError(f"`{name}` does not count each of {self.cases} cases once")


@dataclass(frozen=True, slots=True)
class Observed:
    """What a site adds to a monitoring round: the profile of its latest cases under a release, by its digest."""

    __pydantic_config__ = STRICT
    site: SiteName
    release: Sha256
    profile: Profile


def grids(study: Study) -> dict[str, Edges]:
    """Each feature of a study's cases with the inner edges of its cells, which are one more than edges."""
    inside: Edges = WINDOWED if study.preprocess.intensity == "window" else STANDARDISED
    found: dict[str, Edges] = {}
    found |= {f"spacing.{axis}": SPACING_MM for axis in AXES} | {f"size.{axis}": LENGTH for axis in AXES}
    found |= {f"raw.p{q}": levels(study) for q in QUANTILES}
    found |= {f"input.p{q}": inside for q in QUANTILES} | {"input.texture": TEXTURE}
    for name in study.task.answers:
        if study.task.kind == "segmentation":
            found |= {f"share.{name}": SHARE, f"lesions.{name}": NUMBER, f"inside.{name}": levels(study)}
        found[f"chance.{name}"] = CHANCE
    return found


def levels(study: Study) -> Edges:
    """Inner edges of the cells of grey levels as they are read."""
    edges: Edges = HU if study.modality == "ct" else GREY
    return edges


def cells_of(
    study: Study,
    voxels: NDArray[np.float32],
    spacing_mm: Sequence[float],
    images: NDArray[Any],
    chances: Sequence[float],
    marked: NDArray[np.bool_] | None = None,
) -> dict[str, int]:
    """Where one case lies.

    Args:
        voxels: float32[C, I, J, K], as read.
        images: [N, C, *size], as the network saw them.
        chances: for each answer of the task the probability of the case; of a segmentation its mean over what is
            marked, 0 where nothing is.
        marked: bool[answers, I, J, K] on the image's grid; a segmentation's.
    """
    raw = _quantiles(np.clip(_thinned(voxels), -1024, None) if study.modality == "ct" else _thinned(voxels))
    values = dict(zip((f"spacing.{axis}" for axis in AXES), spacing_mm, strict=True))
    values |= dict(zip((f"size.{axis}" for axis in AXES), map(float, voxels.shape[1:]), strict=True))
    values |= dict(zip((f"raw.p{q}" for q in QUANTILES), raw, strict=True))
    values |= dict(zip((f"input.p{q}" for q in QUANTILES), _quantiles(_thinned(images)), strict=True))
    values["input.texture"] = _texture(images)
    for at, name in enumerate(study.task.answers):
        if marked is not None:
            values[f"share.{name}"] = float(marked[at].mean(dtype=np.float64))
            values[f"lesions.{name}"] = float(lesions(marked[at], spacing_mm))
            values[f"inside.{name}"] = inside(voxels, marked[at])
        values[f"chance.{name}"] = chances[at]
    return {name: int(np.searchsorted(edges, values[name], side="right")) for name, edges in grids(study).items()}


def answered(task: Task, chances: NDArray[Any], marked: NDArray[np.bool_] | None = None) -> list[float]:
    """For each answer of the task one probability of the case, as `cells_of` takes it.

    Args:
        chances: float32[outputs, I, J, K] of a segmentation, else float32[N, outputs] of the examples of the case.
        marked: bool[answers, I, J, K] of a segmentation.
    """
    if marked is not None:
        first = len(chances) - len(marked)  # a softmax has the background as well
        pairs = zip(chances[first:], marked, strict=True)
        return [float(chance[on].mean(dtype=np.float64)) if on.any() else 0.0 for chance, on in pairs]
    if task.kind == "prognosis":  # that the event comes within the last interval
        return [float(1 - np.prod(1 - chances.astype(np.float64), axis=1).mean())]
    return [float(chance) for chance in chances.mean(axis=0, dtype=np.float64)]


def inside(voxels: NDArray[np.float32], marked: NDArray[np.bool_]) -> float:
    """The middle grey level (of an even number the lower one) of what is marked; below all levels where nothing is.

    Where a change of the image as a whole is small, as that of lungs which hold less air, it shows here.

    Args:
        voxels: float32[C, I, J, K], as read; of several channels the first.
    """
    return float(np.percentile(voxels[0][marked], 50, method="lower")) if marked.any() else -np.inf


def lesions(marked: NDArray[np.bool_], spacing_mm: Sequence[float]) -> int:
    """Connected pieces (by faces) of at least `LARGER_MM3`; where that is less than a voxel, of one."""
    pieces, count = ndimage.label(marked)
    if not count:
        return 0
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    return int((sizes * float(np.prod(spacing_mm)) >= LARGER_MM3).sum())


def _thinned(values: NDArray[Any]) -> NDArray[np.float32]:
    flat = values.reshape(-1)
    return np.asarray(flat[:: max(1, flat.size // MOST_VOXELS)], np.float32)


def _quantiles(values: NDArray[np.float32]) -> list[float]:
    return [float(q) for q in np.percentile(values, QUANTILES)]


def _texture(images: NDArray[Any]) -> float:
    """The middle step between neighbours along the columns, clipped ones and padding left out: noise, sharpness, and
    the blur of a resampled image, and little of its edges."""
    several = images[:: max(1, images.size // MOST_VOXELS)].astype(np.float32, copy=False)
    inside = (several > several.min()) & (several < several.max())
    steps = np.abs(np.diff(several, axis=3))[inside[:, :, :, 1:] & inside[:, :, :, :-1]]
    return float(np.median(steps)) if steps.size else 0.0


def profile_of(study: Study, cases: Iterable[Cells]) -> Profile:
    """The profile of some cases, each by its cells.

    Raises:
        StateInvalid: cells that the study's grids do not have, as of another study or version.
    """
    counts = {name: np.zeros(len(edges) + 1, np.int64) for name, edges in grids(study).items()}
    number = 0
    for cells in cases:
        check_cells(study, cells)
        for name, at in cells.items():
            counts[name][at] += 1
        number += 1
    return Profile(number, {name: tuple(each.tolist()) for name, each in counts.items()})


def check_cells(study: Study, cells: Cells) -> None:
    """Raises StateInvalid unless every feature of the study has a cell of its grid, and no other has one."""
    wanted = grids(study)
    if cells.keys() != wanted.keys() or any(not 0 <= at <= len(wanted[name]) for name, at in cells.items()):
        raise StateInvalid(
            f"study {study.name!r}: a case was counted on other grids than this version has. Begin a new log: "
            f"`fedclient drift RELEASE --forget`."
        )


def merge(a: Profile, b: Profile) -> Profile:
    """The cases of both, of one study; associative and commutative.

    Raises:
        ValueError: profiles on unlike grids.
    """
    if a.counts.keys() != b.counts.keys():
        raise ValueError("profiles of unlike studies do not add up")
    summed = {name: tuple(x + y for x, y in zip(a.counts[name], b.counts[name], strict=True)) for name in a.counts}
    return Profile(a.cases + b.cases, summed)


def total(parts: Sequence[Profile]) -> Profile:
    return reduce(merge, parts)


def released(profile: Profile, smallest_count: int) -> Profile:
    """The profile, if it may leave its site as it is.

    Raises:
        OrderRefused: `FEW_CASES`: distributions of fewer cases than `smallest_count` stay.
    """
    if profile.cases < smallest_count:
        raise OrderRefused(
            "FEW_CASES", f"{profile.cases} cases, distributions of fewer than {smallest_count} do not leave this site."
        )
    return profile


def doubted(profile: Profile, study: Study, site: str) -> Profile:
    """A site's profile as it came; what gets past may be merged.

    Raises:
        UpdateRejected: `PROFILE_KIND`: other features or grids than the study's.
    """
    wanted = {name: len(edges) + 1 for name, edges in grids(study).items()}
    if {name: len(counts) for name, counts in profile.counts.items()} != wanted or not profile.cases:
        raise UpdateRejected(
            "PROFILE_KIND", f"site {site!r}: counts on other grids than the study's. Install one version on both."
        )
    return profile


def reference(profiles: Sequence[Profile]) -> dict[str, Any]:
    """What a release carries, as JSON: the sites' profiles without their names, in an order that tells nothing."""
    return {"profiles": sorted(map(plain, profiles), key=lambda p: hashlib.sha256(canonical_json(p)).digest())}


def read_reference(fingerprint: Mapping[str, Any] | None, study: Study, where: str) -> tuple[Profile, ...]:
    """The profiles of a release; none of one that has no reference.

    Raises:
        StateInvalid: it is not one of this study.
    """
    if not fingerprint:
        return ()
    listed = fingerprint.get("profiles")
    if set(fingerprint) != {"profiles"} or not isinstance(listed, list) or len(listed) > MOST_PROFILES:
        raise StateInvalid(f"{where}: its reference for drift is not `profiles` alone. Get the release anew.")
    found = tuple(parse(Profile, each, f"{where}: reference for drift", StateInvalid) for each in listed)
    try:
        return tuple(doubted(each, study, "release") for each in found)
    except UpdateRejected:
        raise StateInvalid(f"{where}: its reference for drift is of another study or version.") from None


def divergence(a: Counts, b: Counts) -> float:
    """Jensen-Shannon divergence of two histograms, 0 (alike) to 1 (apart) (Lin 1991, equation 3.1, in bits)."""
    p, q = (np.asarray(c, np.float64) / max(1, sum(c)) for c in (a, b))
    middle = (p + q) / 2

    def entropy(x: NDArray[np.float64]) -> float:
        return float(-(x[x > 0] * np.log2(x[x > 0])).sum())

    return max(0.0, entropy(middle) - (entropy(p) + entropy(q)) / 2)


def divergences(a: Profile, b: Profile) -> dict[str, float]:
    """Of each feature."""
    return {name: divergence(a.counts[name], b.counts[name]) for name in a.counts}


def by_chance(a: Counts, b: Counts) -> float:
    """The divergence that two samples of one distribution are expected to have: of chi-square, as in the population
    stability index (Yurdakul & Naranjo 2020, section 3), over the cells that any case lies in; at most 1."""
    cells = sum(x + y > 0 for x, y in zip(a, b, strict=True))
    if not sum(a) or not sum(b):
        return 1.0
    return min(1.0, (cells - 1) * (1 / sum(a) + 1 / sum(b)) / (8 * log(2)))


def nearest(profile: Profile, profiles: Sequence[Profile]) -> int:
    """Which of `profiles` is most like `profile`: the least mean divergence."""
    return int(np.argmin([np.mean(list(divergences(profile, each).values())) for each in profiles]))


def outlying(cells: Cells, profiles: Sequence[Profile]) -> tuple[str, ...]:
    """Features of one case that lie beyond what any of the profiles has seen, and a cell more."""
    found = []
    for name, at in cells.items():
        seen = np.flatnonzero(np.sum([profile.counts[name] for profile in profiles], axis=0))
        if seen.size and not seen[0] - 1 <= at <= seen[-1] + 1:
            found.append(name)
    return tuple(found)


def bounds_text(name: str, study: Study, at: int) -> str:
    """A cell in words: `0.84 to 1`, `below 0.1`, `from 12.8`."""
    edges = [float(edge) for edge in grids(study)[name]]
    if at == 0:
        return f"below {edges[0]:.3g}"
    return f"from {edges[-1]:.3g}" if at == len(edges) else "{:.3g} to {:.3g}".format(*list(pairwise(edges))[at - 1])
