"""What a differentially private run has spent of each site's patients, from numbers that stand in the study.

The coordinator knows which updates counted. What a site trained and lost (a process died, a late update was dropped)
stands in the site's own ledger alone, which may therefore say more. Weights that a run began with hold what they were
trained on: what earlier private runs have spent is added, and of one without privacy no epsilon bounds anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from shared_models.protect.accounting import Spend, epsilon
from shared_models.study import Study


@dataclass(frozen=True, slots=True)
class Before:
    """An earlier run whose weights a run goes back to: up to `round`, whose lines `rounds` are; no study is known of a
    file that is from elsewhere."""

    run: str = ""
    round: int = 0
    study: Study | None = None
    rounds: Sequence[Mapping[str, Any]] = ()


def spent(study: Study, rounds: Sequence[Mapping[str, Any]], earlier: Sequence[Before] = ()) -> dict[str, Any] | None:
    """Epsilon by site of the updates that were counted; None for a study that is not differentially private.

    `rounds` are those of report.json; `bounded` is false where the weights hold what no epsilon bounds, and None where
    that is not known.
    """
    privacy, steps = study.protect.privacy, study.train.local_steps
    if privacy is None or steps is None:
        return None
    delta = privacy.delta

    def figure(spends: Sequence[Spend]) -> float:
        return ceil(1000 * epsilon(spends, delta)) / 1000 if spends else 0.0

    own = _spends(study, rounds)
    sites = {site: ([spend] if spend.steps else []) for site, spend in own.items()}
    for before in earlier:
        for site, spend in _spends(before.study, before.rounds).items():
            sites.setdefault(site, []).extend([spend] if spend.steps else [])
    rows = {
        site: {"steps": own[site].steps if site in own else 0, "epsilon": figure(spends)}
        for site, spends in sorted(sites.items())
    }
    most = max((float(row["epsilon"]) for row in rows.values()), default=0.0)
    bounded = _bounded(earlier)
    return {
        "delta": delta,
        "noise_multiplier": privacy.noise_multiplier,
        "sample_rate": privacy.sample_rate,
        "clip_norm": privacy.clip_norm,
        "trained": privacy.trained,
        "planned": figure([privacy.spend(study.rounds.count * steps)]),
        "sites": rows,
        "bounded": bounded,
        "words": _began(earlier, bounded)
        + (
            f"Training is differentially private for one patient more or less of a site's training patients: epsilon "
            f"at most {most:.3g} at delta {delta:g}, by privacy loss distributions, against everybody who sees "
            f"every update of every round. It says nothing of other studies on the same patients, nor of work that was "
            f"lost; a site's own ledger counts both. No site has told a score: of some dozens of patients it would "
            f"need so much noise that it told nothing. What the model is worth each hospital finds out by itself, with "
            f"a release and `fedclient score`."
        ),
    }


def _spends(study: Study | None, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Spend]:
    """Site -> what its counted updates have spent; of a study without privacy nothing is known."""
    privacy, steps = (None, None) if study is None else (study.protect.privacy, study.train.local_steps)
    if privacy is None or steps is None:
        return {}
    updates: dict[str, int] = {}
    for line in rounds:
        for site, part in line["sites"].items():
            updates[site] = updates.get(site, 0) + len(part["updates"])
    return {site: privacy.spend(count * steps) for site, count in updates.items()}


def _began(earlier: Sequence[Before], bounded: bool | None) -> str:
    """What the first weights bring with them, before all other words."""
    if not earlier:
        return ""
    parts = []
    for before in earlier:
        private = before.study is not None and before.study.protect.privacy is not None
        run = f"round {before.round} of run {before.run}{'' if private else ', which was not differentially private'}"
        parts.append("a file of which it is not known here what it was trained on" if before.study is None else run)
    began = f"began with weights that go back to {' and to '.join(parts)}"
    if bounded:
        return f"It {began}: what was spent there is in the figures here. "
    if bounded is None:
        return (
            f"It {began}. If that was patients, nothing here bounds what the weights hold of them: the "
            f"following is of what was trained since. "
        )
    return (
        f"NOT PRIVATE AS A WHOLE: it {began}. Nothing bounds what the weights hold of those patients: the following is "
        f"of what was trained since. "
    )


def _bounded(earlier: Sequence[Before]) -> bool | None:
    """Whether all that the weights go back to was private; None where that is not known."""
    known = [before.study.protect.privacy is not None for before in earlier if before.study is not None]
    return False if not all(known) else None if len(known) < len(earlier) else True
