"""Models of one site beside each other on its own patients: intervals, differences to its own, groups of patients.

Scores of single cases, and whose they are, stay in the process that calls; see fedclient/worth.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedclient.data.cases import Case
from fedclient.worth import AnyScores, Difference, Interval, difference, interval, part_of, worst_tenth
from shared_models.seeds import rng

Kind = Literal["local", "pooled", "federated", "personalised", "left out"]
SUBGROUPS = ("sex", "age", "manufacturer", "scanner")  # columns of a case's table
AGE_BANDS = (40, 65)
FEWEST_IN_GROUP = 11  # patients; a smaller group is not told (CMS and PCORnet)


def compared(
    name: str, found: Mapping[tuple[Kind, str], Sequence[AnyScores]], cases: Sequence[Case]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is told of each model, and of the federated ones in groups of patients.

    Args:
        name: of the site.
        found: (kind, setting) -> scores on `cases`, one for each seed; those of ("local", "") are the site's own model.
    """
    own = found.get(("local", ""), [])
    patients = [case.patient for case in cases]
    worth: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for (kind, setting), scores in found.items():
        who = {"kind": kind, "setting": setting}
        mine = interval(scores, patients, rng("interval", name, kind, setting))
        line = {**who, "worst_tenth": _number(worst_tenth(scores)), "here": _ends(mine)}
        if kind != "local" and len(own) == len(scores):
            line |= told(difference(scores, own, patients, rng("worth", name, kind, setting)))
        worth.append(line)
        if kind not in ("federated", "personalised") or len(own) != len(scores):
            continue
        for group, places in subgroups(cases):
            few = [part_of(each, places) for each in scores], [part_of(each, places) for each in own]
            found_here = difference(*few, [patients[n] for n in places], rng("worth", name, kind, setting, group))
            groups.append({**who, "group": group, **told(found_here)})
    return worth, groups


def _ends(of: Interval) -> dict[str, float | None]:
    return {key: _number(getattr(of, key)) for key in ("low", "high")}


def told(found: Difference) -> dict[str, Any]:
    numbers = {key: _number(getattr(found, key)) for key in ("value", "low", "high")}
    return {**numbers, "patients": found.patients, "verdict": found.verdict}


def subgroups(cases: Sequence[Case]) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """(name, places of its cases) of each group that the table of the data tells and that has patients enough."""
    for column in SUBGROUPS:
        named = [_group(column, {k.casefold(): v for k, v in case.facts.items()}.get(column, "")) for case in cases]
        for group in sorted(filter(None, set(named))):
            places = np.array([n for n, each in enumerate(named) if each == group], dtype=np.intp)
            if len({cases[n].patient for n in places}) >= FEWEST_IN_GROUP:
                yield f"{column} {group}", places


def _group(column: str, value: str) -> str:
    if column != "age" or not value:
        return value
    try:
        years = float(value.rstrip("Yy"))
    except ValueError:
        return ""
    if not 0 <= years < inf:  # pandas writes nan where it knows none
        return ""
    young, old = AGE_BANDS
    return f"under {young}" if years < young else f"{young} to {old - 1}" if years < old else f"{old} or more"


def _number(value: float | None) -> float | None:
    return round(value, 6) if value is not None and np.isfinite(value) else None
