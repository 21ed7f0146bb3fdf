"""Volumes and longest diameters of what is marked, plane by plane, so that no whole volume is held."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


@dataclass(frozen=True, slots=True)
class Part:
    """One connected part (over faces) of what is marked.

    Attributes:
        longest_mm: in any one axial plane, from outer face to outer face: the distance of the farthest voxel centres
            and one voxel along it.
        first, last: planes k.
    """

    voxels: int
    volume_mm3: float
    longest_mm: float
    first: int
    last: int


def _integers() -> "array[int]":
    return array("q")


def _lengths() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class Measure:
    """Grows by one plane at a time; `parts` is right once all of them are in.

    Args:
        spacing_mm: of the voxels along I, J, K.
    """

    spacing_mm: tuple[float, float, float]
    voxels: int = 0
    _planes: int = 0
    _below: tuple[NDArray[np.int32], int] | None = None  # the last plane's pieces, from 1, and how many
    # of each piece, packed: a network that marks specks makes hundreds a plane, and as objects they take 100 bytes each
    _root: "array[int]" = field(default_factory=_integers)
    _size: "array[int]" = field(default_factory=_integers)
    _longest: "array[float]" = field(default_factory=_lengths)
    _first: "array[int]" = field(default_factory=_integers)
    _last: "array[int]" = field(default_factory=_integers)
    _begins: list[int] = field(default_factory=list)  # number of the first piece of each plane

    def add(self, plane: NDArray[np.bool_]) -> None:
        """The next plane, bool[I, J]."""
        pieces: Any
        pieces, count = ndimage.label(plane)
        begin = len(self._root)
        self._begins.append(begin)
        if count:
            self.voxels += int(plane.sum())
            sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
            self._root.extend(range(begin, begin + count))
            self._size.extend(sizes.tolist())
            self._first.extend([self._planes] * count)
            self._last.extend([self._planes] * count)
            for n, box in enumerate(ndimage.find_objects(pieces), start=1):
                self._longest.append(longest_mm(pieces[box] == n, self.spacing_mm[:2]))
            if self._below is not None:
                for below, piece in self._touching(pieces, count):
                    self._join(self._begins[-2] + below - 1, begin + piece - 1)
        self._below = (pieces, count) if count else None
        self._planes += 1

    def _touching(self, pieces: NDArray[np.int32], count: int) -> list[list[int]]:
        """Pairs of a piece below and one of this plane that share a pixel."""
        assert self._below is not None
        below, many = self._below
        both = (pieces > 0) & (below > 0)
        pairs = below[both].astype(np.int64) * (count + 1) + pieces[both]
        size = (many + 1) * (count + 1)
        found = np.flatnonzero(np.bincount(pairs, minlength=size)) if size <= pieces.size else np.unique(pairs)
        named: list[list[int]] = np.stack(np.divmod(found, count + 1), axis=1).tolist()
        return named

    @property
    def volume_mm3(self) -> float:
        return self.voxels * float(np.prod(self.spacing_mm))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The largest first."""
        each = float(np.prod(self.spacing_mm))
        return tuple(
            Part(self._size[n], self._size[n] * each, self._longest[n], self._first[n], self._last[n])
            for n in self._roots()
        )

    def numbered(self, k: int, plane: NDArray[np.bool_]) -> NDArray[np.int32]:
        """int32[I, J]: the part, from 1 in the order of `parts`, that each marked pixel of plane k belongs to."""
        pieces: Any
        pieces, count = ndimage.label(plane)
        number = {root: n for n, root in enumerate(self._roots(), start=1)}
        begin = self._begins[k]
        names = np.array([0, *(number[self._find(begin + n)] for n in range(count))], np.int32)
        found: NDArray[np.int32] = names[pieces]
        return found

    def _roots(self) -> list[int]:
        return sorted((n for n, root in enumerate(self._root) if n == root), key=lambda n: (-self._size[n], n))

    def _find(self, n: int) -> int:
        while self._root[n] != n:
            self._root[n] = self._root[self._root[n]]
            n = self._root[n]
        return n

    def _join(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a == b:
            return
        a, b = min(a, b), max(a, b)
        self._root[b] = a
        self._size[a] += self._size[b]
        self._longest[a] = max(self._longest[a], self._longest[b])
        self._first[a] = min(self._first[a], self._first[b])
        self._last[a] = max(self._last[a], self._last[b])


def longest_mm(piece: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> float:
    """The longest way across bool[I, J] with something in it, from outer face to outer face."""
    rows = np.flatnonzero(piece.any(axis=1))
    first = piece[rows].argmax(axis=1)
    last = piece.shape[1] - 1 - piece[rows, ::-1].argmax(axis=1)
    corners = _hull(rows.tolist(), first.tolist()) + _hull(rows.tolist(), last.tolist(), -1)
    ends = np.array(corners, np.float64) * spacing_mm
    if len(rows) == 1 and first[0] == last[0]:
        return float(min(spacing_mm))
    x, y = ends.T
    away = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
    a, b = np.unravel_index(away.argmax(), away.shape)
    farthest = float(np.sqrt(away[a, b]))
    along = np.abs(ends[a] - ends[b]) / farthest
    return farthest + float(np.linalg.norm(along * spacing_mm))


def _hull(rows: list[int], columns: list[int], side: int = 1) -> list[tuple[int, int]]:
    """The corners of one side of a convex hull (Andrew 1979) of one pixel a row, rows rising; -1 for the other side.

    In place of scipy's, which takes longer to import (0.3 s) than it would save.
    """
    found: list[tuple[int, int]] = []
    for r, c in zip(rows, columns, strict=True):
        while len(found) > 1:
            (r0, c0), (r1, c1) = found[-2:]
            if side * ((r1 - r0) * (c - c0) - (c1 - c0) * (r - r0)) > 0:
                break
            found.pop()
        found.append((r, c))
    return found
