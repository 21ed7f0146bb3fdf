"""A picture of a result for people: the plane as it is, beside it what is marked, and burnt-in words of what made it"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fedclient.predict.case import Prediction
from fedclient.predict.maker import NOTICE
from fedclient.predict.views import pixel_mm, shown

EDGE = 512  # pixels of the longer side of a panel
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))  # Okabe & Ito
SOFT_HU = (-1000.0, 400.0)
LINE, MARGIN = 16, 8
SHARE = 0.35  # of the colour inside what is marked


def overlay(prediction: Prediction) -> NDArray[np.uint8]:
    """uint8[rows, columns, 3]: the plane in which most is marked, alone and under the marks, and words below."""
    grid, key = prediction.grid, prediction.key
    grey = grey_of(shown(key.voxels, grid), prediction)
    marked: NDArray[np.bool_] | None = None
    if prediction.marks is not None:
        marked = shown(prediction.marks[key.k], grid)
    size = _size((grey.shape[0], grey.shape[1]), pixel_mm(grid))
    plain = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
    rgb = np.repeat(plain[..., None], 3, axis=2)
    painted = rgb.copy()
    for n, answer in enumerate(marked if marked is not None else ()):
        large = np.asarray(Image.fromarray(np.where(answer, 255, 0).astype(np.uint8)).resize(size, 0)) > 0
        colour = np.array(COLOURS[n % len(COLOURS)], np.float32)
        painted[large] = ((1 - SHARE) * painted[large] + SHARE * colour).astype(np.uint8)
        painted[_edge(large)] = colour.astype(np.uint8)
    both = np.concatenate([rgb, np.zeros((size[1], MARGIN, 3), np.uint8), painted], axis=1)
    return _lettered(both, _words(prediction))


def grey_of(plane: NDArray[np.float32], prediction: Prediction) -> NDArray[np.uint8]:
    study = prediction.model.study
    if study.modality == "ct" and not prediction.grid.picture:
        low, high = study.preprocess.window_hu if study.preprocess.intensity == "window" else SOFT_HU
    else:
        low, high = np.percentile(plane, (0.5, 99.5)).tolist()
    scaled = (plane - low) / max(high - low, 1e-6)
    return np.asarray(np.clip(scaled, 0, 1) * 255, np.uint8)


def _size(shape: tuple[int, int], mm: tuple[float, float]) -> tuple[int, int]:
    """Columns and rows of a panel, its pixels as wide as they are high."""
    high, wide = shape[0] * mm[0], shape[1] * mm[1]
    scale = EDGE / max(high, wide)
    return max(1, round(wide * scale)), max(1, round(high * scale))


def _edge(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = marked.copy()
    for axis in (0, 1):
        for step in (1, -1):
            inner &= np.roll(marked, step, axis)
    edge: NDArray[np.bool_] = marked & ~inner
    return edge


def _words(prediction: Prediction) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines and their colours; none names a patient."""
    white, warn = (255, 255, 255), (255, 210, 0)
    model, key = prediction.model, prediction.key
    lines: list[tuple[str, tuple[int, int, int]]] = [
        (f"AI result, {NOTICE}.  Plane {key.k + 1} of {prediction.grid.shape[2]}: as it is, and with marks", white),
        (f"{model.study.task.kind} by {model.name} {model.version}, sha256 {model.digest[:16]}", white),
    ]
    for n, answer in enumerate(prediction.answers):
        lines.append((_told(prediction, n), COLOURS[n % len(COLOURS)] if answer.volume_mm3 is not None else white))
    lines += [(f"doubtful: {doubt.code}", warn) for doubt in prediction.doubts]
    return lines


def _told(prediction: Prediction, n: int) -> str:
    answer = prediction.answers[n]
    if answer.volume_mm3 is None:
        return f"{answer.name}: probability {answer.chance:.3f}"
    if not prediction.grid.measured:
        return f"{answer.name}: {'marked' if answer.called else 'nothing marked'}"
    longest = "" if answer.longest_mm is None else f", longest axial diameter {answer.longest_mm:.1f} mm"
    return f"{answer.name}: {answer.volume_mm3 / 1000:.1f} ml{longest}"


def _lettered(picture: NDArray[np.uint8], lines: Sequence[tuple[str, tuple[int, int, int]]]) -> NDArray[np.uint8]:
    high = picture.shape[0] + LINE * len(lines) + MARGIN
    canvas = Image.new("RGB", (max(picture.shape[1], 2 * EDGE), high))
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw: Any = ImageDraw.Draw(canvas)
    font: Any = ImageFont.load_default(size=13)
    for n, (words, colour) in enumerate(lines):
        draw.text((MARGIN, picture.shape[0] + 4 + n * LINE), words, fill=colour, font=font)
    return np.asarray(canvas)
