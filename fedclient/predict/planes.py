"""Planes of a whole image, kept small: what is marked as bits, what is uncertain as bytes, both packed."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Marks:
    """bool[A, I, J] for each plane k; a thousand planes of 512 x 512 with lungs take 2 MB instead of 262."""

    shape: tuple[int, int, int]  # A, I, J
    packed: list[bytes] = field(repr=False, default_factory=list)

    def add(self, marked: NDArray[np.bool_]) -> None:
        """Planes bool[A, I, J, k], on top of those that are there."""
        for k in range(marked.shape[3]):
            self.packed.append(zlib.compress(np.packbits(marked[..., k]).tobytes(), 1))

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, k: int) -> NDArray[np.bool_]:
        bits = np.frombuffer(zlib.decompress(self.packed[k]), np.uint8)
        return np.unpackbits(bits, count=int(np.prod(self.shape))).astype(np.bool_).reshape(self.shape)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        return (self[k] for k in range(len(self)))

    @property
    def whole(self) -> NDArray[np.bool_]:
        """bool[A, I, J, K]."""
        return np.stack(list(self), axis=3)

    def label_plane(self, k: int, order: Sequence[int]) -> NDArray[np.uint8]:
        """uint8[I, J]: 0, or n + 1 where answer n is marked; of several the one that comes last in `order`."""
        marked = self[k]
        labels = np.zeros(self.shape[1:], np.uint8)
        for n in order:
            labels[marked[n]] = n + 1
        return labels


@dataclass(frozen=True, slots=True)
class Bytes:
    """uint8[I, J] for each plane k."""

    shape: tuple[int, int]
    packed: list[bytes] = field(repr=False, default_factory=list)

    def add(self, values: NDArray[np.uint8]) -> None:
        for k in range(values.shape[2]):
            self.packed.append(zlib.compress(np.ascontiguousarray(values[..., k]).tobytes(), 1))

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, k: int) -> NDArray[np.uint8]:
        return np.frombuffer(zlib.decompress(self.packed[k]), np.uint8).reshape(self.shape)
