"""The functions of the task that a study names."""

from collections.abc import Sequence

from shared_models.study import Task
from shared_models.tasks import classification, detection, prognosis, reconstruction, segmentation
from shared_models.tasks.functions import TaskFunctions


def functions_of(task: Task, labelled: Sequence[str] = ()) -> TaskFunctions:
    """What a site trains and scores by; `labelled` are the labels that its cases have, all where none is named."""
    if task.kind == "segmentation":
        return segmentation.functions_of(task, labelled)
    if task.kind == "detection":
        return detection.functions_of(task)
    if task.kind == "classification":
        return classification.functions_of(task)
    return prognosis.functions_of(task) if task.kind == "prognosis" else reconstruction.functions_of(task)
