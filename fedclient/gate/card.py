"""The data card: counts that a coordinator may see, small cells withheld in such a way that none can be derived.

No cell of 1 to 10 cases is told (CMS cell-size policy; PCORnet: 11), and of a table whose total is known never one
cell alone is withheld: the next smallest goes with it (complementary suppression, Willenborg & de Waal 2001, ch. 5).
A card of other days, one case later, tells of that case by its difference: cards are for the start of a study.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedclient.gate.facts import Facts
from fedclient.gate.run import SMALLEST_COUNT, Checked
from shared_models.files import canonical_json

FORMAT = 1
UNKNOWN = "unknown"
Cells = dict[str, int]
Told = dict[str, int | None]
SPACING_MM = (0.3, 0.5, 0.7, 0.9, 1.2, 2.0, 4.0)
SLICE_MM = (0.7, 1.0, 1.5, 2.0, 2.5, 3.5, 5.5)
SLICES = (2, 16, 64, 128, 256, 512)
WIDTH = (65, 129, 257, 385, 513, 1025, 2049)
KV = (90.0, 110.0, 130.0)


def card_of(found: Checked, smallest_count: int) -> dict[str, Any]:
    """The card of a check; None stands where a number is withheld.

    Args:
        smallest_count: of the site; below 11 it counts as 11.
    """
    smallest = max(SMALLEST_COUNT, smallest_count)
    cases = [each.case for each in found.seen]
    head: dict[str, Any] = {"format": FORMAT, "smallest_count": smallest, "needs": found.needs.digest}
    if len(cases) < smallest:
        return {**head, "cases": None, "patients": None, "tables": {}}
    splits: Cells = Counter(
        f"{case.split}, {'labelled' if found.needs.labelled(case) else 'not labelled'}" for case in cases
    )
    told = withheld(splits, len(cases), smallest)
    by_patient = {(case.patient, case.split) for case in cases}
    patients = len({patient for patient, _ in by_patient})
    hidden = {cell.split(",")[0] for cell, count in told.items() if count is None}
    tables: dict[str, Told] = {"split": told}
    if patients >= smallest and len(by_patient) == patients:
        of_split: Cells = Counter(split for _, split in by_patient)
        tables["patients"] = withheld(of_split, patients, smallest, hidden)
    facts = [each.looked.facts for each in found.seen]
    for name, value in () if found.needs.table_only else _FACETS.items():
        cells: Cells = Counter(UNKNOWN if f is None else value(f) for f in facts)
        tables[name] = withheld(cells, len(cases), smallest)
    for label in found.needs.answers:
        having = sum(f is not None and f.has(label) for f in facts)
        tables[f"label {label}"] = _with_and_without(having, len(cases), smallest)
    for code in sorted({f.code for f in found.findings if f.case}):
        having = len({f.case for f in found.findings if f.code == code and f.case})
        tables[f"finding {code}"] = _with_and_without(having, len(cases), smallest)
    return {
        **head,
        "cases": len(cases),
        "patients": patients if patients >= smallest else None,
        "tables": tables,
    }


def card_bytes(card: Mapping[str, Any]) -> bytes:
    """Exactly what the coordinator may see."""
    return canonical_json(card)


def card_digest(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(card_bytes(card)).hexdigest()


def withheld(cells: Mapping[str, int], total: int, smallest: int, also: Iterable[str] = ()) -> Told:
    """A table whose cells add up to a total that is known, told so that no small cell can be derived.

    Withheld are cells of 1 to `smallest` - 1, those in `also`, and then, smallest first, as many as it takes until what
    is withheld are several cells which together hold `smallest` cases or more, and not 1 each.

    Raises:
        ValueError: the cells do not add up to the total.
    """
    if sum(cells.values()) != total:
        raise ValueError(f"cells add up to {sum(cells.values())}, not to {total}")
    there = {name: count for name, count in cells.items() if count > 0}
    hidden = {name for name, count in there.items() if count < smallest} | (set(also) & there.keys())
    rest = sorted(there.keys() - hidden, key=lambda name: (there[name], name))
    while hidden and rest and not _safe([there[name] for name in hidden], smallest):
        hidden.add(rest.pop(0))
    return {name: None if name in hidden else count for name, count in sorted(cells.items())}


def _safe(counts: Sequence[int], smallest: int) -> bool:
    return len(counts) > 1 and smallest <= sum(counts) > len(counts)


def _with_and_without(having: int, total: int, smallest: int) -> Told:
    return withheld({"with": having, "without": total - having}, total, smallest)


def _binned(value: float | None, edges: Sequence[float], unit: str = "") -> str:
    if value is None:
        return UNKNOWN
    at = bisect_right(edges, value)
    if at == 0:
        return f"below {edges[0]:g}{unit}"
    return f"{edges[at - 1]:g} to {edges[at]:g}{unit}" if at < len(edges) else f"{edges[-1]:g}{unit} and above"


_FACETS: Mapping[str, Callable[[Facts], str]] = {
    "modality": lambda f: f.modality or ("picture" if f.picture else UNKNOWN),
    "vendor": lambda f: (f.manufacturer or UNKNOWN).split()[0],
    "body part": lambda f: f.body_part or UNKNOWN,
    "pixel size": lambda f: UNKNOWN if f.picture else _binned(max(f.spacing_mm[:2]), SPACING_MM, " mm"),
    "slice distance": lambda f: UNKNOWN if f.picture else _binned(f.spacing_mm[2], SLICE_MM, " mm"),
    "slice thickness": lambda f: _binned(f.slice_thickness_mm, SLICE_MM, " mm"),
    "slices": lambda f: _binned(f.axes[2], SLICES),
    "width": lambda f: _binned(max(f.axes[:2]), WIDTH, " px"),
    "tube voltage": lambda f: _binned(f.tube_kv, KV, " kV"),
    "compression": lambda f: "lossy" if f.lossy else "lossless or unknown",
}
