"""Networks that are one formula, so that what they mark is known: what is darker than -650 HU, or brighter than 260."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.predict.model import Model
from shared_models.study import Preprocess, Study, Task

DARK_HU = -650.0  # a quarter of the window from -1000 to 400
LUNG = Study(name="dark", preprocess=Preprocess(size=(64, 64), fit="crop_pad"))
NODULES = replace(LUNG, name="nodules", task=Task(labels=("nodule",)))


def dark(images: NDArray[Any]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (np.float32(0.25) - images.astype(np.float32)) * 40
    return found


def bright(images: NDArray[Any]) -> NDArray[np.float32]:
    return dark(np.float32(1.15) - images.astype(np.float32))  # above nine tenths of the window


def model(study: Study = LUNG, through: Any = dark, **change: Any) -> Model:
    made = Model("dark", "1.0", "d" * 64, study, through, "a formula", planes=4)
    return replace(made, **change)


def chest_hu(shape: tuple[int, int, int] = (40, 36, 5), seed: int = 0) -> NDArray[np.float32]:
    """Whole HU float32[1, *shape]: soft tissue, two lungs of unlike size that change from plane to plane, air around
    one corner; no voxel is near -650."""
    i, j, k = np.meshgrid(*map(np.arange, shape), indexing="ij")
    hu = np.full(shape, 40.0)
    hu[(i - 10) ** 2 + (j - 18 - k % 5) ** 2 < 36] = -850
    hu[(i - 29) ** 2 + (j - 16) ** 2 < 25 + 3 * (k % 5)] = -900
    hu[:3, :4] = -1000
    noise = np.random.default_rng(seed).integers(-20, 20, shape)
    return (hu + noise).astype(np.float32)[None]
