"""What a site sends back, and the sum of many of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared_models.errors import UpdateRejected
from shared_models.weights import BLOCK, Schema, Tensors, difference

UNIT = 2.0**-28  # what one count of the running sum is worth
MOST_CHANGE = 64.0  # largest |element| of a delta; no sound training moves a weight further in a round
MOST_WEIGHT = 2**29  # largest sum of integer weights: MOST_WEIGHT * MOST_CHANGE / UNIT = 2**63


@dataclass(frozen=True, slots=True)
class Update:
    """What one site learned in one round.

    Attributes:
        delta: local minus received weights; names, shapes and dtypes of the model.
        examples: images or patches trained on, counted once each however many epochs; the site's weight in the mean.
        base_sha256: of the weights that the site started from, so that an update cannot be counted in another round.
    """

    site: str
    run: str
    round: int
    study_sha256: str
    base_sha256: str
    delta: Tensors
    examples: int
    plan_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What an update must be to be counted: the round that it answers, and the model.

    Attributes:
        private: the study is differentially private, and the number of examples is no update's to tell.
    """

    run: str
    round: int
    study_sha256: str
    base_sha256: str
    schema: Schema
    most_examples: int = 2**20
    plan_sha256: str | None = None
    private: bool = False


def admit(update: Update, expected: Expected) -> Update:
    """Returns `update` as it came; what gets past may be added.

    Raises:
        UpdateRejected: with the code `STALE_ROUND`, `OTHER_STUDY`, `OTHER_PLAN`, `OTHER_RUN`, `OTHER_WEIGHTS`,
            `EXAMPLES_RANGE`, `UPDATE_SCHEMA`, `UPDATE_NONFINITE` or `UPDATE_RANGE`.
    """
    where = f"round {expected.round}, site {update.site!r}"
    if update.study_sha256 != expected.study_sha256:
        raise UpdateRejected("OTHER_STUDY", f"{where}: trained for another study. Let the site fetch this one.")
    if update.plan_sha256 != expected.plan_sha256:
        raise UpdateRejected("OTHER_PLAN", f"{where}: trained by another plan. Ask it again.")
    if update.run != expected.run:
        raise UpdateRejected(
            "OTHER_RUN", f"{where}: answers run {update.run!r}, not {expected.run!r}. It was left out."
        )
    if update.round != expected.round:
        raise UpdateRejected("STALE_ROUND", f"{where}: answers round {update.round}. It was left out of this round.")
    if update.base_sha256 != expected.base_sha256:
        raise UpdateRejected("OTHER_WEIGHTS", f"{where}: did not start from this round's weights. Ask it again.")
    if expected.private and update.examples:
        raise UpdateRejected(
            "EXAMPLES_RANGE",
            f"{where}: tells its number of examples in a differentially private study. It was left "
            f"out; install the released client there.",
        )
    if not expected.private and not 0 < update.examples <= expected.most_examples:
        raise UpdateRejected(
            "EXAMPLES_RANGE",
            f"{where}: claims {update.examples} examples, allowed are 1 to {expected.most_examples}. "
            f"See the site's manifest.",
        )
    if problem := difference(expected.schema, update.delta.schema):
        raise UpdateRejected(
            "UPDATE_SCHEMA", f"{where}: {problem}. Site and coordinator must run the same released version."
        )
    for name, spec in expected.schema.items():
        if spec.dtype.kind != "f":
            continue
        for block in update.delta.blocks(name):
            largest = float(np.abs(block).max()) if block.size else 0.0
            if not np.isfinite(largest):
                raise UpdateRejected(
                    "UPDATE_NONFINITE",
                    f"{where}: {name!r} holds NaN or infinity. Its training diverged: lower `train.learning_rate` "
                    f"or set `train.clip_gradient` in the study.",
                )
            if largest > MOST_CHANGE:
                raise UpdateRejected(
                    "UPDATE_RANGE",
                    f"{where}: {name!r} moved by {largest:.3g}, allowed is {MOST_CHANGE:g}. "
                    f"Lower `train.learning_rate`.",
                )
    return update


class Total:
    """The running sum of `weight * delta`: all that a round holds, whatever the number of sites.

    Fixed point of `UNIT` in int64, so that the sum is exact and the order of arrival cannot show in it (and so that
    secure aggregation, a sum in a ring, can take its place). Twice the size of a float32 model. `add` changes it.

    Attributes:
        weight: of all that was added.
        stretch: what the means are multiplied by.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.weight = 0
        self.stretch = 1.0
        self.sums: dict[str, NDArray[np.int64]] = {
            name: np.zeros(int(np.prod(spec.shape, dtype=np.int64)), np.int64) for name, spec in schema.items()
        }

    def add(self, delta: Tensors, weight: int, factor: float = 1.0) -> None:
        """Adds an admitted delta; `weight` is a whole number above 0 (McMahan et al. 2017, Algorithm 1: n_k).

        Args:
            factor: what the delta is multiplied by, above 0 and at most 1; whole-number tensors are added as they are.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"factor {factor}: must lie above 0 and not above 1, or the sum may overflow")
        if not 0 < weight <= MOST_WEIGHT - self.weight:
            raise ValueError(f"weight {weight} after {self.weight}: the sum of weights must stay below {MOST_WEIGHT}")
        self.weight += weight
        for name, spec in self.schema.items():
            at, sums = 0, self.sums[name]
            for block in delta.blocks(name):
                into = sums[at : at + block.size]
                if spec.dtype.kind == "f":
                    scaled = np.multiply(block, weight * factor / UNIT, dtype=np.float64)
                    into += np.rint(scaled, out=scaled).astype(np.int64)
                else:
                    into += block.astype(np.int64) * weight
                at += block.size

    def take_mean(self, name: str) -> NDArray[np.float64] | NDArray[np.int64]:
        """The weighted mean of one tensor times `stretch`, in the memory of its sum; integers stay what they are
        (nearest)."""
        spec, sums = self.schema[name], self.sums.pop(name)
        whole = spec.dtype.kind != "f"
        unit = 1.0 if whole else UNIT * self.stretch
        means = sums if whole else sums.view(np.float64)
        for at in range(0, sums.size, BLOCK):
            mean = sums[at : at + BLOCK] * (unit / max(self.weight, 1))
            means[at : at + BLOCK] = np.rint(mean) if whole else mean
        return means.reshape(spec.shape)


def weight_of(examples: int, weighting: str, staleness_weight: float = 1.0) -> int:
    """A site's whole-number share in the mean; uniform and stale shares are counted in 1/1024."""
    if weighting == "uniform":
        return max(1, round(1024 * staleness_weight))
    return max(1, round(examples * staleness_weight)) if staleness_weight != 1.0 else examples
