"""What logits are divided by so that the probabilities of a release are as likely as they say; no PyTorch in here.

A run fits a temperature for each label by its sites' validation patients (Guo et al. 2017, section 4.2); a release
carries them as calibration.json: `{"temperature": {label: T}}`. What is called stays what the run's own scores, which
are on the card, have called.
"""

from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_models.class_counts import STEEPEST
from shared_models.errors import ReleaseInvalid
from shared_models.study import Study

KEY = "temperature"
ALIKE = 1.05  # ratio of what is fitted to p and to 1 - p, which round into unlike bins: up to 1.0012 was measured


def carried(study: Study, fitted: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What calibration.json says of what a run has fitted; None where that is nothing, or nothing that can be applied.

    Of more than two labels of which one is true, each temperature is of that label against all others, and no division
    of the logits of a softmax is that. Two are one question, asked from both sides, and have one temperature.

    Args:
        fitted: label -> `temperature` and more, as metrics.jsonl has it.
    """
    task = study.task
    if task.kind != "classification" or (task.exclusive and task.outputs > 2):
        return None
    found = {label: fitted[label][KEY] for label in task.answers if _sound(fitted.get(label, {}).get(KEY))}
    if task.exclusive and found:
        if len(found) < 2 or max(found.values()) > ALIKE * min(found.values()):
            return None
        found = dict.fromkeys(found, round(sqrt(prod(found.values())), 6))
    return {KEY: found} if found else None


def _sound(temperature: float | None) -> bool:
    """Whether a run has found one: at an end of what is searched it has not, and would say a half of everything."""
    return temperature is not None and 1 / STEEPEST < temperature < STEEPEST


def temperatures_of(study: Study, calibration: Mapping[str, Any] | None) -> NDArray[np.float32] | None:
    """One for each output of the network, 1 where the release has none for it; None where it has none at all.

    Raises:
        ReleaseInvalid: one that is no number above 0, or of no label of the study; or several of one softmax.
    """
    if not calibration:
        return None
    task, by_answer = study.task, calibration.get(KEY)
    names = [*(("background",) if task.kind == "segmentation" and task.exclusive else ()), *task.answers]
    if set(calibration) != {KEY} or not isinstance(by_answer, Mapping) or set(by_answer) - set(names):
        raise ReleaseInvalid("calibration.json: is not of this study. Do not use the release.", "calibration.json")
    found = [by_answer.get(name, 1.0) for name in names]
    if len(found) != task.outputs:
        found = [found[0]] * task.outputs  # a prognosis has one event and many intervals
    if not all(isinstance(value, float | int) and np.isfinite(value) and value > 0 for value in found):
        raise ReleaseInvalid("calibration.json: a temperature is not above 0. Do not use the release.",
                             "calibration.json")  # fmt: skip
    if task.exclusive and len(set(found)) > 1:
        raise ReleaseInvalid("calibration.json: divides the logits of a softmax by more than one temperature, after "
                             "which its probabilities mean nothing. Do not use the release.",
                             "calibration.json")  # fmt: skip
    return np.array(found, np.float32)


def tempered(logits: NDArray[np.float32], temperatures: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Logits [N, L, ...] divided by the temperature of each output, where there are any."""
    if temperatures is None:
        return logits
    scaled: NDArray[np.float32] = logits / temperatures.reshape(-1, *[1] * (logits.ndim - 2))
    return scaled
