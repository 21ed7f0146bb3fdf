"""Who can be asked, and who is asked in a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from shared_models.seeds import rng
from shared_models.study import Study


@dataclass(frozen=True, slots=True)
class Presence:
    """Which sites can be asked now.

    Attributes:
        nodes: site -> number of its Flower node, online.
        away: site -> why it cannot be asked, in words for `status`.
    """

    nodes: Mapping[str, int]
    away: Mapping[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted({*self.nodes, *self.away}))


def choose(study: Study, round_number: int, presence: Presence) -> tuple[str, ...]:
    """The cohort of a round: a function of (seed, study, round) and of who is enrolled, not of who is quick."""
    sites = presence.sites
    if study.rounds.cohort == 1.0:
        return sites
    size = min(len(sites), max(study.rounds.quorum, ceil(study.rounds.cohort * len(sites))))
    order = rng(study.seed, study.name, "cohort", round_number).permutation(len(sites))
    return tuple(sorted(sites[i] for i in order[:size]))
