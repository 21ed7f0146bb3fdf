"""What a differentially private run has spent of each site's patients, from numbers that stand in the study.

The coordinator knows which updates counted. What a site trained and lost (a process died, a late update was dropped)
stands in the site's own ledger alone, which may therefore say more.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from shared_models.protect.accounting import epsilon
from shared_models.study import Study


def spent(study: Study, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Epsilon by site of the updates that were counted; None for a study that is not differentially private.

    `rounds` are those of report.json.
    """
    privacy, steps = study.protect.privacy, study.train.local_steps
    if privacy is None or steps is None:
        return None

    def figure(updates: int) -> float:
        return ceil(1000 * epsilon([privacy.spend(updates * steps)], privacy.delta)) / 1000 if updates else 0.0

    updates: dict[str, int] = {}
    for line in rounds:
        for site, part in line["sites"].items():
            updates[site] = updates.get(site, 0) + len(part["updates"])
    sites = {site: {"steps": count * steps, "epsilon": figure(count)} for site, count in sorted(updates.items())}
    most = max((row["epsilon"] for row in sites.values()), default=0.0)
    return {
        "delta": privacy.delta,
        "noise_multiplier": privacy.noise_multiplier,
        "sample_rate": privacy.sample_rate,
        "clip_norm": privacy.clip_norm,
        "trained": privacy.trained,
        "planned": figure(study.rounds.count),
        "sites": sites,
        "words": (
            f"Training is differentially private for one patient more or less of a site's training patients: epsilon "
            f"at most {most:.3g} at delta {privacy.delta:g}, by privacy loss distributions, against everybody who sees "
            f"every update of every round. It says nothing of other studies on the same patients, nor of work that was "
            f"lost; a site's own ledger counts both. No site has told a score: of some dozens of patients it would "
            f"need so much noise that it told nothing. What the model is worth each hospital finds out by itself, with "
            f"a release and `fedclient score`."
        ),
    }
