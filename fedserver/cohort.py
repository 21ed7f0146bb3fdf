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
        invited: those of them that have not joined yet, and may never.
    """

    nodes: Mapping[str, int]
    away: Mapping[str, str] = field(default_factory=dict)
    invited: frozenset[str] = frozenset()

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted({*self.nodes, *self.away}))


def choose(study: Study, round_number: int, presence: Presence) -> tuple[str, ...]:
    """The cohort of a round: a function of (seed, study, round) and of who is enrolled, not of who is quick."""
    if study.rounds.cohort == 1.0:
        return presence.sites
    sites = tuple(site for site in presence.sites if site not in presence.invited)
    share = ceil(study.rounds.cohort * len(sites) - 1e-9)  # 0.07 * 100 is a little above 7
    size = min(len(sites), max(study.rounds.quorum, share))
    order = rng(study.seed, study.name, "cohort", round_number).permutation(len(sites))
    return tuple(sorted(sites[i] for i in order[:size]))
