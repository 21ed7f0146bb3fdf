"""One image through a released network: what is marked on its own grid, what is likely, how large, and what is odd."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case
from fedclient.data.volume import Volume, left_right_axis
from fedclient.predict.blocks import Grid, grid_of, is_picture, opened
from fedclient.predict.doubts import Doubt, doubts_of
from fedclient.predict.inputs import Source, source_of
from fedclient.predict.measure import Measure, Part
from fedclient.predict.model import Model
from fedclient.predict.planes import Bytes, Marks
from fedclient.predict.uncertainty import Variant, entropy, variants
from fedclient.windows import moved
from shared_models.calibration import tempered
from shared_models.drift import LARGER_MM3, cells_of, grids, levels
from shared_models.errors import ImageUnreadable, StudyInvalid
from shared_models.preprocess import preprocess, restore
from shared_models.study import Study
from shared_models.tasks.decide import chances_of, predicted_of

NOBODY = Case("", "", (), None, "test")  # of a volume that was handed in
LOOKED_AT = 32  # planes of a series that comes in runs, from which its grey values are told


@dataclass(frozen=True, slots=True)
class Answer:
    """What a network says of one answer of its task.

    Attributes:
        chance: of a classification, calibrated; of a segmentation the mean over what is marked, 0 where nothing is;
            of a prognosis that the event has come by the end of the last interval.
        called: whether it is marked anywhere, or the image shows it; of a prognosis whether it is likelier than not.
            By probabilities before calibration, to which the study's threshold belongs.
        volume_mm3, parts: of a segmentation; its connected parts, the largest first.
        by_day: of a prognosis: day -> probability that the event has come by then.
    """

    name: str
    chance: float
    called: bool
    volume_mm3: float | None = None
    parts: tuple[Part, ...] = ()
    by_day: Mapping[float, float] = field(default_factory=dict)

    @property
    def longest_mm(self) -> float | None:
        """Longest diameter in an axial plane of any part; None of what is not marked."""
        return max((part.longest_mm for part in self.parts), default=None)


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Entropy of the mean answer: 0 is sure, 1 is as unsure as can be.

    Attributes:
        variants: which changes of the picture were answered.
        mean: over the image; `inside`: over what is marked, None where nothing is.
        planes: uint8[I, J] for each k, 255 for 1; of a segmentation.
    """

    variants: tuple[str, ...]
    mean: float
    inside: float | None = None
    planes: Bytes | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class KeyPlane:
    """The plane in which most is marked, else the middle one: k, and float32[I, J] as read."""

    k: int
    voxels: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        source: None for a volume that was handed in.
        answers: in the task's order.
        marks: bool[answers, I, J] for each plane k, on the image's own grid; None where the task marks nothing.
        measures: of each answer that is marked, for numbering its parts.
        places: of each answer the plane k in which most of it is marked, or in which it is likeliest; 0 where nothing
            is, and of a class that a network tells of a whole volume.
        cells: where the image lies on the grids of `shared_models.drift`.
        doubts: why the answer may not hold for this image, each with a code.
    """

    model: Model = field(repr=False)
    source: Source | None = field(repr=False)
    grid: Grid
    answers: tuple[Answer, ...]
    marks: Marks | None = field(repr=False)
    measures: tuple[Measure, ...] = field(repr=False)
    places: tuple[int, ...]
    key: KeyPlane = field(repr=False)
    cells: Mapping[str, int] = field(repr=False)
    doubts: tuple[Doubt, ...]
    uncertainty: Uncertainty | None
    seconds: float

    @property
    def mask(self) -> NDArray[np.uint8]:
        """uint8[I, J, K]: 0, or n + 1 where answer n is marked; a region lies over those that hold it."""
        if self.marks is None:
            raise StudyInvalid(f"{self.model.study.name}: a {self.model.study.task.kind} marks no voxels.")
        order = painting_order(self.model.study)
        return np.stack([self.marks.label_plane(k, order) for k in range(len(self.marks))], axis=2)


def painting_order(study: Study) -> list[int]:
    """Answers from the one of most parts to the one of fewest: a tumour's core is painted over the whole tumour."""
    parts = [len(region.parts) for region in study.task.regions] or [1] * len(study.task.answers)
    return sorted(range(len(parts)), key=lambda n: -parts[n])


def predict_case(model: Model, image: Source | Path | Volume, *, uncertainty: bool = False) -> Prediction:
    """What `model` says of one image: a source, the path of a file or of a folder with one image, or a volume.

    Raises:
        ImageUnreadable: it cannot be read, or not for this study; its `code` says why.
    """
    began = time.perf_counter()
    study = model.study
    if study.table_only:
        raise StudyInvalid(f"{study.name}: its network sees a table and no image. Give tables to `fedclient predict`.")
    source = image if isinstance(image, Source) else None
    if isinstance(image, Path):
        source = source_of(image, study)
    if source is None:
        assert isinstance(image, Volume)
        grid, runs = grid_of(image), iter([image])
    else:
        known, runs = opened(source, study)
        first = None
        if known is None:
            first = next(runs)
            known, runs = grid_of(first, is_picture(source)), iter([first])
        grid = known
    tally = _Tally(model, grid, uncertainty)
    for volume in runs:
        _check(volume, study)
        tally.add(volume)
    return tally.prediction(source, began)


def _check(volume: Volume, study: Study) -> None:
    wanted = max(1, len(study.channels))
    if len(volume.voxels) != wanted:
        raise ImageUnreadable(
            f"the image has {len(volume.voxels)} channels, the network sees {wanted}.", "MODALITY_MISMATCH"
        )


class _Tally:
    """What is kept of an image while its planes come in runs."""

    def __init__(self, model: Model, grid: Grid, uncertain: bool) -> None:
        self.model, self.grid, self.task = model, grid, model.study.task
        i, j, k = grid.shape
        names = self.task.answers
        segments = self.task.kind == "segmentation"
        self.marks = Marks((len(names), i, j)) if segments else None
        self.measures = tuple(Measure(grid.spacing_mm) for _ in names) if segments else ()
        self.unsure = Bytes((i, j)) if segments and uncertain else None
        self.variants = variants(model.study, left_right_axis(grid.affine_ras)) if uncertain else ()
        self.entropy, self.inside, self.inside_voxels = 0.0, 0.0, 0
        self.seen = 0
        self.raw_chance, self.marked_chance = np.zeros(len(names)), np.zeros(len(names))  # sums over what is marked
        self.levels = np.zeros((len(names), len(levels(model.study)) + 1), np.int64)  # of what is marked, by grey level
        self.raw: list[NDArray[np.float32]] = []  # of a classification or prognosis, by example; before calibration
        self.chances: list[NDArray[np.float32]] = []
        self.mean_chances: list[NDArray[np.float32]] = []
        self.key: KeyPlane | None = None
        self.most = -1
        self.places, self.peaks = [0] * len(names), [0.0] * len(names)
        self.stride = max(1, k // LOOKED_AT)
        self.looked: list[Volume] = []
        self.examples: list[NDArray[Any]] = []

    def add(self, volume: Volume) -> None:
        study = self.model.study
        examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
        logits = moved(self.model.through, examples.images, study, self.model.planes)
        self._look(volume, examples.images)
        if self.marks is None:
            self.raw.append(chances_of(self.task, logits))
            self.chances.append(chances_of(self.task, self._tempered(logits)))
            self._see_places(self.chances[-1].T)
            if self.variants:
                self.mean_chances.append(self._mean(examples.images))
        else:
            chances = restore(chances_of(self.task, logits), examples.geometry)
            marked = predicted_of(self.task, chances[None], study.evaluate.threshold)[0]
            self._inside(marked, chances, self.raw_chance)
            if self.model.temperatures is None:
                self.marked_chance = self.raw_chance
            else:
                calibrated = restore(chances_of(self.task, self._tempered(logits)), examples.geometry)
                self._inside(marked, calibrated, self.marked_chance)
            self._count(marked, volume.voxels[0])
            self._see_key(volume, marked)
            if self.variants:
                self._unsure(entropy(restore(self._mean(examples.images), examples.geometry), self.task.exclusive),
                             marked)  # fmt: skip
        self.seen += volume.voxels.shape[3]

    def prediction(self, source: Source | None, began: float) -> Prediction:
        if self.seen != self.grid.shape[2]:
            raise ImageUnreadable("DICOM: fewer slices could be read than the series has.", "SERIES_GAP")
        answers = self._told(self.chances) if self.marks is None else self._segmented(self.marked_chance)
        raw = self._told(self.raw) if self.marks is None else self._segmented(self.raw_chance)
        # called is what the run's own test called, whose sensitivity stands on the card: by uncalibrated probabilities
        answers = tuple(replace(each, called=as_tested.called) for each, as_tested in zip(answers, raw, strict=True))
        look, cells = self._cells(raw)
        if self.key is None:
            self.key = self._middle(look)
        return Prediction(
            model=self.model,
            source=source,
            grid=self.grid,
            answers=answers,
            marks=self.marks,
            measures=self.measures,
            places=tuple(self.places),
            key=self.key,
            cells=cells,
            doubts=doubts_of(self.model, NOBODY if source is None else source.case, look, cells, self.grid.picture),
            uncertainty=self._uncertainty(),
            seconds=time.perf_counter() - began,
        )

    def _tempered(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return tempered(logits, self.model.temperatures)

    def _mean(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """The mean of the calibrated answers to every variant of the examples."""
        total = np.zeros((), np.float32)
        for each in self.variants:
            total = total + self._answered(images, each)
        mean: NDArray[np.float32] = total / np.float32(len(self.variants))
        return mean

    def _answered(self, images: NDArray[Any], variant: Variant) -> NDArray[np.float32]:
        study = self.model.study
        logits = moved(self.model.through, variant.change(images), study, self.model.planes)
        chances = chances_of(self.task, self._tempered(logits))
        return variant.back(chances) if self.marks is not None else chances

    def _look(self, volume: Volume, images: NDArray[Any]) -> None:
        """Keeps all of an image that comes in one run, and planes at even distances of one that comes in several."""
        if volume.voxels.shape[3] == self.grid.shape[2]:
            self.looked.append(volume)
            self.examples.append(images)
            return
        there = slice(-self.seen % self.stride, None, self.stride)
        # copies, also of none: a view would keep the whole run
        self.looked.append(replace(volume, voxels=volume.voxels[..., there].copy()))
        self.examples.append(images[there].copy())

    def _inside(self, marked: NDArray[np.bool_], chances: NDArray[np.float32], to: NDArray[np.float64]) -> None:
        """Adds up the probability of what is marked."""
        answers = chances[1:] if self.task.exclusive else chances
        for n in range(len(marked)):
            to[n] += float(answers[n][marked[n]].sum(dtype=np.float64))

    def _count(self, marked: NDArray[np.bool_], grey: NDArray[np.float32]) -> None:
        assert self.marks is not None
        self.marks.add(marked)
        for n, measure in enumerate(self.measures):
            at = np.searchsorted(levels(self.model.study), grey[marked[n]], side="right")
            self.levels[n] += np.bincount(at, minlength=self.levels.shape[1])
            for k in range(marked.shape[3]):
                measure.add(marked[n, ..., k])

    def _see_key(self, volume: Volume, marked: NDArray[np.bool_]) -> None:
        self._see_places(marked.sum(axis=(1, 2), dtype=np.float64))
        areas = marked.sum(axis=(0, 1, 2))
        k = int(areas.argmax())
        if areas[k] > max(self.most, 0):
            self.most, self.key = int(areas[k]), KeyPlane(self.seen + k, volume.voxels[0, :, :, k].copy())
        middle = self.grid.shape[2] // 2
        if self.key is None and self.seen <= middle < self.seen + len(areas):
            self.key = KeyPlane(middle, volume.voxels[0, :, :, middle - self.seen].copy())

    def _see_places(self, strength: NDArray[np.floating[Any]]) -> None:
        """Of each answer how much of it there is in each plane of a run: [answers, planes]."""
        for n, planes in enumerate(strength[: len(self.places)]):
            k = int(planes.argmax())
            if planes[k] > self.peaks[n]:
                self.places[n], self.peaks[n] = self.seen + k, float(planes[k])

    def _middle(self, look: Volume) -> KeyPlane:
        """Of what was looked at."""
        at = look.voxels.shape[3] // 2
        step = 1 if len(self.looked) == 1 else self.stride
        return KeyPlane(at * step, look.voxels[0, :, :, at].copy())

    def _unsure(self, spread: NDArray[np.float32], marked: NDArray[np.bool_]) -> None:
        assert self.unsure is not None
        self.unsure.add(np.rint(spread * 255).astype(np.uint8))
        anywhere = marked.any(axis=0)
        self.entropy += float(spread.sum(dtype=np.float64))
        self.inside += float(spread[anywhere].sum(dtype=np.float64))
        self.inside_voxels += int(anywhere.sum())

    def _uncertainty(self) -> Uncertainty | None:
        if not self.variants:
            return None
        names = tuple(each.name for each in self.variants)
        if self.marks is None:
            mean = np.concatenate(self.mean_chances).mean(axis=0, dtype=np.float64)
            exclusive = self.task.exclusive
            return Uncertainty(names, float(entropy(mean.astype(np.float32)[:, None], exclusive).mean()))
        inside = self.inside / self.inside_voxels if self.inside_voxels else None
        return Uncertainty(names, self.entropy / float(np.prod(self.grid.shape)), inside, self.unsure)

    def _segmented(self, sums: NDArray[np.float64]) -> tuple[Answer, ...]:
        found = []
        for n, name in enumerate(self.task.answers):
            measure = self.measures[n]
            chance = sums[n] / measure.voxels if measure.voxels else 0.0
            parts = measure.parts
            found.append(Answer(name, float(chance), measure.voxels > 0, measure.volume_mm3, parts))
        return tuple(found)

    def _told(self, by_example: list[NDArray[np.float32]]) -> tuple[Answer, ...]:
        chances = np.concatenate(by_example).astype(np.float64)
        if self.task.kind == "prognosis":
            came = 1 - np.cumprod(1 - chances, axis=1).mean(axis=0)
            by_day = dict(zip(map(float, self.task.intervals_days), came.tolist(), strict=True))
            return (Answer(self.task.labels[0], float(came[-1]), bool(came[-1] > 0.5), by_day=by_day),)
        mean = chances.mean(axis=0)
        called = mean > self.model.study.evaluate.threshold
        if self.task.exclusive:
            called = np.arange(len(mean)) == mean.argmax()
        return tuple(Answer(name, float(mean[n]), bool(called[n])) for n, name in enumerate(self.task.answers))

    def _cells(self, answers: tuple[Answer, ...]) -> tuple[Volume, Mapping[str, int]]:
        """What was looked at as one volume, and where the case lies; of a series in runs counted anew what depends on
        all its planes."""
        study, first = self.model.study, self.looked[0]
        if len(self.looked) == 1:
            look = first
        else:
            voxels = np.concatenate([each.voxels for each in self.looked], axis=3)
            look = Volume(voxels, self.grid.affine_ras, first.modality, first.provenance, self.grid.voxel_of_pixel)
        several = np.concatenate(self.examples)
        marked = None
        if self.marks is not None:
            nothing = np.zeros((len(answers), 1, 1, 1), np.bool_)
            marked = self.marks.whole if len(self.looked) == 1 else nothing  # counted below
        chances = [answer.chance for answer in answers]
        cells = dict(cells_of(study, look.voxels, self.grid.spacing_mm, several, chances, marked))
        if len(self.looked) > 1:
            edges, planes_there = grids(study), self.grid.shape[2]
            true = {"size.planes": float(planes_there)}
            for answer, measure in zip(answers, self.measures, strict=True):
                true[f"share.{answer.name}"] = measure.voxels / float(np.prod(self.grid.shape))
                true[f"lesions.{answer.name}"] = float(sum(p.volume_mm3 >= LARGER_MM3 for p in answer.parts))
            cells |= {name: int(np.searchsorted(edges[name], value, side="right")) for name, value in true.items()}
            for answer, measure, counts in zip(answers, self.measures, self.levels, strict=False):
                cells[f"inside.{answer.name}"] = int((counts.cumsum() <= (measure.voxels - 1) // 2).sum())
        return look, cells
