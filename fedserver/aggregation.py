"""What the updates of a round become: one running sum where the mean is enough, a spool on disk for rules over all."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedserver.spool import Spool
from shared_models.errors import UpdateRejected
from shared_models.study import Study, Train
from shared_models.update import Total, weight_of
from shared_models.weights import Schema, Tensors
from shared_models.wire import Reply


@dataclass(slots=True)
class Fold:
    """The updates of one round so far; `add` changes it.

    Attributes:
        study: as its sites train it, with the plan in it where they have made one.
        into: a running sum in memory, or a spool on disk.
        steps: (site, round) -> (weight, length of its steps), where a study divides by it.
    """

    study: Study
    number: int
    into: Total | Spool
    steps: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)

    @property
    def schema(self) -> Schema:
        return self.into.schema

    @property
    def one_vote(self) -> bool:
        """Whether a late update and the round's own of one site are one too many."""
        return isinstance(self.into, Spool)

    def add(self, site: str, round_number: int, delta: Tensors, reply: Reply) -> bool:
        """Counts an admitted update; False where the site has sent a newer one and may have one alone.

        An older update weighs less in a mean, and is shortened for a rule that knows no weights (Xie et al. 2019,
        section 3: either way it moves the model less).

        Raises:
            UpdateRejected: with `STEPS_RANGE`; nothing was added.
        """
        strategy, stale = self.study.strategy, self.study.rounds.late_weight ** (self.number - round_number)
        if isinstance(self.into, Spool):
            if strategy.weighting == "inverse_variance":
                return self.into.add(site, round_number, delta, stale, 1.0, reply.variance)
            if strategy.robust == "norm_bound":
                weight = weight_of(reply.examples, strategy.weighting, stale)
                return self.into.add(site, round_number, delta, weight, 1.0)
            return self.into.add(site, round_number, delta, 1.0, stale)
        weight, length = weight_of(reply.examples, strategy.weighting, stale), 1.0
        if strategy.normalise_steps:
            length = way(doubted_steps(self.study.train, site, reply), self.study.train.momentum)
        self.into.add(delta, weight, 1 / length)
        self.steps[site, round_number] = weight, length
        return True

    def take_mean(self, name: str) -> NDArray[np.float64] | NDArray[np.int64]:
        if isinstance(self.into, Total):
            self.into.stretch = self._length()
        return self.into.take_mean(name)

    def _length(self) -> float:
        """FedNova's effective steps (Wang et al. 2020, section 4.2): the mean length, by the weights of the mean."""
        parts = [self.steps[key] for key in sorted(self.steps)]  # in an order that is not that of arrival
        return sum(w * length for w, length in parts) / max(1, sum(w for w, _ in parts))

    def used(self) -> list[str] | None:
        """Sites whose update a rule picked, where it picks."""
        return self.into.used() if isinstance(self.into, Spool) else None


def fold(study: Study, number: int, schema: Schema, spool: Path) -> Fold:
    """An empty one for a round; `spool` is a folder of its own."""
    spooled = study.strategy.robust != "none" or study.strategy.weighting == "inverse_variance"
    return Fold(study, number, Spool(schema, spool, study.strategy) if spooled else Total(schema))


def way(steps: int, momentum: float) -> float:
    """How many plain steps so many steps with momentum come to: the 1-norm of `a_i` (Wang et al. 2020, section 4.1)."""
    if momentum == 0:
        return float(steps)
    length = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    return max(1.0, length)  # of a single step it is rounded to a hair less, and its delta would be stretched


def doubted_steps(train: Train, site: str, reply: Reply) -> int:
    """The steps that a site tells, which follow from its examples; a site that tells fewer would weigh more."""
    due = train.steps(reply.examples)
    if reply.steps != due:
        raise UpdateRejected(
            "STEPS_RANGE",
            f"round {reply.round}, site {site!r}: tells {reply.steps} steps, its {reply.examples} examples make "
            f"{due}. Site and coordinator must run the same released version.",
        )
    return reply.steps
