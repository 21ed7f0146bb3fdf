"""What an attack found: figures with the protection and without it, and whether both are as they must be.

An attack that does not succeed where nothing protects says nothing of a protection: its figures are told then, and no
row of it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]  # [rows, columns], 0 black to 1 white
NOTHING_SHOWN = "nothing is shown"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        against: what protects, or `nothing`.
        figure: what was measured, in words with its unit.
        must: what it has to be, in words; empty where it is told and not judged.
        holds: whether it is; None where it is not judged.
        control: the attack without protection, which must succeed, or the rest says nothing. Of one that is told and
            not judged `holds` is None.
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

    @property
    def words(self) -> str:
        """`AUC against 'nothing' is 0.61, and must be above 0.8`."""
        return f"{self.figure} against {self.against!r} is {self.told}, and must be {self.must}"


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
        figures: every row as it was measured; what people and machines are shown is `rows`.
        gets: what the attacker gets under the study's own protection, in one sentence, if the controls succeed.
    """

    attack: str
    title: str
    setting: str
    figures: tuple[Row, ...]
    gets: str
    strips: tuple[Strip, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missed(self) -> tuple[Row, ...]:
        """What is not as it must be: a control that failed, or a protection that is worse than it says."""
        return tuple(row for row in self.figures if row.holds is False)

    @property
    def shown(self) -> bool:
        """Whether the attack succeeds where nothing protects: only then its figures say something of a protection."""
        controls = [row for row in self.figures if row.control and row.holds is not None]
        return bool(controls) and all(row.holds for row in controls)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The figures; where nothing is shown no protection holds, and one that is worse than claimed is so still."""
        if self.shown:
            return self.figures
        return tuple(row if row.control or not row.holds else replace(row, holds=None) for row in self.figures)

    @property
    def verdict(self) -> str:
        """What the attacker gets, or that nothing is shown, with the control that failed."""
        worse = [row for row in self.missed if not row.control]
        claimed = f"Worse than claimed: {_listed(worse)}. " if worse else ""
        if self.shown:
            return claimed + self.gets
        failed = _listed([row for row in self.missed if row.control]) or "there is none"
        return f"The control failed: nothing is shown ({failed}). {claimed}".strip()

    def word(self, row: Row) -> str:
        """Whether one of `rows` is as it must be, in a word or two; none for what is told and not judged."""
        if row.holds is None:
            return NOTHING_SHOWN if row.must and not self.shown else ""
        if row.control:
            return "succeeds, as it must" if row.holds else "CONTROL FAILED"
        return "holds" if row.holds else "WORSE THAN CLAIMED"


def _listed(rows: Sequence[Row]) -> str:
    return "; ".join(row.words for row in rows)


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
