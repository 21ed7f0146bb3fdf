"""What all kinds of labels share: structures become label values, overlaps are settled, and a grid becomes another.

A label map is uint8[I, J, K] on its image's grid: 0 background, k the study's k-th label, 127 left out. Nothing is
ever resampled here: two grids either coincide, up to turned, swapped and missing axes and planes, or are refused.
No message holds a path, a name of a structure that a person typed, or an identifier; whoever calls adds the row.
"""

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedclient.data.images import IGNORE
from fedclient.data.volume import LPS_TO_RAS, ON_GRID
from shared_models.errors import ImageUnreadable, StudyInvalid

Labels = NDArray[np.uint8]
Code = Literal["LABEL_GEOMETRY_MISMATCH", "LABEL_VALUES", "LABEL_EMPTY", "LABEL_UNREADABLE", "LABEL_MISSING"]
Overlap = Literal["refuse", "first", "last"]  # who wins a voxel of two structures, in the order of the mapping
Mapped = (
    Mapping[str, int] | Mapping[int, int] | Mapping[str | int, int]
)  # name, number or code of a structure -> label value


@dataclass(frozen=True, slots=True)
class Structure:
    """A segment of a DICOM SEG or a region of an RTSTRUCT.

    Attributes:
        name: as somebody typed it; not for logs.
        codes: what kind of thing it is, as `SCT:10200004`; regions have none.
    """

    number: int
    name: str = field(repr=False)
    codes: tuple[str, ...] = ()


def refused(code: Code, message: str) -> ImageUnreadable:
    return ImageUnreadable(message, code=code)


def as_word(name: str) -> str:
    """A name as studies write it: `Left Lung` as `left-lung`. Letters of all scripts stay, and so do signs: `ki67+` and
    `ki67-` are two things."""
    folded = _folded(name)
    kept = "".join(c if unicodedata.category(c)[0] in "LMNS" else " " for c in folded)
    return "-".join(kept.split()) + "-" * folded.endswith("-")


def meanings(names: Collection[str], known: Mapping[str, int]) -> dict[str, int]:
    """What names in a file mean, as `known` has it: {name: label value} of those that it has.

    A name is looked for as it is, but for case, and only then as a word. A word that two of the names share, or two
    known names of different values, may mean either, and so means nothing.
    """
    exact = {_folded(name): value for name, value in known.items()}
    values: dict[str, set[int]] = {}
    for name, value in exact.items():
        values.setdefault(as_word(name), set()).add(value)
    words = [as_word(name) for name in {_folded(name) for name in names}]
    by_word = {word: of.pop() for word, of in values.items() if word.strip("-") and len(of) == 1 == words.count(word)}
    found = {name: exact.get(_folded(name), by_word.get(as_word(name))) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def numbered(mapping: Mapping[str, str], labels: Sequence[str]) -> dict[str, int]:
    """`{"Liver": "organ"}` as `{"Liver": 1}`, where organ is the study's first label; `background` 0, `ignore` 127.

    Raises:
        StudyInvalid: a label that the study has not.
    """
    values = {label: n for n, label in enumerate(labels, start=1)} | {"background": 0, "ignore": IGNORE}
    strange = sorted(set(mapping.values()) - values.keys())
    if strange:
        raise StudyInvalid(
            f"the site's mapping of structures leads to {', '.join(strange)}; this study knows "
            f"{', '.join(labels)}, background and ignore. Name one of these."
        )
    return {key: values[label] for key, label in mapping.items()}


def choose(structures: Sequence[Structure], mapping: Mapped, empty_ok: bool) -> list[tuple[int, tuple[int, ...]]]:
    """(label value, numbers of the structures that become it) for each entry of `mapping`, in its order.

    A text is looked for among the names first (case and blanks at the ends do not count), then as a number, then
    among the codes. All structures that fit are taken: instances often bear one name.

    Raises:
        ImageUnreadable: LABEL_EMPTY, an entry that fits nothing, unless `empty_ok`; LABEL_VALUES, two entries that
            fit the same structure and make different labels of it.
    """
    chosen: list[tuple[int, tuple[int, ...]]] = []
    owner: dict[int, tuple[str | int, int]] = {}
    for key, value in mapping.items():
        numbers = tuple(structure.number for structure in _fitting(structures, key))
        if not numbers and not empty_ok:
            raise refused(
                "LABEL_EMPTY",
                f"none of the {len(structures)} structures in the file fits {key!r}. Name one that it has by name, "
                f"number or code, or allow that it is absent.",
            )
        doubled = next((n for n in numbers if n in owner and owner[n][1] != value), None)
        if doubled is not None:
            first = owner[doubled][0]
            raise refused("LABEL_VALUES", f"{first!r} and {key!r} both fit structure {doubled}. Keep one of the two.")
        fresh = tuple(n for n in numbers if n not in owner)
        owner |= dict.fromkeys(fresh, (key, value))
        if fresh or not numbers:
            chosen.append((value, fresh))
    return chosen


def _fitting(structures: Sequence[Structure], key: str | int) -> list[Structure]:
    if isinstance(key, int):
        return [s for s in structures if s.number == key]
    word = _folded(key)
    named = [s for s in structures if _folded(s.name) == word]
    if not named and word.isdecimal():
        named = [s for s in structures if s.number == int(word)]
    return named or [s for s in structures if word in (code.casefold() for code in s.codes)]


def paint(
    masks: Iterable[tuple[int, NDArray[np.bool_]]], shape: tuple[int, ...], overlap: Overlap, empty_ok: bool
) -> Labels:
    """uint8[shape] from (value, bool[shape]) one after the other.

    Raises:
        ImageUnreadable: LABEL_VALUES, voxels of two values under `refuse`; LABEL_EMPTY, a value without a voxel,
            unless `empty_ok`.
    """
    labels = np.zeros(shape, np.uint8)
    for number, (value, mask) in enumerate(masks, start=1):
        if not empty_ok and not mask.any():
            raise refused(
                "LABEL_EMPTY", f"structure {number} of the mapping has no voxel here. Draw it, or leave the case out."
            )
        taken = mask & (labels != 0) & (labels != value)
        if overlap == "refuse" and taken.any():
            raise refused(
                "LABEL_VALUES",
                f"{int(taken.sum())} voxels belong to structure {number} of the mapping and to one before it. "
                f"Say which wins: overlap = first or last.",
            )
        labels[mask & ~taken if overlap == "first" else mask] = value
    return labels


def renumber(stored: Labels, values: Mapping[int, int], unknown: Collection[int] = ()) -> Labels:
    """Each value of a label map replaced by another; 0 and 127 stay unless named, or `unknown`: of another meaning.

    Raises:
        ImageUnreadable: LABEL_VALUES, a value that `values` does not name.
    """
    table = np.full(256, 255, np.uint8)
    for old, new in ({0: 0, IGNORE: IGNORE} | dict(values)).items():
        table[old] = new
    table[list(unknown)] = 255
    found = np.unique(stored)
    strange = [int(v) for v in found if table[v] == 255]
    if strange:
        raise refused(
            "LABEL_VALUES",
            f"the labels hold the values {strange}, and only {sorted(values)} are expected. Is it another year's or "
            f"another task's file?",
        )
    return table[stored]


def indices(points_lps_mm: NDArray[np.float64], affine_ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n, 3]: where points in LPS mm (DICOM, ITK, LUNA16: float[n, 3]) lie in index coordinates of a grid.

    Solves the whole affine, so that grids with negative or oblique directions come out right.
    """
    homogeneous = np.concatenate([np.asarray(points_lps_mm, np.float64), np.ones((len(points_lps_mm), 1))], axis=1)
    return np.linalg.solve(affine_ras, LPS_TO_RAS @ homogeneous.T).T[:, :3]


def place(block: NDArray[Any], to_index: NDArray[np.float64], into: NDArray[Any]) -> None:
    """Adds a block of labels or marks to a map on another grid; the larger value stays where both have one.

    What lies outside the map is cut off if it is background.

    Args:
        block: bool or uint8[A, B, C].
        to_index: float64[4, 4]; index in `block` -> index in `into`, a turn by whole axes up to a tenth of a voxel.

    Raises:
        ImageUnreadable: LABEL_GEOMETRY_MISMATCH, grids that do not coincide, or something outside the map.
    """
    begins, ends = _extent(block)
    if begins is None or ends is None:
        return
    turn, move = np.rint(to_index[:3, :3]), np.rint(to_index[:3, 3])
    ways = np.abs(turn)
    if not ((ways.sum(axis=0) == 1).all() and (ways.sum(axis=1) == 1).all()):
        raise _apart("its axes run askew to the image's, or its voxels have another size")
    corners = np.array([(a, b, c) for a in (0, ends[0]) for b in (0, ends[1]) for c in (0, ends[2])], np.float64)
    off = np.abs(corners @ (to_index[:3, :3] - turn).T + to_index[:3, 3] - move).max()
    if off > ON_GRID:
        raise _apart(f"its voxels lie {off:.2g} voxels beside the image's")
    used = block[tuple(slice(b, e) for b, e in zip(begins, ends, strict=True))]
    source = ways.argmax(axis=1)  # axis of the block that runs along each axis of the map
    signs = turn[np.arange(3), source]
    turned = used.transpose(*source)[tuple(slice(None, None, int(sign)) for sign in signs)]
    first = np.where(signs > 0, begins[source], 1 - ends[source]) + move.astype(np.intp)
    last = first + turned.shape
    if (first < 0).any() or (last > into.shape).any():
        raise _apart("some of it lies outside the image")
    target = into[tuple(slice(b, e) for b, e in zip(first, last, strict=True))]
    np.maximum(target, turned, out=target)


def _extent(block: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]] | tuple[None, None]:
    """The box of what is not background: first index and one after the last, along each axis."""
    lines = [np.flatnonzero(block.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    if not lines[0].size:
        return None, None
    return np.array([line[0] for line in lines]), np.array([line[-1] + 1 for line in lines])


def _apart(how: str) -> ImageUnreadable:
    return refused(
        "LABEL_GEOMETRY_MISMATCH",
        f"the labels are not on the image's grid: {how}. Export them on the series that they were drawn on.",
    )
