"""Merkle trees over a growing list of lines, as in RFC 6962 section 2.1: a root, and proofs that a list only grew."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

EMPTY = hashlib.sha256().digest()


def leaf_hash(line: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + line).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class Tree:
    """The hashes of every complete subtree: level k holds those over 2**k leaves, from the first leaf on."""

    levels: list[list[bytes]] = field(default_factory=lambda: [[]])

    @property
    def size(self) -> int:
        return len(self.levels[0])

    def append(self, line: bytes) -> None:
        made, level = leaf_hash(line), 0
        while True:
            if level == len(self.levels):
                self.levels.append([])
            self.levels[level].append(made)
            if len(self.levels[level]) % 2:
                return
            made, level = node_hash(*self.levels[level][-2:]), level + 1

    def root(self, size: int | None = None) -> bytes:
        """MTH of the first `size` leaves (all, if nothing is said)."""
        size = self.size if size is None else size
        return self._hash(0, size) if size else EMPTY

    def consistency(self, older: int, size: int | None = None) -> list[bytes]:
        """PROOF(older, D[size]) of RFC 6962 section 2.1.2; empty for 0 and for `size` itself."""
        size = self.size if size is None else size
        return self._subproof(older, 0, size, True) if 0 < older < size else []

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """PATH(index, D[size]) of RFC 6962 section 2.1.1: the hashes beside the way from a leaf to the root."""
        size = self.size if size is None else size
        return self._path(index, 0, size)

    def _path(self, index: int, begin: int, end: int) -> list[bytes]:
        if end - begin == 1:
            return []
        split = begin + _split(end - begin)
        if index < split:
            return [*self._path(index, begin, split), self._hash(split, end)]
        return [*self._path(index, split, end), self._hash(begin, split)]

    def _hash(self, begin: int, end: int) -> bytes:
        """Of leaves `begin` to `end`; `begin` is a multiple of the power of two that splits the range above it."""
        count = end - begin
        level = count.bit_length() - 1
        if count == 1 << level:
            return self.levels[level][begin >> level]
        split = begin + _split(count)
        return node_hash(self._hash(begin, split), self._hash(split, end))

    def _subproof(self, older: int, begin: int, end: int, whole: bool) -> list[bytes]:
        count = end - begin
        if older == count:
            return [] if whole else [self._hash(begin, end)]
        split = _split(count)
        if older <= split:
            return [*self._subproof(older, begin, begin + split, whole), self._hash(begin + split, end)]
        return [*self._subproof(older - split, begin + split, end, False), self._hash(begin, begin + split)]


def _split(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)


def holds(line: bytes, index: int, size: int, root: bytes, path: Sequence[bytes]) -> bool:
    """Whether `path` shows that leaf `index` of the list of `size` leaves is `line` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        return False
    found, at, last = leaf_hash(line), index, size - 1
    for part in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node_hash(part, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, part)
        at, last = at >> 1, last >> 1
    return last == 0 and found == root


def grew(older: int, older_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the list of `size` leaves begins with that of `older` (RFC 9162, 2.1.4.2)."""
    if older == 0:
        return not proof and (size > 0 or root == EMPTY)
    if older == size:
        return not proof and older_root == root
    if not older < size or not proof:
        return False
    parts = list(proof) if older & (older - 1) else [older_root, *proof]
    first, last = older - 1, size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    left = right = parts[0]
    for part in parts[1:]:
        if last == 0:
            return False
        if first & 1 or first == last:
            left, right = node_hash(part, left), node_hash(part, right)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            right = node_hash(right, part)
        first, last = first >> 1, last >> 1
    return left == older_root and right == root and last == 0
