"""Each case preprocessed once and kept on disk; batches of examples from there.

Masks in batches are as the files have them: 0 background, k = the study's labels[k - 1], 127 = ignore, which the loss
and the metrics leave out. With `labels = ["lung"]` a mask may hold 0, 1 and 127 (PNG: also 255, read as 1), nothing
else: a 2 would mean that this mask was drawn for another study, and is refused.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedclient.data.cases import Case, read_case, read_case_labels, state_of
from fedclient.data.images import is_picture
from fedclient.data.manifest import Progress, usable
from shared_models.errors import ImageUnreadable, ManifestInvalid, StateInvalid
from shared_models.files import canonical_json, write_atomic
from shared_models.parse import plain
from shared_models.preprocess import Geometry, geometry_from, preprocess, preprocess_labels
from shared_models.study import Augment, Study

FORMAT = 2  # of the cache files: raise it when readers or preprocessing change what they give
MEMORY_BYTES = 1024**3  # a smaller data set is held in memory, a larger one is mapped from its files
NO_AUGMENT = Augment()


class Batch(NamedTuple):
    """float32[B, C, *size] and uint8[B, *size]."""

    images: NDArray[np.float32]
    masks: NDArray[np.uint8]


class CaseExamples(NamedTuple):
    """One case for evaluation: float32[N, C, *size], uint8[N, *size], and the way back to its own grid."""

    key: str
    images: NDArray[np.float32]
    masks: NDArray[np.uint8]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Stored:
    """One case as the cache holds it.

    Attributes:
        images: float16[N, C, *size], in memory or mapped.
        masks: uint8[N, *size].
        left_right_axis: 0 where rows run between the patient's left and right, 1 where columns do.
    """

    key: str
    images: NDArray[np.float16]
    masks: NDArray[np.uint8]
    geometry: Geometry
    left_right_axis: int


@dataclass(frozen=True, slots=True)
class DataSet:
    """The examples of some cases, usually of one split; `len` counts examples (planes or volumes), not cases."""

    cases: tuple[Stored, ...]

    def __len__(self) -> int:
        return sum(len(case.masks) for case in self.cases)

    def batches(
        self,
        batch_size: int,
        rng: np.random.Generator,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        augment: Augment = NO_AUGMENT,
        ahead: bool = False,
    ) -> Iterator[Batch]:
        """Shuffled batches of whole `epochs` (the last of each may be short), or `steps` full ones from an endless
        reshuffled stream. All chance is `rng`'s, which belongs to this iterator until it ends.

        Args:
            ahead: make the next batch in a thread while the caller works on this one. The batches are the same. It
                pays where the caller waits for a GPU (54 -> 32 ms a step of 30 ms with full augmentation at 256x256),
                not on a CPU, where two pools of threads get in each other's way (117 -> 145 ms).

        Raises:
            ManifestInvalid: there are no examples.
        """
        if not len(self):
            raise ManifestInvalid("there is no case to train on. Give some rows of the manifest `split` = train.")
        if epochs is not None and steps is None:
            order = _epochs(len(self), batch_size, epochs, rng)
        elif steps is not None and epochs is None:
            order = _steps(len(self), batch_size, steps, rng)
        else:
            raise TypeError("batches() takes epochs or steps, one of the two")
        ends = np.cumsum([len(case.masks) for case in self.cases])
        batches = (self._batch(chosen, ends, augment, rng) for chosen in order)
        return _ahead(batches) if ahead else batches

    def by_case(self) -> Iterator[CaseExamples]:
        """Each case whole and unaugmented, in the order of keys."""
        for case in self.cases:
            yield CaseExamples(case.key, case.images.astype(np.float32), np.array(case.masks), case.geometry)

    def _batch(
        self, chosen: NDArray[np.intp], ends: NDArray[np.intp], augment: Augment, rng: np.random.Generator
    ) -> Batch:
        of = np.searchsorted(ends, chosen, side="right")
        places = [(self.cases[c], int(n - ends[c])) for c, n in zip(of, chosen, strict=True)]  # from the case's end
        images = np.stack([case.images[n] for case, n in places]).astype(np.float32)
        masks = np.stack([case.masks[n] for case, n in places])
        if augment == NO_AUGMENT:
            return Batch(images, masks)
        from fedclient.data.augment import apply, draw  # torch

        drawn = draw(augment, len(images), images.ndim - 2, rng)
        axes = np.array([case.left_right_axis for case, _ in places], dtype=np.intp)
        return Batch(*apply(images, masks, axes, drawn, rng))


def prepare(cases: Sequence[Case], study: Study, cache: Path, progress: Progress | None = None) -> DataSet:
    """Preprocesses the cases that are not in `cache` yet, or whose files have changed since, and opens all.

    Raises:
        ImageUnreadable: images or masks that cannot be used, by their rows; the others are kept in the cache.
        StateInvalid: the cache cannot be written.
    """
    folder = cache / _plan_digest(study)
    for made in (cache, folder):
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
    older: dict[str, list[Path]] = {}
    for path in cache.glob("*/*.safetensors"):
        older.setdefault(path.name.partition("-")[0], []).append(path)
    ordered = sorted(cases, key=lambda case: case.key)
    stored = list(usable(ordered, lambda case: _prepared(case, study, folder, older.get(case.key, [])), progress))
    if sum(case.images.nbytes + case.masks.nbytes for case in stored) < MEMORY_BYTES:
        stored = [_in_memory(case) for case in stored]
    return DataSet(tuple(stored))


def _prepared(case: Case, study: Study, folder: Path, older: Sequence[Path]) -> Stored:
    source = state_of(case)
    path = folder / f"{case.key}-{source}.safetensors"
    stored = _open(path, case.key)
    if stored is None:
        made = _made(case, study)
        try:
            write_atomic(path, made)
        except OSError as e:
            raise StateInvalid(
                f"{folder}: cannot be written ({e.strerror}). Free some space, or move the cache."
            ) from None
        for old in older:
            if not old.stem.endswith(source):  # of any plan: the files it was made from are gone
                old.unlink(missing_ok=True)
        stored = _open(path, case.key)
        if stored is None:
            raise ImageUnreadable("its cache file cannot be read back. Is the disk full or broken?")
    return stored


def _made(case: Case, study: Study) -> bytes:
    """The cache file of one case."""
    volume = read_case(case, study.channels)
    if study.preprocess.spacing_mm is not None and is_picture(case.channels[0].files[0]):
        raise ImageUnreadable("PNG and JPEG state no pixel size, so spacing_mm cannot be met. Use fit = letterbox")
    labels = read_case_labels(case, volume, study.task.labels)
    examples = preprocess(volume.voxels, volume.spacing_mm, study.preprocess)
    facts = {
        "geometry": examples.geometry.plain(),
        "left_right_axis": volume.left_right_axis,
    }
    tensors: dict[str, NDArray[Any]] = {
        "images": examples.images.astype(np.float16),
        "masks": preprocess_labels(labels, examples.geometry),
    }
    return save(tensors, metadata={"case": json.dumps(facts)})


def _open(path: Path, key: str) -> Stored | None:
    """The case mapped from its cache file; None if there is no such file, or no whole one."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
        (length,) = struct.unpack("<Q", content[:8].tobytes())
        header = json.loads(content[8 : 8 + length].tobytes())
        facts = json.loads(header["__metadata__"]["case"])
        images = _view(content[8 + length :], header["images"], np.float16)
        masks = _view(content[8 + length :], header["masks"], np.uint8)
        geometry = geometry_from(facts["geometry"])
        return Stored(key, images, masks, geometry, facts["left_right_axis"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def _view(data: NDArray[np.uint8], entry: dict[str, Any], kind: type[Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    view: NDArray[Any] = data[begin:end].view(kind).reshape(entry["shape"])
    return view


def _in_memory(case: Stored) -> Stored:
    images, masks = np.array(case.images), np.array(case.masks)
    return Stored(case.key, images, masks, case.geometry, case.left_right_axis)


def _plan_digest(study: Study) -> str:
    """Of all that a cached case depends on beside its files."""
    return sha256(canonical_json([FORMAT, plain(study.preprocess), study.channels, study.task.labels])).hexdigest()[:12]


def _epochs(examples: int, batch_size: int, epochs: int, rng: np.random.Generator) -> Iterator[NDArray[np.intp]]:
    for _ in range(epochs):
        order = rng.permutation(examples)
        for begin in range(0, examples, batch_size):
            yield order[begin : begin + batch_size]


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
