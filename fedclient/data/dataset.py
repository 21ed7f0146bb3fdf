"""Each case preprocessed once and kept on disk; batches of examples from there.

The truth of an example is a mask, for a task that answers image by image a vector (fedclient/data/truths.py), or a
table of lesions (fedclient/data/lesions.py).
Masks in batches are as the files have them: 0 background, k = the study's labels[k - 1], 127 = ignore, which the loss
and the metrics leave out. With `labels = ["lung"]` a mask may hold 0, 1 and 127 (PNG: also 255, read as 1), nothing
else: a 2 would mean that this mask was drawn for another study, and is refused.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedclient.data.bags import padded_bags
from fedclient.data.cache import Stored, in_memory, open_case, plan_digest
from fedclient.data.cases import Case, state_of
from fedclient.data.lesions import padded
from fedclient.data.making import Maker, making
from fedclient.data.manifest import Progress, usable
from fedclient.data.patches import Patches
from fedclient.data.quota import GIB, QUOTA_GIB, Room, expect, used
from shared_models.errors import ImageUnreadable, ManifestInvalid
from shared_models.files import private_folder
from shared_models.preprocess import Geometry
from shared_models.study import Augment, Study

if TYPE_CHECKING:  # torch
    from fedclient.data.augment import Change

MEMORY_BYTES = 1024**3  # a smaller data set is held in memory, a larger one is mapped from its files
FOREGROUND = 0.33  # of the patches, where the study says nothing (Isensee et al. 2021: a third)
MOST_TRIES = 5  # to make a file that is gone again at once: another process makes room for another plan
NO_AUGMENT = Augment()
Images: TypeAlias = NDArray[np.float16] | NDArray[np.float32]


class Batch(NamedTuple):
    """Images [B, C, *size], float16 as they are kept or float32 once augmented, and the truth of each.

    The truth is uint8[B, *size] masks, uint8[B, labels] classes, float32[B, 2] follow-up, or float32[B, M, 1 + 2 D]
    lesions. Of a network that sees a table alone the images are [B, covariates]. `change` is what is still to be done
    to images and truth, on the device that trains.
    """

    images: Images
    masks: NDArray[Any]
    change: "Change | None" = None


class CaseExamples(NamedTuple):
    """One case for evaluation: float32[N, C, *size], the truth of each example, and the way back to its own grid.

    Where patches are trained on, these are of the whole image. `native` is on the image's own grid: the mask
    uint8[I, J, K] where the study measures surfaces in mm, or the lesions float32[n, 7] in voxels.
    """

    key: str
    images: NDArray[np.float32]
    masks: NDArray[Any]
    geometry: Geometry
    native: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class DataSet:
    """The examples of some cases, usually of one split; `len` counts examples, not cases.

    An example is a plane or a volume; or, where `patches` are drawn, one of so many as cover it. `lesions`: the truth
    is tables of them.
    """

    cases: tuple[Stored, ...]
    patches: Patches | None = None
    lesions: bool = False

    def __len__(self) -> int:
        return sum(self._examples(case) for case in self.cases)

    def _examples(self, case: Stored) -> int:
        return len(case.masks) * self._each(case)

    def _ends(self) -> NDArray[np.intp]:
        return np.cumsum([self._examples(case) for case in self.cases], dtype=np.intp)

    def _each(self, case: Stored) -> int:
        """Examples of a plane or volume of the case."""
        return 1 if self.patches is None else self.patches.of_plane(case)

    def batches(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        augment: Augment = NO_AUGMENT,
        ahead: bool = False,
        later: bool = False,
        fewest: int = 1,
    ) -> Iterator[Batch]:
        """Shuffled batches of whole `epochs` (the last of each may be short), or `steps` full ones from an endless
        reshuffled stream. All chance is `rng`'s, which belongs to this iterator until it ends.

        Args:
            ahead: make the next batch in a thread while the caller works on this one. The batches are the same. It
                pays where the caller waits for a GPU, not on a CPU, where two pools of threads get in each other's way
                (117 -> 145 ms a step).
            later: leave it to the caller to augment, by each batch's `change`: a GPU does in one millisecond what takes
                a core fifty.
            fewest: examples of a batch; a last one of less is filled up with the first of its epoch.

        Raises:
            ManifestInvalid: there are no examples.
        """
        if not len(self):
            raise ManifestInvalid("there is no case to train on. Give some rows of the manifest `split` = train.")
        if epochs is not None and steps is None:
            order = _epochs(len(self), batch_size, epochs, rng, fewest)
        elif steps is not None and epochs is None:
            order = _steps(len(self), batch_size, steps, rng)
        else:
            raise TypeError("batches() takes epochs or steps, one of the two")
        batches = (self.take(chosen, rng, augment, later) for chosen in order)
        return _ahead(batches) if ahead else batches

    def places(self) -> dict[str, NDArray[np.intp]]:
        """Key of a case -> where its examples stand, for `take`."""
        ends = self._ends()
        return {c.key: np.arange(end - self._examples(c), end) for c, end in zip(self.cases, ends, strict=True)}

    def by_case(self) -> Iterator[CaseExamples]:
        """Each case whole and unaugmented, in the order of keys."""
        for case in self.cases:
            native = None if case.native is None else np.array(case.native)
            yield CaseExamples(case.key, case.images.astype(np.float32), np.array(case.masks), case.geometry, native)

    def take(
        self, chosen: NDArray[np.intp], rng: np.random.Generator, augment: Augment = NO_AUGMENT, later: bool = False
    ) -> Batch:
        """The examples at some places as a batch, augmented; or, `later`, with the way to augment it."""
        ends = self._ends()
        of = np.searchsorted(ends, chosen, side="right")
        before = np.concatenate([[0], ends])
        places = [
            (self.cases[c], int(n - before[c]) // self._each(self.cases[c])) for c, n in zip(of, chosen, strict=True)
        ]
        if self.patches is None:
            examples = [case.images[n] for case, n in places]
            alike = len({example.shape for example in examples}) == 1
            images = np.stack(examples) if alike else padded_bags(examples)  # nothing but bags differs in size
            of_each = [case.masks[n] for case, n in places]
            masks: NDArray[Any] = padded(of_each, images.ndim - 2) if self.lesions else np.stack(of_each)
        else:
            images, masks = self.patches.batch(places, rng)
        if augment == NO_AUGMENT:
            return Batch(images, masks)
        from fedclient.data.augment import Change, draw, move_lesions  # torch

        drawn = draw(augment, len(images), images.ndim - 2, rng)
        axes = np.array([case.left_right_axis for case, _ in places], dtype=np.intp)
        if self.lesions:
            masks = move_lesions(masks, images.shape[2:], axes, drawn)
        with_masks = not self.lesions and masks.ndim == images.ndim - 1  # classes stay what they are, however it moves
        change = Change(axes, drawn, rng.spawn(1)[0] if later else rng, with_masks)
        return Batch(images, masks, change) if later else Batch(*change.of_arrays(images, masks))


def prepare(
    cases: Sequence[Case],
    study: Study,
    cache: Path,
    progress: Progress | None = None,
    *,
    quota_bytes: int = int(QUOTA_GIB * GIB),
    processes: int = 1,
    in_all: int = 0,
) -> DataSet:
    """Preprocesses the cases that are not in `cache` yet, or whose files have changed since, and opens all.

    Several processes may do so at once, also for the same cases.

    Args:
        processes: that share the work where there is much of it.
        in_all: cases that the run will have in the cache, those of other splits too; at least `cases`.

    Raises:
        ImageUnreadable: images or masks that cannot be used, by their rows; the others are kept in the cache.
        OrderRefused: `CACHE_FULL`: they do not fit.
        StateInvalid: the cache cannot be written.
        ProcessFailed: one of the processes died.
    """
    folder = cache / plan_digest(study)
    private_folder(folder)
    room = Room(cache, folder.name, quota_bytes)
    older: dict[str, list[Path]] = {}
    for path in cache.glob("*/*.safetensors"):
        older.setdefault(path.name.partition("-")[0], []).append(path)
    ordered = sorted(cases, key=lambda case: case.key)
    stored: list[Stored] = []
    sizes: list[int] = []
    with making(ordered, study, room, processes) as make:
        for case in usable(ordered, lambda case: _prepared(case, folder, older.get(case.key, []), make), progress):
            stored.append(case)
            sizes.append(case.images.nbytes + case.masks.nbytes)
            expect(room, sizes, max(in_all, len(ordered)))
    if sum(sizes) < MEMORY_BYTES:
        stored = [in_memory(case) for case in stored]
    drawn = FOREGROUND if study.train.foreground is None else study.train.foreground
    lesions = study.task.kind == "detection"
    patches = Patches(study.preprocess.size, drawn, lesions) if study.preprocess.fit == "patches" else None
    return DataSet(tuple(stored), patches, lesions)


def _prepared(case: Case, folder: Path, older: Sequence[Path], make: Maker) -> Stored:
    source = state_of(case)
    path = folder / f"{case.key}-{source}.safetensors"
    stored = open_case(path, case.key)
    for _ in range(MOST_TRIES):
        if stored is not None:
            break
        make(case, path)
        for old in older:
            if not old.stem.endswith(source):  # of any plan: the files it was made from are gone
                old.unlink(missing_ok=True)
        stored = open_case(path, case.key)
    if stored is None:
        raise ImageUnreadable("its cache file cannot be read back. Is the disk full or broken?")
    used(path)
    return stored


def _epochs(
    examples: int, batch_size: int, epochs: int, rng: np.random.Generator, fewest: int
) -> Iterator[NDArray[np.intp]]:
    for _ in range(epochs):
        order = rng.permutation(examples)
        for begin in range(0, examples, batch_size):
            chosen = order[begin : begin + batch_size]
            yield np.concatenate([chosen, order[: max(0, fewest - len(chosen))]])


def _steps(examples: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    left = np.empty(0, dtype=np.intp)
    for _ in range(steps):
        while len(left) < batch_size:
            left = np.concatenate([left, rng.permutation(examples)])
        yield left[:batch_size]
        left = left[batch_size:]


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, the next one made meanwhile; who stops early waits for one batch at most."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
