"""What an attack found: figures with the protection and without it, and whether both are as they must be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]  # [rows, columns], 0 black to 1 white


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        against: what protects, or `nothing`.
        figure: what was measured, in words with its unit.
        must: what it has to be, in words; empty where it is told and not judged.
        holds: whether it is; None where it is not judged.
        control: the attack without protection, which must succeed, or the rest says nothing.
        study: this is the protection that the study has.
    """

    against: str
    figure: str
    value: float | str
    must: str = ""
    holds: bool | None = None
    control: bool = False
    study: bool = False

    @property
    def told(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value:.3g}"


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures side by side, with a caption each."""

    title: str
    pictures: Mapping[str, Picture]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one attack came to.

    Attributes:
        setting: what was attacked and what the attacker is given, in one or two sentences.
        verdict: what the attacker gets under the study's own protection, in one sentence.
    """

    attack: str
    title: str
    setting: str
    rows: tuple[Row, ...]
    verdict: str
    strips: tuple[Strip, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> tuple[Row, ...]:
        """What is not as it must be: a control that failed, or a protection that is worse than it says."""
        return tuple(row for row in self.rows if row.holds is False)


def judged(against: str, figure: str, value: float, above: float | None = None, below: float | None = None,
           control: bool = False, study: bool = False) -> Row:  # fmt: skip
    """A row whose value must be above one number, or below another."""
    if above is not None:
        return Row(against, figure, value, f"above {above:g}", value > above, control, study)
    assert below is not None, "one of the two"
    return Row(against, figure, value, f"below {below:g}", value < below, control, study)


def psnr(original: NDArray[Any], guess: NDArray[Any]) -> float:
    """Peak signal to noise ratio in dB of a picture whose values lie between 0 and 1; 200 where they are equal."""
    error = float(np.mean((original.astype(np.float64) - np.clip(guess.astype(np.float64), 0, 1)) ** 2))
    return 200.0 if error < 1e-20 else float(-10 * np.log10(error))
