"""`[protect.secure_aggregation]` of a study: the coordinator learns the sum of a round's updates, and none by itself.

What a study says decides every number of a secure sum but who takes part: a site makes the context anew from the study
that it approved and compares (`wanted`), so that a coordinator can choose sites, and nothing else.

A site's share of the mean is its weight over the most that the cohort could weigh: `most_examples` for each site (1
with uniform weighting), a number that everybody knows. So the example counts need no sum of their own before the round;
the sum of the weights is a count in the vector itself, and what the bound costs is resolution: 2**-31 * clip *
most_examples / mean number of examples, for each site. That sum is known, so weighting by examples tells how many a
site has when it alone comes or goes between two rounds; uniform weighting tells nothing.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from shared_models.parse import STRICT
from shared_models.protect.context import LEAST_SITES, Context, least_threshold
from shared_models.protect.counted import names_of
from shared_models.protect.counted_plan import plan_names
from shared_models.protect.ring import Layout, encoding
from shared_models.weights import Schema

if TYPE_CHECKING:
    from shared_models.study import Study

STEPS = 5  # of a sum, after the training: keys, shares, vectors, confirmations, shares of the masks


@dataclass(frozen=True, slots=True)
class SecureAggregation:
    """`[protect.secure_aggregation]`; `secure_aggregation = true` under `[protect]` is this table with its defaults.

    `rounds.quorum` is the least cohort: of fewer sites no sum is made.

    Attributes:
        clip: largest |element| of an update; what lies beyond is clipped, and how often is counted in the sum.
        ring_bits: of an element of the sum; 24 sends a quarter less and is 256 times coarser.
        threshold: share of a sum's sites that must stay to its end; above two thirds.
        most_examples: with weighting by examples, what a site weighs at most; one with more examples counts as so many.
        step_s: longest wait for each of the five steps after the training, inside `rounds.deadline_s`.
    """

    __pydantic_config__ = STRICT
    clip: Annotated[float, Field(ge=1e-6, le=64, allow_inf_nan=False)] = 1.0
    ring_bits: Literal[24, 32] = 32
    threshold: Annotated[float, Field(gt=2 / 3, le=1)] = 0.67
    most_examples: Annotated[int, Field(ge=1, le=2**20)] = 2**14
    step_s: Annotated[float, Field(gt=0, le=86400)] = 60.0


def _table(value: object) -> object:
    """`true` is the table with its defaults, `false` none."""
    return ({} if value else None) if isinstance(value, bool) else value


Secured: TypeAlias = Annotated[SecureAggregation | None, BeforeValidator(_table)]


def check_secure(study: "Study") -> None:
    """Raises ValueError, naming key and remedy, where the rest of a study needs what a secure sum hides."""
    table = study.protect.secure_aggregation
    if table is None:
        return
    strategy, rounds = study.strategy, study.rounds
    for broken, words in (
        (
            strategy.robust != "none",
            'strategy.robust must be "none": a robust rule looks at each update by itself, and a secure sum shows '
            "their sum alone. Choose one of the two: robustness against sites, or privacy towards the coordinator",
        ),
        (
            strategy.weighting == "inverse_variance",
            'strategy.weighting must be "uniform" or "examples": "inverse_variance" compares a number of each site',
        ),
        (
            strategy.normalise_steps,
            "strategy.normalise_steps must be false: it divides each update by the steps of its site, which are not "
            "told",
        ),
        (
            rounds.late != "drop",
            'rounds.late must be "drop": masks are made for one set of sites, a late vector fits no other sum',
        ),
        (
            study.train.scaffold,
            "train.scaffold must be false: a control variate is a gradient, which no clip that is made for weights "
            "bounds, and clipped ones would pull all sites aside",
        ),
        (
            study.evaluate.reference,
            "evaluate.reference must be false: it keeps what each site counts apart, and a secure sum shows their sum",
        ),
        (
            study.model.norm == "batch",
            'model.norm must be "group" or "instance": batch norm counts its batches in whole numbers, which a sum of '
            "clipped fractions cannot carry",
        ),
        (
            rounds.quorum < LEAST_SITES,
            f"rounds.quorum must be {LEAST_SITES} or more, it is {rounds.quorum}: of two sites each knows the other's "
            f"update from the sum",
        ),
        (
            rounds.deadline_s <= 2 * STEPS * table.step_s,
            f"rounds.deadline_s must be above {2 * STEPS * table.step_s:g}: it is {rounds.deadline_s:g}, and "
            f"{STEPS} steps of protect.secure_aggregation.step_s = {table.step_s:g} are part of it",
        ),
    ):
        if broken:
            raise ValueError(f"with protect.secure_aggregation {words}")


def training_s(study: "Study") -> float:
    """How much of a round's deadline the training has."""
    table = study.protect.secure_aggregation
    return study.rounds.deadline_s - (0.0 if table is None else STEPS * table.step_s)


def weight_bound(study: "Study", trained: bool) -> int:
    """What one site weighs at most; scores alone weigh the same of every site."""
    table = study.protect.secure_aggregation
    assert table is not None
    return table.most_examples if trained and study.strategy.weighting == "examples" else 1


def weight_in_sum(study: "Study", examples: int, trained: bool) -> int:
    """What a site weighs."""
    return min(examples, weight_bound(study, trained)) if weight_bound(study, trained) > 1 else 1


def layout_of(study: "Study", schema: Schema, trained: bool, scored: bool, planning: bool = False) -> Layout:
    """What stands where in a vector of the study.

    Args:
        schema: of the update; empty where scores alone are summed.
        scored: whether the sites score the weights that they receive.
        planning: whether the sum is that of the histograms that a plan follows from.
    """
    if planning:
        return Layout(schema, plan_names())
    return Layout(schema, names_of(study, trained, scored))


def wanted(
    study: "Study",
    *,
    run: str,
    round_number: int,
    attempt: int,
    cohort: tuple[str, ...],
    roster_sha256: str,
    model_sha256: str,
    layout: Layout,
    study_sha256: str,
    trained: bool,
) -> Context:
    """The context of a sum, every number but the first few by the study."""
    table, sites = study.protect.secure_aggregation, len(cohort)
    assert table is not None
    how = encoding(table.clip, table.ring_bits)
    return Context(
        run=run,
        round=round_number,
        attempt=attempt,
        cohort=cohort,
        threshold=threshold_of(table, sites),
        least_cohort=study.rounds.quorum,
        roster_sha256=roster_sha256,
        model_sha256=model_sha256,
        schema_sha256=layout.sha256,
        policy_sha256=study_sha256,
        whole=max(1, sites * weight_bound(study, trained)),
        clip=how.clip,
        scale=how.scale,
        ring_bits=table.ring_bits,
    )


def threshold_of(table: SecureAggregation, sites: int) -> int:
    """How many of the sites of a sum must stay to its end."""
    return max(least_threshold(sites), ceil(sites * table.threshold - 1e-9))


def round_of(kind: str, round_number: int) -> int:
    """The number of a sum: scores of the last weights are one of their own, after all rounds; that of the histograms
    of a plan is 0."""
    return round_number + 1 if kind == "evaluate" else round_number
