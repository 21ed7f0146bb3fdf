"""How far boundaries, volumes and single lesions are off, in millimetres on the image's own grid, as sums that add up.

One policy for empty sides: a case where neither side holds the label is left out of all; where one side misses it,
the surface agreement is 0 and the distance is the diagonal of the image.
"""

from dataclasses import dataclass
from math import nan
from typing import Annotated, Any

from pydantic import Field

from shared_models.parse import STRICT

MICRO = 1_000_000
DISTANCE_MM = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)  # upper ends; then beyond
Count = Annotated[int, Field(ge=0, lt=2**53)]
Signed = Annotated[int, Field(gt=-(2**53), lt=2**53)]


@dataclass(frozen=True, slots=True)
class SurfaceCounts:
    """Over the cases of one site and label where either side holds it.

    Attributes:
        tolerance_mm: of the surface agreement.
        cases: cases measured.
        agreement_micro: sum of normalised surface Dice, each in millionths (Nikolov et al. 2018).
        distance_um: sum of the 95th percentile of the distance between the surfaces, both ways, in micrometres.
        distance: cases by that distance, on `DISTANCE_MM`; empty where the site withholds it.
        volume_error_micro: sum over cases with a truth of |predicted - true| / true volume, at most 10 each.
        volume_bias_micro: the same with its sign.
        with_truth: those cases.
        lesions, found, false: connected parts of the truth, those that a prediction touches, and connected parts of
            the prediction that touch no truth.

    Raises:
        ValueError: sums that no cases can give; they may come from another machine.
    """

    __pydantic_config__ = STRICT
    tolerance_mm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    cases: Count = 0
    agreement_micro: Count = 0
    distance_um: Count = 0
    distance: Annotated[tuple[Count, ...], Field(max_length=len(DISTANCE_MM) + 1, fail_fast=True)] = ()
    volume_error_micro: Count = 0
    volume_bias_micro: Signed = 0
    with_truth: Count = 0
    lesions: Count = 0
    found: Count = 0
    false: Count = 0

    def __post_init__(self) -> None:
        if self.agreement_micro > self.cases * MICRO or self.with_truth > self.cases:
            raise ValueError(f"{self.cases} cases cannot agree by {self.agreement_micro} millionths")
        if len(self.distance) not in (0, len(DISTANCE_MM) + 1) or sum(self.distance) > self.cases:
            raise ValueError(f"distances of {self.cases} cases are in {len(DISTANCE_MM) + 1} bins, or withheld")
        if abs(self.volume_bias_micro) > self.volume_error_micro or self.found > self.lesions:
            raise ValueError("volumes or lesions that cannot be")
        if self.volume_error_micro > 10 * MICRO * self.with_truth:
            raise ValueError(f"{self.with_truth} cases cannot be off by {self.volume_error_micro} millionths")


def merge(a: SurfaceCounts | None, b: SurfaceCounts | None) -> SurfaceCounts | None:
    """Sums of both.

    Raises:
        ValueError: of unlike tolerances.
    """
    if a is None or b is None:
        return b if a is None else a
    if a.tolerance_mm != b.tolerance_mm:
        raise ValueError(f"surfaces at {a.tolerance_mm} mm and at {b.tolerance_mm} mm do not add up")
    if a.distance and b.distance:
        distance = tuple(x + y for x, y in zip(a.distance, b.distance, strict=True))
    else:
        distance = a.distance or b.distance
    return SurfaceCounts(
        a.tolerance_mm,
        a.cases + b.cases,
        a.agreement_micro + b.agreement_micro,
        a.distance_um + b.distance_um,
        distance,
        a.volume_error_micro + b.volume_error_micro,
        a.volume_bias_micro + b.volume_bias_micro,
        a.with_truth + b.with_truth,
        a.lesions + b.lesions,
        a.found + b.found,
        a.false + b.false,
    )


def surface_row(of: SurfaceCounts) -> dict[str, Any]:
    """For JSON and tables; None where a figure is not known."""
    parts = 2 * of.found + (of.lesions - of.found) + of.false
    figures = {
        "nsd": of.agreement_micro / MICRO / of.cases if of.cases else nan,
        "hd95_mm": of.distance_um / 1000 / of.cases if of.cases else nan,
        "volume_error": of.volume_error_micro / MICRO / of.with_truth if of.with_truth else nan,
        "volume_bias": of.volume_bias_micro / MICRO / of.with_truth if of.with_truth else nan,
        "lesion_f1": 2 * of.found / parts if parts else nan,
    }
    return {
        "tolerance_mm": of.tolerance_mm,
        **{name: None if value != value else round(value, 6) for name, value in figures.items()},
        "lesions": {"in_truth": of.lesions, "found": of.found, "false": of.false},
        "hd95_histogram": list(of.distance),
    }
