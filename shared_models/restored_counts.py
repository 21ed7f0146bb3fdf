"""How well hidden parts of images are restored, as whole numbers that add up: the error beside that of not looking."""

from dataclasses import dataclass
from math import nan
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared_models.parse import STRICT

MICRO = 1_000_000
MOST_ERROR = 1e6  # of one case, in units of the preprocessed image: what is beyond has diverged
Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True, slots=True)
class RestoredCounts:
    """The cases of one site, or of several merged.

    Attributes:
        error_micro: sum over the cases of the mean absolute error where they were hidden, in millionths.
        blank_micro: the same of who fills in the mean of what is seen.

    Raises:
        ValueError: an error without a case; it may come from another machine.
    """

    __pydantic_config__ = STRICT
    measure: Literal["restored"] = "restored"
    cases: Count = 0
    error_micro: Count = 0
    blank_micro: Count = 0

    def __post_init__(self) -> None:
        if max(self.error_micro, self.blank_micro) > self.cases * MOST_ERROR * MICRO:
            raise ValueError(f"{self.cases} cases cannot have such errors")

    @property
    def value(self) -> float:
        """Share of the error that looking takes away: 1 is perfect, 0 is as good as the mean; NaN without cases."""
        return 1 - self.error_micro / self.blank_micro if self.blank_micro else nan


def restored_counts(errors: NDArray[np.float64], blanks: NDArray[np.float64]) -> RestoredCounts:
    """Of the mean absolute errors of each case, float64[n] each."""
    error, blank = (int(np.rint(np.clip(each, 0, MOST_ERROR) * MICRO).sum()) for each in (errors, blanks))
    return RestoredCounts(cases=len(errors), error_micro=error, blank_micro=blank)


def merge(a: RestoredCounts, b: RestoredCounts) -> RestoredCounts:
    return RestoredCounts(
        cases=a.cases + b.cases,
        error_micro=a.error_micro + b.error_micro,
        blank_micro=a.blank_micro + b.blank_micro,
    )


def as_row(of: RestoredCounts) -> dict[str, Any]:
    """For JSON and tables; None where a figure is not known."""
    return {
        "measure": of.measure,
        "restored": round(of.value, 6) if of.blank_micro else None,
        "error": round(of.error_micro / MICRO / of.cases, 6) if of.cases else None,
        "cases": of.cases,
    }
