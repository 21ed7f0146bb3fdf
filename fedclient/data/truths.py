"""What a network is to answer for a case, as the study's task has it: a mask, classes, or when an event came."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Boxes, Case, Marks, Shown, read_case_labels
from fedclient.data.images import IGNORE
from fedclient.data.labels import refused
from fedclient.data.volume import Volume
from shared_models.preprocess import Geometry, preprocess_labels
from shared_models.task_table import Task

Truth = NDArray[Any]
MOST_COVARIATE = 1e18  # its square, which an optimizer takes of gradients, is a float32 still


def has_truth(case: Case, task: Task) -> bool:
    """Whether there is something for the task to learn from; what it is shows as the case is read."""
    if task.kind == "reconstruction":
        return bool(case.channels)
    if task.kind == "segmentation":
        return case.label is not None and not isinstance(case.label, Shown | Boxes)
    if task.kind == "detection":
        told = case.label if case.marks is None else case.marks
        unknown = isinstance(told, Marks) and told.nodules is None
        return told is not None and not isinstance(told, Shown) and not unknown
    if task.kind == "classification":
        return task.column in case.facts or isinstance(case.label, Shown)
    return task.time_column in case.facts and task.event_column in case.facts


def read_truth(case: Case, volume: Volume, geometry: Geometry, task: Task) -> Truth:
    """The truth of each example of a case: uint8[N, *size] masks, uint8[N, labels] classes, float32[N, 2] follow-up.

    Lesions are read once for the whole image: `fedclient.data.lesions`. Of a case that nobody has labelled it is 127
    everywhere: what no loss and no score looks at.

    Raises:
        ImageUnreadable: LABEL_MISSING, LABEL_VALUES and what `read_case_labels` raises.
    """
    if not has_truth(case, task):
        of_one = geometry.size if task.kind == "segmentation" else (task.outputs,)
        return np.full((geometry.examples, *of_one), IGNORE, np.uint8)
    if task.kind == "reconstruction":  # the image itself, once a part of it is hidden
        return np.zeros((geometry.examples, 1), np.uint8)
    if task.kind == "segmentation":
        return preprocess_labels(read_case_labels(case, volume, task.labels), geometry)
    return np.tile(vector_of(case, task), (geometry.examples, 1))


def vector_of(case: Case, task: Task) -> Truth:
    """What is true of a case as a whole: uint8[labels] classes, or float32[2] days followed and whether the event came.

    Raises:
        ImageUnreadable: LABEL_MISSING, LABEL_VALUES.
    """
    return classes_of(case, task) if task.kind == "classification" else follow_up(case, task)


def follow_up(case: Case, task: Task) -> NDArray[np.float32]:
    """float32[2]: days followed, and 1 where the event came then.

    Raises:
        ImageUnreadable: LABEL_MISSING; LABEL_VALUES, a time that is not above 0, or an event that is neither 0 nor 1.
    """
    days, event = (number_in(case, column) for column in (task.time_column, task.event_column))
    if days <= 0:
        raise refused("LABEL_VALUES", f"`{task.time_column}` is not above 0.")
    if event not in (0, 1):
        raise refused("LABEL_VALUES", f"`{task.event_column}` is neither 0 nor 1.")
    return np.array([days, event], np.float32)


def covariates_of(case: Case, task: Task) -> NDArray[np.float32]:
    """float32[covariates], each less its mean and over its deviation, as the study has them.

    Raises:
        ImageUnreadable: LABEL_MISSING, LABEL_VALUES.
    """
    values = [(number_in(case, c.column) - c.mean) / c.deviation for c in task.covariates]
    for value, covariate in zip(values, task.covariates, strict=True):
        if abs(value) > MOST_COVARIATE:
            raise refused(
                "LABEL_VALUES",
                f"`{covariate.column}` is too large for a network: more than {MOST_COVARIATE:.0e} once the study has "
                f"taken its mean off and divided by its deviation. Correct it, or ask for a study with a larger "
                f"deviation.",
            )
    return np.array(values, np.float32)


def number_in(case: Case, column: str) -> float:
    """A finite number of the case's row; what stands there instead is not quoted, a shifted column may hold a name."""
    if column not in case.facts:
        raise refused("LABEL_MISSING", f"`{column}` is not in its table, or empty.")
    try:
        value = float(case.facts[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise refused("LABEL_VALUES", f"`{column}` is no finite number.")
    return value


def classes_of(case: Case, task: Task) -> NDArray[np.uint8]:
    """uint8[labels], 1 for each label that the image shows; names are compared without regard to case.

    Raises:
        ImageUnreadable: LABEL_MISSING; LABEL_VALUES, a name that the study does not know, or not exactly one label
            where the study has a softmax.
    """
    names, asked = _named(case, task)
    here: Mapping[str, str] = {name.casefold(): label for name, label in case.structures.items()}
    shown = {here.get(name.casefold(), name.casefold()) for name in names if name}
    if asked is not None and not set(task.labels) <= {here.get(name.casefold(), name.casefold()) for name in asked}:
        raise refused("LABEL_MISSING", f"nobody looked for all of {', '.join(task.labels)} on this image.")
    if asked is not None:
        shown &= set(task.labels)  # what else was looked for is another study's
    shown -= {task.none.casefold(), "background"}
    if strange := len(shown - set(task.labels)):
        raise refused(
            "LABEL_VALUES",
            f"its classes hold {strange} that the study does not know ({', '.join(task.labels)}; {task.none!r} for "
            f"none of them). Map names with `structures` under [data] of site.toml.",
        )
    if task.exclusive and len(shown) != 1:
        raise refused(
            "LABEL_VALUES", f"it shows {len(shown)} of {', '.join(task.labels)}; the study wants exactly one."
        )
    return np.array([label in shown for label in task.labels], dtype=np.uint8)


def _named(case: Case, task: Task) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    if task.column in case.facts:
        return tuple(name.strip() for name in case.facts[task.column].split("|")), None
    if isinstance(case.label, Shown):
        return case.label.names, case.label.asked
    raise refused("LABEL_MISSING", f"the case has no classes: `{task.column}` is not in its table, or empty.")
