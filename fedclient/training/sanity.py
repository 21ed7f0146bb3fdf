"""Whether maps may be believed: do they follow from the weights, do they come again, do they find what is known.

After Adebayo et al. 2018 (section 3, model parameter randomisation), and Arun et al. 2021, who asked all of these of
eight methods on chest radiographs; none passed them all.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from fedclient.training.maps import Method, Saliency, explain, prepared
from fedclient.worth import Difference, difference, mean_scores
from shared_models import nets
from shared_models.errors import ExplanationFailed
from shared_models.seeds import rng
from shared_models.study import Study

DRAWS = 5  # networks with random weights
STAGES = 4  # of the cascade, from the head to the image
CASCADED = 12  # examples that it is taken on
MOST_ALIKE = 0.5  # rank correlation with the maps of random weights
LEAST_REPEATED = 0.7  # rank correlation with the maps of the same examples, seen a little grainier
GRAIN = 0.01  # of the example's range: nobody sees it
MOST_KEPT = 0.25  # of what the maps find above chance, by maps of random weights
LIMITS = (
    "Known limits of such maps: they show where a score reacts, not why, and not that the answer is right. A map can "
    "look convincing over a wrong answer, and none at all is needed for a right one. All of eight methods failed at "
    "least one such check on chest radiographs (Arun et al., Radiology: AI 2021); what finds lesions on a phantom may "
    "miss them in patients. Where the place matters, train a segmentation or a detection. Not for diagnosis."
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One example whose finding is known.

    Attributes:
        image: float32[C, *size], as the network sees it.
        lesion: bool[*size], not empty.
        patient: groups the examples of a patient; only its being the same or not is looked at.
    """

    image: NDArray[np.float32]
    lesion: NDArray[np.bool_]
    patient: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: passed or not, and in words with the figures that say so."""

    name: str
    passed: bool
    words: str


@dataclass(frozen=True, slots=True)
class Checkup:
    """All checks of one method on one model.

    Attributes:
        localisation, centre, chance, randomised: mean over the examples of the area under the precision-recall curve
            of pixels: of the maps; of a map that is brightest in its middle; of chance (the lesion's share); and of
            maps of random weights.
        cascade: rank correlation with the maps of the model as more blocks, from the head on, have random weights.
        repeated: rank correlation with the maps of the same examples, a little grainier.
        verdicts: randomisation, repeatability, localisation.
    """

    method: Method
    examples: int
    localisation: float
    centre: float
    chance: float
    randomised: float
    cascade: tuple[float, ...]
    repeated: float
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed, "limits": LIMITS}


def check_maps(
    net: nn.Module, study: Study, samples: Sequence[Sample], answer: str, method: Method, *, draws: int = DRAWS
) -> Checkup:
    """Asks one method all of it, on examples that show what `answer` names.

    Raises:
        ExplanationFailed: no example, or what `explain` raises.
    """
    if not samples:
        raise ExplanationFailed(f"there is no example with a known place of {answer!r}, and nothing can be checked.")
    words = (study.seed, study.name, method, "sanity")
    patients = [sample.patient for sample in samples]
    lesions = [sample.lesion for sample in samples]
    # a segmentation explains one region whatever the weights: the lesion
    regions = lesions if study.task.kind == "segmentation" else [None] * len(samples)

    def maps(of: nn.Module, images: Sequence[Tensor], seed: int) -> list[Saliency]:
        copy = prepared(of)
        pairs = zip(images, regions, strict=False)  # the cascade looks at the first of them
        return [explain(copy, x, study, answer, method, seed=seed, region=region).saliency for x, region in pairs]

    images = [torch.from_numpy(sample.image) for sample in samples]
    ours = maps(net, images, 0)
    found = precisions(ours, lesions)
    middle = precisions([centre_prior(lesion.shape) for lesion in lesions], lesions)
    chance = np.array([lesion.mean() for lesion in lesions])
    device = next(net.parameters()).device
    random, likeness = [], []
    for draw in range(draws):
        drawn = _random(study, draw).to(device)
        theirs = maps(drawn, images, 0)
        random.append(precisions(theirs, lesions))
        likeness.append(alike(ours, theirs))
    randomised = np.mean(random, axis=0)
    few = images[:CASCADED]
    cascade = tuple(alike(ours[: len(few)], maps(each.to(device), few, 0)) for each in cascaded(net, study))
    chance_draw = rng(*words, "grain")
    repeated = alike(ours, maps(net, [grainy(image, chance_draw) for image in images], 1))

    def beside(theirs: NDArray[np.float64], what: str) -> Difference:
        return difference([mean_scores(found)], [mean_scores(theirs)], patients, rng(*words, what))

    verdicts = (
        _randomisation(float(np.mean(likeness)), found, chance, randomised, beside(randomised, "random")),
        Verdict(
            "repeatability",
            repeated >= LEAST_REPEATED,
            f"rank correlation with the maps of the same examples, a little grainier: {repeated:.2f} (at least "
            f"{LEAST_REPEATED})",
        ),
        _localisation(found, beside(chance, "chance"), beside(middle, "centre")),
    )
    return Checkup(
        method,
        len(samples),
        localisation=float(found.mean()),
        centre=float(middle.mean()),
        chance=float(chance.mean()),
        randomised=float(randomised.mean()),
        cascade=cascade,
        repeated=repeated,
        verdicts=verdicts,
    )


def _randomisation(
    likeness: float,
    found: NDArray[np.float64],
    chance: NDArray[np.float64],
    randomised: NDArray[np.float64],
    loss: Difference,
) -> Verdict:
    above = float((found - chance).mean())
    kept = float((randomised - chance).mean()) / above if above > 0 else np.inf
    return Verdict(
        "randomisation",
        likeness <= MOST_ALIKE and loss.low > 0 and kept <= MOST_KEPT,
        f"with random weights the maps are other ones (rank correlation {likeness:.2f}, at most {MOST_ALIKE}) and lose "
        f"{_told(loss)} of AUPRC; of what they find above chance {kept:.0%} is left (at most {MOST_KEPT:.0%})",
    )


def _localisation(found: NDArray[np.float64], chance: Difference, centre: Difference) -> Verdict:
    return Verdict(
        "localisation",
        chance.low > 0 and centre.low > 0,
        f"AUPRC of pixels {found.mean():.3f}: {_told(chance)} above chance, {_told(centre)} above a map that is "
        f"brightest in its middle",
    )


def _told(of: Difference) -> str:
    return f"{of.value:+.3f} ({of.low:+.3f} to {of.high:+.3f}, 95 % over {of.patients} patients)"


def precisions(maps: Sequence[Saliency], lesions: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Average precision of each map."""
    return np.array([average_precision(m, lesion) for m, lesion in zip(maps, lesions, strict=True)])


def average_precision(saliency: NDArray[Any], lesion: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve of pixels ranked by a map, in steps; equal ones are told together.

    A map that is everywhere the same has the lesion's share of the pixels.
    """
    values, truth = saliency.ravel(), lesion.ravel()
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # the last of each group of equal ones
    recall, precision = hits[ends] / hits[-1], hits[ends] / (ends + 1)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def centre_prior(size: Sequence[int]) -> Saliency:
    """The map of somebody who has not looked: 1 in the middle, less the farther from it in shares of the edges."""
    lines = [np.linspace(-1, 1, edge) ** 2 for edge in size]
    away = sum(np.meshgrid(*lines, indexing="ij"), start=np.zeros(tuple(size)))
    return np.asarray(1 - away / len(lines), np.float32)


def alike(ours: Sequence[Saliency], theirs: Sequence[Saliency]) -> float:
    """Mean rank correlation of maps of the same examples; a map without any relief is like none."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        flat = np.ptp(a) == 0 or np.ptp(b) == 0
        found.append(0.0 if flat else float(spearmanr(a.ravel(), b.ravel()).statistic))
    return float(np.mean(found))


def grainy(image: Tensor, chance: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(chance.standard_normal(tuple(image.shape), dtype=np.float32))
    return image + noise * GRAIN * (image.max() - image.min()).cpu()


def _random(study: Study, draw: int) -> nn.Module:
    """The network as it would begin from another seed."""
    return nets.network(replace(study, seed=(study.seed + 1 + draw) % 2**32))


def cascaded(net: nn.Module, study: Study) -> Sequence[nn.Module]:
    """Copies of `net` with more and more blocks, from the head on, as another seed would have them."""
    trained, fresh = nets.arrays_of(net), nets.arrays_of(_random(study, 0))
    blocks = nets.blocks(net)
    made = []
    for stage in range(1, STAGES + 1):
        from_block = len(blocks) - round(len(blocks) * stage / STAGES)
        replaced = {name for block in blocks[from_block:] for name in block}
        copy = nets.network(study)
        nets.load_arrays(copy, {name: fresh[name] if name in replaced else trained[name] for name in trained})
        made.append(copy)
    return made
