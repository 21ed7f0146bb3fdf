"""What a site's training cases tell a federated plan, as whole numbers that travel inside a masked sum."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from shared_models.plan import NO_CASES, Fingerprint

MOST = 2**48 - 1  # of a count
SIGNED = "sum_milli"  # a sum that may lie below 0, in two counts


def plan_names() -> tuple[str, ...]:
    """The counts in a vector, in their order; the same for all studies."""
    return tuple(name for name, _ in _numbers(NO_CASES))


def plan_counts(fingerprint: Fingerprint) -> dict[str, int]:
    """One site's numbers for `plan_names`."""
    return {name: min(number, MOST) for name, number in _numbers(fingerprint)}


def fingerprint_in(counts: Mapping[str, int]) -> Fingerprint:
    """The fingerprint of all sites together, from the sums of their counts.

    Raises:
        ValueError: sums that no cases can give, so that a site has lied.
    """
    found = {f.name: _like(getattr(NO_CASES, f.name), f"plan/{f.name}", counts) for f in fields(Fingerprint)}
    found[SIGNED] -= counts[f"plan/{SIGNED}-"]
    return Fingerprint(**found)


def _like(shape: Any, name: str, counts: Mapping[str, int]) -> Any:
    if isinstance(shape, tuple):
        return tuple(_like(part, f"{name}/{at}", counts) for at, part in enumerate(shape))
    return counts[name]


def _numbers(of: Fingerprint) -> Iterator[tuple[str, int]]:
    for field in fields(Fingerprint):
        yield from _flat(getattr(of, field.name), f"plan/{field.name}")
    yield f"plan/{SIGNED}-", max(-of.sum_milli, 0)


def _flat(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, tuple):
        for at, part in enumerate(value):
            yield from _flat(part, f"{name}/{at}")
    else:
        yield name, max(value, 0)
