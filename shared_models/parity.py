"""Whether all forms of a released network answer alike: made-up cases, preprocessing included, and what came of them.

    parity.safetensors   for each case: voxels, spacing_mm, inputs, logits, decisions (of a table: inputs, logits)
    parity.json          how far each form was from the torch network

The cases are bodies made by formula, in the units of the study's modality; they hold no patient. Probabilities of an
export may differ by `TOLERANCE`, logits by that share of the largest where it is above 1; decisions (masks on the
image's own grid, calls) must be the same wherever the torch network itself is not that near to its threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_models.calibration import tempered
from shared_models.errors import ReleaseInvalid
from shared_models.preprocess import Geometry, plan_geometry, preprocess, restore
from shared_models.runtimes import Runner
from shared_models.seeds import rng
from shared_models.study import Study
from shared_models.tasks.chosen import functions_of
from shared_models.tasks.segmentation import predicted_of
from shared_models.weights import loaded, save_arrays

ARRAYS, FIGURES = "parity.safetensors", "parity.json"
TOLERANCE = 1e-4
CASES = 2
MOST_EDGE = {2: 1024, 3: 192}  # voxels of a made-up image along an axis, in so many dimensions


@dataclass(frozen=True, slots=True)
class Case:
    """One made-up case: an image float32[C, I, J, K] with its spacing in mm, or the rows of a table as `inputs`.

    Attributes:
        inputs: what the network sees: float32[N, C, *size], or float32[N, covariates].
        geometry: of the inputs on the image; None without one.
    """

    name: str
    inputs: NDArray[np.float32]
    voxels: NDArray[np.float32] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    geometry: Geometry | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one case: logits, probabilities (masks: on the image's own grid), what is decided, and where that is near."""

    logits: NDArray[np.float32]
    chances: NDArray[np.float32]
    decisions: NDArray[np.bool_]
    near: NDArray[np.bool_]


def made_up_cases(study: Study) -> list[Case]:
    """The same cases for the same study."""
    if study.table_only:
        drawn = rng("parity", study.name).standard_normal((8, len(study.task.covariates)))
        return [Case("table", drawn.astype(np.float32))]
    return [_image_case(study, number) for number in range(CASES)]


def _image_case(study: Study, number: int) -> Case:
    """A coarse and a fine image: one is scaled up by preprocessing, the other down, cropped or padded."""
    plan, chance = study.preprocess, rng("parity", study.name, number)
    factor = (1.25, 0.8)[number]
    spacing = [mm * factor for mm in plan.spacing_mm] if plan.spacing_mm else [0.9, 0.7, 3.0][: len(plan.size)]
    if plan.fit == "patches":  # one window is the whole image: how windows are joined is not the network's
        steps = [1 / factor] * len(plan.size) if plan.spacing_mm else [1.0] * len(plan.size)
        shape = [max(4, floor(edge * step * 0.9)) for edge, step in zip(plan.size, steps, strict=True)]
    else:
        most, shares = MOST_EDGE[len(plan.size)], ((0.5, 0.8, 0.9), (1.6, 1.2, 1.1))[number]
        shape = [min(most, max(8, round(edge * share))) for edge, share in zip(plan.size, shares, strict=False)]
    while len(shape) < 3:
        shape, spacing = [*shape, 2], [*spacing, 3.0]
    voxels = _body(study, (shape[0], shape[1], shape[2]), chance)
    return image_case(f"case-{number}", voxels, (spacing[0], spacing[1], spacing[2]), study)


def image_case(name: str, voxels: NDArray[np.float32], spacing_mm: tuple[float, float, float], study: Study) -> Case:
    """An image as the network sees it."""
    i, j, k = voxels.shape[1:]
    examples = preprocess(voxels, spacing_mm, study.preprocess)
    geometry = plan_geometry((i, j, k), spacing_mm, study.preprocess)
    return Case(name, np.asarray(examples.images, np.float32), voxels, spacing_mm, geometry)


def _body(study: Study, shape: tuple[int, int, int], chance: np.random.Generator) -> NDArray[np.float32]:
    """float32[C, *shape]: a body with two dark lobes, a bright spine and small spots; Hounsfield units for CT."""
    at = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")

    def ball(centre: Sequence[float], radii: Sequence[float]) -> NDArray[np.bool_]:
        return np.asarray(sum(((x - c) / r) ** 2 for x, c, r in zip(at, centre, radii, strict=True)) < 1)

    image = np.full(shape, -1000.0)
    image[ball((0, 0, 0), (0.85, 0.7, 4))] = 40
    for side in (-0.42, 0.42):
        image[ball((side, 0.05, 0), (0.3, 0.45, 3))] = -850
    image[ball((0, -0.5, 0), (0.1, 0.12, 4))] = 400
    for _ in range(6):
        radius = float(chance.uniform(0.04, 0.15))
        image[ball(chance.uniform(-0.6, 0.6, 3).tolist(), (radius, radius, 0.8))] = float(chance.uniform(-100, 300))
    channels = [image + chance.normal(0, 15, shape) for _ in range(max(1, len(study.channels)))]
    if study.modality == "ct":
        return np.stack(channels).astype(np.float32).round()
    bright = [np.where(image > -1000, np.clip(channel + 1000, 1, None), 0) for channel in channels]
    return np.stack([value * (1 + n / 4) for n, value in enumerate(bright)]).astype(np.float32).round()


def answer(
    study: Study, case: Case, logits: NDArray[np.float32], temperatures: NDArray[np.float32] | None = None
) -> Answer:
    """What the study's post-processing makes of logits: masks on the image's own grid, or calls for each example.

    Args:
        temperatures: of the release; the probabilities are told calibrated by them, decisions are by those before.
    """
    task, threshold = study.task, study.evaluate.threshold
    chances = functions_of(task).chances(torch.from_numpy(np.ascontiguousarray(logits))).numpy()
    if task.kind == "segmentation" and case.geometry is not None:
        chances = restore(chances, case.geometry)[None]
    if task.kind == "segmentation":
        decisions = predicted_of(task, chances, threshold)
    elif task.exclusive:
        decisions = np.arange(chances.shape[1]) == chances.argmax(axis=1)[:, None]
    else:
        decisions = chances > threshold
    near = np.broadcast_to(_near(chances, threshold, task.exclusive), decisions.shape)
    if temperatures is not None:
        scaled = torch.from_numpy(np.ascontiguousarray(tempered(logits, temperatures)))
        chances = functions_of(task).chances(scaled).numpy()
    return Answer(logits, chances, decisions, near)


def _near(chances: NDArray[np.float32], threshold: float, exclusive: bool) -> NDArray[np.bool_]:
    if not exclusive:
        return np.asarray(np.abs(chances - threshold) < TOLERANCE)
    first, second = np.sort(chances, axis=1)[:, -1:], np.sort(chances, axis=1)[:, -2:-1]
    return np.asarray(first - second < 2 * TOLERANCE)


def compared(
    study: Study,
    cases: Sequence[Case],
    wanted: Sequence[Answer],
    forms: Mapping[str, Runner],
    temperatures: NDArray[np.float32] | None = None,
) -> dict[str, dict[str, float]]:
    """How far each form is from what is wanted, by the name of its file; probabilities calibrated.

    Raises:
        ReleaseInvalid: naming the file whose answer differs.
    """
    figures: dict[str, dict[str, float]] = {}
    for name, run in forms.items():
        worst, likely, changed, near = 0.0, 0.0, 0, 0
        for case, expected in zip(cases, wanted, strict=True):
            found = answer(study, case, run(case.inputs), temperatures)
            if found.logits.shape != expected.logits.shape or not np.isfinite(found.logits).all():
                raise ReleaseInvalid(
                    f"{name}: answers {case.name} with shape {list(found.logits.shape)} or with numbers that are not "
                    f"finite; the network's is {list(expected.logits.shape)}. It is no export of these weights.",
                    name,
                )
            scale = max(1.0, float(np.abs(expected.logits).max()))
            off = float(np.abs(found.logits - expected.logits).max())
            chances = float(np.abs(found.chances - expected.chances).max())
            differs = found.decisions != expected.decisions
            wrong = int((differs & ~expected.near).sum())
            if off > TOLERANCE * scale or chances > TOLERANCE or wrong:
                raise ReleaseInvalid(
                    f"{name}: its answer to {case.name} is off by {off:.3g} in logits (largest {scale:.3g}) and by "
                    f"{chances:.3g} in probability ({TOLERANCE:g} is allowed), and {wrong} decisions differ. It is no "
                    "export of these weights; nothing is released.",
                    name,
                )
            worst, likely = max(worst, off), max(likely, chances)
            changed, near = changed + int(differs.sum()), near + int(expected.near.sum())
        figures[name] = {"logits": worst, "probability": likely, "decisions": changed, "undecided": near}
    return figures


def save_cases(folder: Path, cases: Sequence[Case], answers: Sequence[Answer]) -> None:
    """Writes parity.safetensors."""
    arrays: dict[str, NDArray[Any]] = {}
    for case, found in zip(cases, answers, strict=True):
        arrays |= {f"{case.name}/inputs": case.inputs, f"{case.name}/logits": found.logits}
        arrays[f"{case.name}/decisions"] = found.decisions.astype(np.uint8)
        if case.voxels is not None:
            arrays[f"{case.name}/voxels"] = case.voxels
            arrays[f"{case.name}/spacing_mm"] = np.array(case.spacing_mm, np.float64)
    save_arrays(folder / ARRAYS, arrays)


def stored_cases(
    content: bytes, study: Study, temperatures: NDArray[np.float32] | None = None
) -> tuple[list[Case], list[Answer]]:
    """The cases of a release, preprocessed anew, and what its network answered when it was made.

    Args:
        content: of parity.safetensors.

    Raises:
        ReleaseInvalid: this package preprocesses in another way than the one that made the release.
    """
    arrays = loaded(content, ARRAYS)
    cases: list[Case] = []
    answers: list[Answer] = []
    for name in sorted({key.partition("/")[0] for key in arrays}):
        case = Case(name, arrays[f"{name}/inputs"])
        if f"{name}/voxels" in arrays:
            i, j, k = (float(mm) for mm in arrays[f"{name}/spacing_mm"])
            case = image_case(name, arrays[f"{name}/voxels"], (i, j, k), study)
        before = arrays[f"{name}/inputs"]
        if case.inputs.shape != before.shape or float(np.abs(case.inputs - before).max()) > TOLERANCE:
            raise ReleaseInvalid(
                f"{ARRAYS}: this package preprocesses {name} otherwise than the one that made the release. Install the "
                "version that the manifest names.",
                ARRAYS,
            )
        found = answer(study, case, arrays[f"{name}/logits"], temperatures)
        stored = arrays[f"{name}/decisions"].astype(bool)
        if stored.shape != found.decisions.shape or ((stored != found.decisions) & ~found.near).any():
            raise ReleaseInvalid(
                f"{ARRAYS}: this package post-processes {name} otherwise. Install its version.", ARRAYS
            )
        cases.append(case)
        answers.append(found)
    return cases, answers
