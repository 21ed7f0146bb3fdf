"""What logits come to, without PyTorch: probabilities, and what is marked; in training and in a release alike"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from shared_models.study import Task


def chances_of(task: Task, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities float32 of the same shape: a softmax where exactly one label is true, else a sigmoid each."""
    found: NDArray[np.float32] = softmax(logits, axis=1) if task.exclusive else expit(logits)
    return found


def predicted_of(task: Task, chances: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """What is marked, bool[N, answers, *size]: above the threshold, or the most probable of a softmax."""
    if not task.exclusive:
        return np.asarray(chances > threshold)
    most = chances.argmax(axis=1)
    return np.stack([most == k for k in range(1, chances.shape[1])], axis=1)
