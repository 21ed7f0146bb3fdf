"""What shows only when cases are seen together: patients and pictures in two splits, copies, outliers, too few.

Everything here is compared under the site's secret; no finding tells more than keys of cases.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case
from fedclient.data.findings import Finding, Severity, finding
from fedclient.data.tables import alike
from fedclient.gate.facts import Facts, Needs, Seen, takes_part
from fedclient.gate.pixels import EDGE

FEW_TO_TRAIN = 10  # patients; fewer is a warning
ENOUGH_TO_JUDGE = 8  # cases, before one of them can be called odd
ALIKE = 0.7  # of the telling parts of two perceptual hashes; copies with noise or at half the size 0.81, others 0.29
TELLING_PARTS = 12
CROWD = 128  # cases that share a part: it says nothing any more
SHARED_ID = 3  # manifest patients behind one PatientID of the headers; more is a placeholder
PLACEHOLDERS = 0.2  # of all patients
TURNS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "upright": lambda a: a,
    "mirrored across its first axis": lambda a: a[::-1],
    "mirrored across its second axis": lambda a: a[:, ::-1],
    "upside down": lambda a: a[::-1, ::-1],
    "on its side": lambda a: a.T,
    "on its other side": lambda a: a[::-1].T,
    "on its side, mirrored": lambda a: a[:, ::-1].T,
    "on its other side, mirrored": lambda a: a[::-1, ::-1].T,
}
LIKE_THE_OTHERS, CLEARLY = 0.7, 0.2  # correlation with the others' mean when turned; how much better than as it is


def torn_patients(cases: Sequence[Case]) -> Iterator[Finding]:
    """Patients of more than one split, as the site itself names them; needs no file."""
    splits: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        splits[case.patient].add(case.split)
    for case in cases:
        others = splits[case.patient] - {case.split}
        if others and case.split != "train":
            what = f"its patient is in {' and '.join(sorted(others))} too, and the case is in {case.split}."
            yield finding("LEAKAGE_PATIENT", what, case=case.key, row=case.row)


def _alike_patients(cases: Sequence[Case]) -> Iterator[Finding]:
    """Patients of more than one split whose names are nearly the same: one patient, or two."""
    by_name: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_name[alike(case.patient)].append(case)
    for same in by_name.values():
        for case in same:
            others = {each.split for each in same if each.patient != case.patient} - {case.split}
            if others and case.split != "train":
                what = (
                    f"it is in {case.split}, and its patient's name differs from that of one in "
                    f"{' and '.join(sorted(others))} by capitals, zeros or signs alone. Are they one patient?"
                )
                yield finding("LEAKAGE_PATIENT", what, case=case.key, row=case.row, severity="warn")


def together(seen: Sequence[Seen], needs: Needs) -> Iterator[Finding]:
    """All findings about cases of which each may be fine alone."""
    readable = [(each.case, facts) for each in seen if (facts := each.looked.facts) is not None]
    yield from torn_patients([each.case for each in seen])
    yield from _alike_patients([each.case for each in seen])
    yield from _shared_ids(readable)
    yield from _copies(readable)
    yield from _same_masks(readable)
    yield from _sizes(readable)
    yield from _odd_parts(readable)
    yield from _odd_turns(readable)
    yield from _odd_labels(readable, needs)
    yield from _too_few(seen, needs)


def _shared_ids(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    """A PatientID of the headers that stands in two splits, whatever the site calls its patients."""
    by_id: dict[str, list[Case]] = defaultdict(list)
    for case, facts in readable:
        if facts.person:
            by_id[facts.person].append(case)
    everyone = len({case.patient for case, _ in readable})
    for cases in by_id.values():
        names, splits = {case.patient for case in cases}, {case.split for case in cases}
        if len(splits) < 2 or len(names) < 2:
            continue
        placeholder = len(names) > max(SHARED_ID, PLACEHOLDERS * everyone)
        for case in cases:
            if case.split == "train":
                continue
            what = (
                f"its header has the PatientID of {len(cases) - 1} other cases, in {' and '.join(sorted(splits))}"
                f"{': one that stands for nobody?' if placeholder else '.'}"
            )
            grave: Severity = "warn" if placeholder else "block"
            yield finding("LEAKAGE_PATIENT", what, case=case.key, row=case.row, severity=grave)


def _copies(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    """The same voxels twice, or nearly: saved again, rescaled, resampled, with loss."""
    exact: dict[str, list[int]] = defaultdict(list)
    for at, (_, facts) in enumerate(readable):
        exact[facts.pixels].append(at)
    pairs = {pair: True for same in exact.values() for pair in combinations(same[:CROWD], 2)}
    for pair in _alike([facts for _, facts in readable]):
        pairs.setdefault(pair, False)
    told: set[str] = set()

    def order(pair: tuple[int, int]) -> tuple[bool, bool]:
        """A leak first, lest a copy within one split hide it; then what is the same for certain."""
        return readable[pair[0]][0].split == readable[pair[1]][0].split, not pairs[pair]

    for a, b in sorted(pairs, key=order):
        same = pairs[a, b]
        one, other = readable[a][0], readable[b][0]
        if one.split != "train":
            one, other = other, one
        if other.key in told:
            continue
        told.add(other.key)
        how = "the same pixels as" if same else "nearly the same picture as"
        if one.split != other.split:
            what = f"it is in {other.split} and holds {how} case {one.key}, which is in {one.split}."
            yield finding("LEAKAGE_PIXEL", what, case=other.key, row=other.row)
        elif same or one.patient != other.patient:  # two takes of one patient may look alike
            what = f"it holds {how} case {one.key}."
            yield finding("DUPLICATE", what, case=other.key, row=other.row)


def _same_masks(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    """Labels that two patients share voxel by voxel; where the pictures are copies, that has been told."""
    first: dict[str, tuple[Case, Facts]] = {}
    for case, facts in readable:
        if not facts.mask:
            continue
        other, of_other = first.setdefault(facts.mask, (case, facts))
        if other.patient != case.patient and of_other.pixels != facts.pixels:
            what = f"its labels are those of case {other.key}, of another patient: were they drawn on its image?"
            yield finding("DUPLICATE", what, case=case.key, row=case.row)


def _alike(facts: Sequence[Facts]) -> Iterator[tuple[int, int]]:
    """Pairs whose perceptual hashes agree in most parts that say something."""
    having: dict[tuple[int, str], list[int]] = defaultdict(list)
    for at, each in enumerate(facts):
        for part, band in enumerate(each.bands):
            if band is not None:
                having[part, band].append(at)
    telling = {name for name, same in having.items() if len(same) <= CROWD}
    common: Counter[tuple[int, int]] = Counter()
    for name in telling:
        common.update(combinations(having[name], 2))
    for (a, b), count in common.items():
        if count < TELLING_PARTS or len(facts[a].bands) != len(facts[b].bands):
            continue
        parts = enumerate(zip(facts[a].bands, facts[b].bands, strict=True))
        told = sum((n, x) in telling or (n, y) in telling for n, (x, y) in parts)
        if count >= ALIKE * told:
            yield a, b


def _outliers(values: Sequence[float], least: float) -> list[int]:
    """Which lie further than six robust deviations (Iglewicz & Hoaglin 1993) and `least` from the median."""
    if len(values) < ENOUGH_TO_JUDGE:
        return []
    found = np.asarray(values, np.float64)
    off = np.abs(found - np.median(found))
    limit = max(least, 6 * 1.4826 * float(np.median(off)))
    return [int(at) for at in np.flatnonzero(off > limit)]


def _sizes(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    volumes = [(case, facts) for case, facts in readable if not facts.picture]
    told: set[str] = set()
    measures: tuple[tuple[str, Callable[[Facts], Sequence[float]]], ...] = (
        ("voxel size", lambda f: f.spacing_mm),
        ("number of voxels", lambda f: f.axes),
    )
    for name, get in measures:
        for axis in range(3):
            values = [float(np.log2(get(facts)[axis])) for _, facts in volumes]
            for at in _outliers(values, least=2.0):
                case, facts = volumes[at]
                if case.key in told:
                    continue
                told.add(case.key)
                usual = 2 ** float(np.median(values))
                what = f"its {name} along {'IJK'[axis]} is {get(facts)[axis]:.4g}, that of the others {usual:.4g}."
                yield finding("GEOMETRY_RANGE", what, case=case.key, row=case.row)


def _odd_parts(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    """Modality or body part of a few cases where nearly all others agree."""
    facets: tuple[tuple[str, str, Callable[[Facts], str | None]], ...] = (
        ("MODALITY_MISMATCH", "modality", lambda f: f.modality),
        ("BODY_PART_MISMATCH", "body part", lambda f: f.body_part),
    )
    for code, name, get in facets:
        stated = [(case, value) for case, facts in readable if (value := get(facts)) is not None]
        usual, times = Counter(value for _, value in stated).most_common(1)[0] if stated else ("", 0)
        if len(stated) < ENOUGH_TO_JUDGE or times < 0.9 * len(stated):
            continue
        for case, value in stated:
            if value != usual and not set(value.split()) & set(usual.split()):
                what = f"its header says {name} {value}, nearly all others say {usual}."
                yield finding(code, what, case=case.key, row=case.row, severity="warn")


def _odd_turns(readable: Sequence[tuple[Case, Facts]]) -> Iterator[Finding]:
    """Cases that look like the others only when they are turned or mirrored."""
    views: tuple[tuple[str, Callable[[Facts], tuple[int, ...]], Sequence[str]], ...] = (
        ("", lambda f: f.axial, tuple(TURNS)),
        (" from head to feet", lambda f: f.coronal, ("upright", "mirrored across its second axis")),
    )
    told: set[str] = set()
    for kind in (True, False):
        group = [(case, facts) for case, facts in readable if facts.picture == kind]
        for where, get, turns in views:
            seen = [(case, _standard(get(facts))) for case, facts in group if len(get(facts)) == EDGE * EDGE]
            if len(seen) < ENOUGH_TO_JUDGE:
                continue
            total = np.sum([image for _, image in seen], axis=0)
            fits = []
            for case, image in seen:
                others = _standard((total - image).ravel())
                fits.append((case, {turn: float((TURNS[turn](image) * others).mean()) for turn in turns}))
            if np.median([fit["upright"] for _, fit in fits]) < 0.5:
                continue  # they are no pictures of one thing
            for case, fit in fits:
                best = max(fit, key=lambda turn: fit[turn])
                if fit[best] >= LIKE_THE_OTHERS and fit[best] - fit["upright"] >= CLEARLY and case.key not in told:
                    told.add(case.key)
                    what = f"beside the others it lies {best}{where}."
                    yield finding("ORIENTATION_ODD", what, case=case.key, row=case.row)


def _standard(values: Iterable[float]) -> NDArray[np.float64]:
    image = np.array(list(values), np.float64).reshape(EDGE, EDGE)
    image -= image.mean()
    return image / max(float(image.std()), 1e-9)


def _odd_labels(readable: Sequence[tuple[Case, Facts]], needs: Needs) -> Iterator[Finding]:
    for label in needs.labels:
        having = [(case, f, f.drawn[label]) for case, f in readable if label in f.drawn and f.drawn[label].voxels]
        sizes = [float(np.log2(max(drawn.share, 1e-6))) for _, _, drawn in having]
        odd = {at: "a share of the image far from the others'" for at in _outliers(sizes, least=4.0)}
        levels = [(d.level - f.level_1) / max(f.level_99 - f.level_1, 1e-6) for _, f, d in having]
        odd |= {at: "grey values inside far from the others'" for at in _outliers(levels, least=0.35)}
        for at, how in odd.items():
            what = f"label {label!r} has {how}: does it lie where it should?"
            yield finding("LABEL_ODD", what, case=having[at][0].key, row=having[at][0].row)


def _too_few(seen: Sequence[Seen], needs: Needs) -> Iterator[Finding]:
    use = [each for each in seen if takes_part(each.case, needs) or not needs.wants_labels]
    patients = {split: len({e.case.patient for e in use if e.case.split == split}) for split in ("train", "test")}
    labelled = " with labels" if needs.wants_labels and not needs.unlabelled else ""
    for split, count in patients.items():
        if count == 0:
            grave: Severity = "block" if split == "train" else "warn"
            yield finding("DATASET_TOO_SMALL", f"no patient{labelled} for {split}.", severity=grave)
        elif split == "train" and count < FEW_TO_TRAIN:
            what = f"{count} patients{labelled} to train on; {FEW_TO_TRAIN} or more are wanted."
            yield finding("DATASET_TOO_SMALL", what, severity="warn")
    trained = [e.looked.facts for e in use if e.case.split == "train" and e.looked.facts is not None]
    for label in needs.answers if trained else ():
        if not any(facts.has(label) for facts in trained):
            yield finding("CLASS_ABSENT", f"no case to train on has label {label!r}.")
