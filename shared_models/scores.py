"""What a site may tell of how well a network does: one kind of counts for each kind of task, all of which add up."""

from collections.abc import Iterable, Mapping
from functools import reduce
from math import nan
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from shared_models import class_counts, detection_counts, metrics, restored_counts, survival_counts
from shared_models.class_counts import ClassCounts
from shared_models.detection_counts import DetectionCounts
from shared_models.errors import UpdateRejected
from shared_models.metrics import DiceCounts
from shared_models.restored_counts import RestoredCounts
from shared_models.survival_counts import SurvivalCounts
from shared_models.task_table import Task

Score: TypeAlias = DiceCounts | ClassCounts | SurvivalCounts | DetectionCounts | RestoredCounts
AnyScore: TypeAlias = Annotated[Score, Field(discriminator="measure")]  # as a message holds it

NAMES = {  # headline measure -> its name
    "dice": "Dice",
    "auroc": "AUROC",
    "c_index": "C-index",
    "cpm": "CPM",
    "restored": "share restored",
}
MEASURE_OF = {
    "segmentation": "dice",
    "classification": "auroc",
    "prognosis": "c_index",
    "detection": "cpm",
    "reconstruction": "restored",
}


def measure_of(task: Task) -> str:
    """The headline measure of a task, as a row of scores has it."""
    return MEASURE_OF[task.kind]


def doubted_scores(score: Score, task: Task, site: str) -> Score:
    """`score` as it came, if it is of the study's task and adds up with those of other sites.

    Raises:
        UpdateRejected: counts of another task, or taken at another tolerance or specificity than the study's.
    """
    taken: float | None
    wanted: float | None
    if isinstance(score, DiceCounts):
        taken, wanted = None if score.surface is None else score.surface.tolerance_mm, task.tolerance_mm
    elif isinstance(score, ClassCounts):
        taken, wanted = score.specificity, task.specificity
    elif isinstance(score, DetectionCounts | RestoredCounts):
        taken = wanted = None
    else:
        taken, wanted = len(score.square_micro), len(task.intervals_days)
    if score.measure != measure_of(task) or taken != wanted:
        raise UpdateRejected(
            "OTHER_MEASURE", f"site {site!r}: scores by another measure than the study's. Install one version on both."
        )
    return score


def merge(a: Score, b: Score) -> Score:
    """Counts of both: associative, and commutative.

    Raises:
        ValueError: counts of unlike tasks.
    """
    if isinstance(a, DiceCounts) and isinstance(b, DiceCounts):
        return metrics.merge(a, b)
    if isinstance(a, ClassCounts) and isinstance(b, ClassCounts):
        return class_counts.merge(a, b)
    if isinstance(a, SurvivalCounts) and isinstance(b, SurvivalCounts):
        return survival_counts.merge(a, b)
    if isinstance(a, DetectionCounts) and isinstance(b, DetectionCounts):
        return detection_counts.merge(a, b)
    if isinstance(a, RestoredCounts) and isinstance(b, RestoredCounts):
        return restored_counts.merge(a, b)
    raise ValueError(f"{NAMES[a.measure]} and {NAMES[b.measure]} do not add up")


def total(parts: Iterable[Score]) -> Score | None:
    """All of them together; None of nothing."""
    listed = list(parts)
    return reduce(merge, listed) if listed else None


def row_of(score: Score) -> dict[str, Any]:
    """For JSON and tables; `row[row["measure"]]` is the headline, None without one."""
    if isinstance(score, DiceCounts):
        return metrics.as_row(score)
    if isinstance(score, DetectionCounts):
        return detection_counts.as_row(score)
    if isinstance(score, RestoredCounts):
        return restored_counts.as_row(score)
    return class_counts.as_row(score) if isinstance(score, ClassCounts) else survival_counts.as_row(score)


def value_in(row: Mapping[str, Any]) -> float | None:
    """The headline figure of a row; rows of older runs are Dice and do not say so."""
    value: float | None = row[row.get("measure", "dice")]
    return value


def value_of(score: Score | None) -> float:
    """The headline figure, NaN without one."""
    return nan if score is None else score.value
