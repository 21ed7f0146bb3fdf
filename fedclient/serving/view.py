"""Planes of an image for the page: each as it is, and what is marked as a layer that lets it shine through."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.predict.blocks import opened
from fedclient.predict.case import Prediction
from fedclient.predict.inputs import Source
from fedclient.predict.overlay import COLOURS, grey_of
from fedclient.predict.results import write_png
from fedclient.predict.views import pixel_mm, shown

MOST_PLANES = 48  # evenly spread, and the one in which most is marked
MOST_EDGE = 1024  # of a picture on the page; larger ones are thinned


def write_view(prediction: Prediction, source: Source, folder: Path) -> list[dict[str, Any]]:
    """Writes `plane-N.png` and, where something can be marked, `marks-N.png`."""
    count, key = prediction.grid.shape[2], prediction.key.k
    wanted = {key, *np.linspace(0, count - 1, min(count, MOST_PLANES)).round().astype(int).tolist()}
    _, runs = opened(source, prediction.model.study)
    at, planes = 0, []
    for volume in runs:
        here = range(at, at + volume.voxels.shape[3])
        planes += [_plane(prediction, volume.voxels[0, :, :, k - at], k, folder) for k in sorted(wanted & {*here})]
        at = here.stop
    return planes


def _plane(prediction: Prediction, voxels: NDArray[np.float32], k: int, folder: Path) -> dict[str, Any]:
    grid = prediction.grid
    name = folder.name
    picture = grey_of(shown(voxels, grid), prediction)
    step = max(1, -(-max(picture.shape) // MOST_EDGE))
    write_png(folder / f"plane-{k}.png", picture[::step, ::step])
    high, wide = picture.shape[0] * pixel_mm(grid)[0], picture.shape[1] * pixel_mm(grid)[1]
    told = {"plane": k, "key": k == prediction.key.k, "image": f"{name}/plane-{k}.png", "aspect": round(wide / high, 4)}
    if prediction.marks is None:
        return told
    marks = shown(prediction.marks[k], grid)[:, ::step, ::step]
    layer = np.zeros((*marks.shape[1:], 4), np.uint8)
    for n, answer in enumerate(marks):
        layer[answer] = (*COLOURS[n % len(COLOURS)], 255)
    write_png(folder / f"marks-{k}.png", layer)
    return told | {"marks": f"{name}/marks-{k}.png"}


def colours(answers: int) -> list[str]:
    """Of each answer, for the legend."""
    return ["#{:02x}{:02x}{:02x}".format(*COLOURS[n % len(COLOURS)]) for n in range(answers)]
