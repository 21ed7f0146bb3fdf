"""What a release was asked here: a line of cells for each case, kept at the site, and what follows from them.

site/drift/<digest>.jsonl    in the order in which cases came; no identifier, no time, no image
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared_models.betting import FEWEST, WINDOW, Window, watched
from shared_models.drift import (
    Cells,
    Profile,
    bounds_text,
    by_chance,
    check_cells,
    divergences,
    grids,
    nearest,
    profile_of,
    read_reference,
)
from shared_models.files import append_json, locked, read_lines
from shared_models.study import Study

SHOWN = 5  # windows


def log_path(folder: Path, digest: str) -> Path:
    """Where the cases of a release are counted."""
    return folder / "drift" / f"{digest[:16]}.jsonl"


def note(folder: Path, study: Study, digest: str, cells: Cells) -> None:
    """Counts one case; whole and synced, by one process at a time.

    Raises:
        StateInvalid: cells of another study.
    """
    check_cells(study, cells)
    path = log_path(folder, digest)
    with locked(path.with_suffix(".lock")):
        append_json(path, {"cells": [cells[name] for name in sorted(cells)]})


def noted(folder: Path, study: Study, digest: str) -> list[dict[str, int]]:
    """The cells of every case that was counted.

    Raises:
        StateInvalid: lines of another version.
    """
    names = sorted(grids(study))
    found = [dict(zip(names, line["cells"], strict=False)) for line in read_lines(log_path(folder, digest))]
    for cells in found:
        check_cells(study, cells)
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """One feature of the latest cases beside the profile that they are most like.

    Attributes:
        divergence: Jensen-Shannon, 0 to 1; `chance`: what as many cases of one distribution would show.
        here, there: the cell in which the middle case lies, in words.
    """

    feature: str
    divergence: float
    chance: float
    here: str
    there: str


@dataclass(frozen=True, slots=True)
class Drift:
    """What the log of a release says.

    Attributes:
        against: `release`, the site's own `first cases` where the release tells of none, or `nothing` yet.
        profiles: how many the release carries.
        windows: the last ones, as many as are shown, each with the number of its first case.
        alarm: whether the last window, or the one before it while the last is short, ended in an alarm, shown or not.
        differences: of up to `WINDOW` latest cases, the largest first.
    """

    cases: int
    against: Literal["release", "first cases", "nothing"]
    profiles: int
    windows: tuple[tuple[int, Window], ...]
    differences: tuple[Difference, ...]
    alarm: bool


def told(folder: Path, study: Study, digest: str, fingerprint: Mapping[str, Any] | None, shown: int = SHOWN) -> Drift:
    """What the cases so far say; the same however often it is asked.

    Raises:
        StateInvalid: a log or a reference of another study.
    """
    cases = noted(folder, study, digest)
    carried = read_reference(fingerprint, study, f"release {digest[:12]}")
    profiles = tuple(profile for profile in carried if profile.cases >= FEWEST)
    against: Literal["release", "first cases", "nothing"] = "release"
    begin = 0
    if not profiles:
        begin = WINDOW
        against = "first cases" if len(cases) >= WINDOW else "nothing"
        profiles = (profile_of(study, cases[:WINDOW]),) if against == "first cases" else ()
    starts = list(range(begin, len(cases), WINDOW))[-max(shown, 2) :] if profiles else []
    windows = [(at + 1, watched(profiles, cases[at : at + WINDOW], (digest, at // WINDOW))) for at in starts]
    short = bool(windows) and windows[-1][1].cases < WINDOW
    alarm = any(window.alarm is not None for _, window in windows[-2 if short else -1 :])
    latest = cases[begin:][-WINDOW:]
    differences = _differences(study, profile_of(study, latest), profiles) if profiles and latest else ()
    return Drift(len(cases), against, len(carried), tuple(windows[-shown:]), differences, alarm)


def _differences(study: Study, here: Profile, profiles: Sequence[Profile]) -> tuple[Difference, ...]:
    there = profiles[nearest(here, profiles)]
    apart = divergences(here, there)
    return tuple(
        Difference(
            name,
            apart[name],
            by_chance(here.counts[name], there.counts[name]),
            _middle(study, here, name),
            _middle(study, there, name),
        )
        for name in sorted(apart, key=lambda each: (-apart[each], each))
    )


def _middle(study: Study, profile: Profile, name: str) -> str:
    """The cell of the median case in words."""
    seen = 0
    for at, count in enumerate(profile.counts[name]):
        seen += count
        if 2 * seen >= profile.cases:
            return bounds_text(name, study, at)
    return ""
