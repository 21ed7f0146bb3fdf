"""What a site tells beside its update, as whole numbers that travel inside the masked sum: losses and scores.

Every number has its place in the vector whether a site has it or not, so that the length of a vector says nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shared_models import class_counts, metrics
from shared_models.class_counts import ClassCounts
from shared_models.detection_counts import DetectionCounts
from shared_models.metrics import DiceCounts
from shared_models.restored_counts import RestoredCounts
from shared_models.scores import Score
from shared_models.surface_counts import DISTANCE_MM, SurfaceCounts
from shared_models.survival_counts import SurvivalCounts
from shared_models.task_table import Task

if TYPE_CHECKING:
    from shared_models.study import Study

MICRO = 1_000_000
MOST_LOSS = 1e8  # a larger one is told as this
MOST = 2**48 - 1  # of a count
MOST_TOGETHER = 2**53  # from here on counts of all sites are none: limbs of a site that lies may say 2**64
LOSS, LOSSES = "loss_micro", "loss_sites"  # sum of the sites' mean losses, in millionths; sites that have one
DISTRIBUTIONS = {  # fields that a site withholds together, for want of cases
    DiceCounts: ("histogram",),
    SurfaceCounts: ("distance",),
    ClassCounts: ("positive", "negative", "cell_cases", "cell_positives", "cell_micro"),
    SurvivalCounts: ("predicted_micro", "at_risk", "came"),
    DetectionCounts: ("hits", "false"),
}
Place = tuple[str, int | None, int]  # field, place in it where it is a list, sign


@dataclass(frozen=True, slots=True)
class Told:
    """What a sum says beside the mean update.

    Attributes:
        loss: mean of the sites' mean training losses; None where no site has one.
        scores, own_scores, validation: label -> counts of all sites together; of labels that some site has cases of.
    """

    loss: float | None
    scores: Mapping[str, Score]
    own_scores: Mapping[str, Score]
    validation: Mapping[str, Score] = field(default_factory=dict)


def _kinds(study: "Study", trained: bool, scored: bool) -> tuple[str, ...]:
    """Which scores a vector holds: those of the received weights, of the site's own model where there is one, and at
    the end of a classification those of its validation patients, by which probabilities are calibrated."""
    if not scored:
        return ()
    calibrated = not trained and study.task.kind == "classification"
    return ("score", *(("own",) if study.personal.any else ()), *(("val",) if calibrated else ()))


def names_of(study: "Study", trained: bool, scored: bool) -> tuple[str, ...]:
    """The counts in a vector, in their order; a differentially private study has none, for they carry no noise."""
    if study.protect.privacy is not None:
        return ()
    names = [LOSS, LOSSES] if trained else []
    for kind in _kinds(study, trained, scored):
        for label in study.task.answers:
            names += [_name(kind, label, about, place) for about, place in _places(study.task)]
    return tuple(names)


def counts_of(
    study: "Study",
    trained: bool,
    scored: bool,
    losses: tuple[float | None, ...],
    scores: Mapping[str, Score],
    own_scores: Mapping[str, Score],
    validation: Mapping[str, Score] | None = None,
) -> dict[str, int]:
    """One site's numbers for `names_of`; what it does not have is 0."""
    counts = dict.fromkeys(names_of(study, trained, scored), 0)
    known = [loss for loss in losses if loss is not None and isfinite(loss)]
    if LOSS in counts and known and len(known) == len(losses):
        counts[LOSS], counts[LOSSES] = round(min(max(fmean(known), 0.0), MOST_LOSS) * MICRO), 1
    for kind, of in (("score", scores), ("own", own_scores), ("val", validation or {})):
        for label, score in of.items():
            for about, place in _places(study.task):
                name = _name(kind, label, about, place)
                if name in counts:
                    counts[name] = _value(score, about, place)
    return counts


def told_in(study: "Study", trained: bool, scored: bool, counts: Mapping[str, int]) -> Told:
    """The sums of all sites' `counts_of` as scores.

    Raises:
        ValueError: sums that no sites' counts can give, so that one of them has lied.
    """
    names = set(names_of(study, trained, scored))
    if any(counts[name] >= MOST_TOGETHER for name in names):
        raise ValueError("a number is larger than any that is counted")
    sites = counts[LOSSES] if LOSS in names else 0
    found: dict[str, dict[str, Score]] = {"score": {}, "own": {}, "val": {}}
    for kind, of in found.items():
        for label in study.task.answers:
            sums = {(a, p): counts[n] for a, p in _places(study.task) if (n := _name(kind, label, a, p)) in names}
            if any(sums.values()):
                of[label] = _score(study.task, sums)
    return Told(counts[LOSS] / MICRO / sites if sites else None, found["score"], found["own"], found["val"])


def _name(kind: str, label: str, about: str, place: Place) -> str:
    name, at, sign = place
    return f"{kind}/{label}/{about}{name}{'' if at is None else f'/{at}'}{'' if sign > 0 else '-'}"


def _places(task: Task) -> Iterator[tuple[str, Place]]:
    """Every number of a score of the task: "" or "surface.", and where it stands."""
    kind: type[Any]
    if task.kind == "segmentation":
        sizes, kind = {"histogram": metrics.BINS}, DiceCounts
    elif task.kind == "classification":
        bins, cells = class_counts.BINS, class_counts.CELLS
        sizes, kind = dict.fromkeys(("positive", "negative"), bins), ClassCounts
        sizes |= dict.fromkeys(("cell_cases", "cell_positives", "cell_micro"), cells)
    elif task.kind == "reconstruction":
        sizes, kind = {}, RestoredCounts
    elif task.kind == "detection":
        sizes, kind = dict.fromkeys(("hits", "false"), class_counts.BINS), DetectionCounts
    else:
        lists = ("square_micro", "predicted_micro", "at_risk", "came")
        sizes, kind = dict.fromkeys(lists, len(task.intervals_days)), SurvivalCounts
    yield from (("", place) for place in _fields(kind, sizes))
    if task.kind == "segmentation" and task.tolerance_mm is not None:
        yield from (("surface.", place) for place in _fields(SurfaceCounts, {"distance": len(DISTANCE_MM) + 1}))


def _fields(kind: type[Any], sizes: Mapping[str, int]) -> Iterator[Place]:
    for name in (held.name for held in fields(kind)):
        if name in ("measure", "surface", "specificity", "tolerance_mm"):
            continue  # the same of every site, by the study
        if name in sizes:
            yield from ((name, at, +1) for at in range(sizes[name]))
        else:
            yield name, None, +1
            if name == "volume_bias_micro":
                yield name, None, -1  # what is below 0 is a count of its own


def _value(score: Score, about: str, place: Place) -> int:
    name, at, sign = place
    held: Any = score.surface if about and isinstance(score, DiceCounts) else score
    if held is None:
        return 0
    value = getattr(held, name)
    if at is not None:
        value = value[at] if value else 0
    return int(min(max(sign * value, 0), MOST))


def _score(task: Task, sums: Mapping[tuple[str, Place], int]) -> Score:
    whole, surface = _gathered(sums, ""), _gathered(sums, "surface.")
    if task.kind == "classification":
        return ClassCounts(**_withheld(ClassCounts, whole), specificity=task.specificity)
    if task.kind == "prognosis":
        return SurvivalCounts(**(whole if whole["told_cases"] else _withheld(SurvivalCounts, whole)))
    if task.kind == "reconstruction":
        return RestoredCounts(**whole)
    if task.kind == "detection":  # scans without any mark have told their histograms too
        return DetectionCounts(**(whole if whole["told_scans"] else _withheld(DetectionCounts, whole)))
    about = None
    if task.tolerance_mm is not None:
        about = SurfaceCounts(tolerance_mm=task.tolerance_mm, **_withheld(SurfaceCounts, surface))
    return DiceCounts(**_withheld(DiceCounts, whole), surface=about)


def _gathered(sums: Mapping[tuple[str, Place], int], about: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (where, (name, at, sign)), value in sums.items():
        if where != about:
            continue
        if at is None:
            found[name] = found.get(name, 0) + sign * value
        else:
            found[name] = (*found.get(name, ()), value)
    return found


def _withheld(kind: type[Any], found: dict[str, Any]) -> dict[str, Any]:
    """Distributions that no site has told are empty, not zero."""
    names = DISTRIBUTIONS[kind]
    return found if any(any(found[name]) for name in names) else {**found, **dict.fromkeys(names, ())}
