"""What differentially private training costs: (epsilon, delta) of noisy steps, for one patient more or less.

The unit is the patient: one who is added or removed changes the clipped sum of a step by at most the clip. A step takes
each patient with probability `sample_rate`, independently (Poisson sampling), and adds Gaussian noise of
`noise_multiplier` clips. Privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022) give the figure,
Rényi differential privacy (Mironov et al. 2019) an upper bound that it is checked against.

Only what is trained this way is differentially private. Clipping alone, compression, noise that nobody accounts for and
secure aggregation are not, whatever else they are good for.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log
from typing import Annotated

from pydantic import Field

from shared_models.parse import STRICT

NOISES = (0.3, 1000.0)  # below, epsilon is in the hundreds and says nothing
HUGE, FAR = 300.0, 20.0  # of the bound: the exact figure would take gigabytes; times a limit: it is above it surely
CLOSE = 0.001  # relative, of noise that is looked for


@dataclass(frozen=True, slots=True)
class Spend:
    """Some steps of differentially private training on the patients of one data set.

    Attributes:
        noise_multiplier: deviation of the noise over the largest change that one patient makes.
        sample_rate: probability with which a step takes a patient.
    """

    __pydantic_config__ = STRICT
    noise_multiplier: Annotated[float, Field(ge=NOISES[0], le=NOISES[1], allow_inf_nan=False)]
    sample_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    steps: Annotated[int, Field(ge=1, le=10**9)]


def epsilon(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon at `delta` of all of `spends` together, by privacy loss distributions; 0 for none.

    They cut off what is rarer than about 1e-15 a distribution, count it as lost and say infinity of a smaller delta;
    the bound is the lesser one there.
    """
    together = _merged(spends)
    return min(_epsilon(together, delta, "pld"), _epsilon(together, delta, "rdp"))


def epsilon_bound(spends: Iterable[Spend], delta: float) -> float:
    """The same by Rényi differential privacy: quicker, and a tenth too high; many times for few steps at a low rate."""
    return _epsilon(_merged(spends), delta, "rdp")


def epsilon_beside(limit: float, spends: Iterable[Spend], delta: float) -> float:
    """Epsilon to hold against a limit: above it exactly where `epsilon` is, unless memory is too short to know that.

    The bound where it keeps the limit, or where it is so far above that the exact figure could take all memory; else
    the exact one.
    """
    all_of_them = tuple(spends)
    bound = epsilon_bound(all_of_them, delta)
    if bound <= limit or bound > max(HUGE, FAR * limit):
        return bound
    try:
        return epsilon(all_of_them, delta)
    except MemoryError:
        return bound


def noise_for(target: float, sample_rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier, to two thousandths, that keeps `steps` steps within epsilon `target` at `delta`.

    Raises:
        ValueError: no noise that is allowed does.
    """
    # what the quicker bound allows is enough; from there down, the exact figure meets the target after a few steps
    high = _root(lambda noise: _over(epsilon_bound([Spend(noise, sample_rate, steps)], delta), target), *NOISES)
    low = high

    def over(noise: float) -> float:
        return _over(epsilon([Spend(noise, sample_rate, steps)], delta), target)

    while low > NOISES[0] and over(low) <= 0:
        low, high = max(NOISES[0], 0.93 * low), low
    return _root(over, low, high)


def steps_within(target: float, spent: Iterable[Spend], asked: Spend, delta: float) -> int:
    """At least so many of the steps that are `asked` for fit into epsilon `target` beside `spent`.

    By the quicker bound, which every step count that it allows keeps.
    """
    before, low, high = tuple(spent), 0, asked.steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon_bound([*before, replace(asked, steps=middle)], delta) <= target:
            low = middle
        else:
            high = middle
    return low


def _merged(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Steps of the same settings together: their order does not matter, and each setting costs its own convolution."""
    steps: dict[tuple[float, float], int] = {}
    for spend in spends:
        setting = (spend.noise_multiplier, spend.sample_rate)
        steps[setting] = steps.get(setting, 0) + spend.steps
    return tuple(Spend(*setting, count) for setting, count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float, by: str) -> float:
    import dp_accounting as dp  # 2 s and scipy: a node that trains without differential privacy never needs it

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of Rényi orders that it leaves out, which is sound
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta:g}; allowed are numbers between 0 and 1, well below one over the patients")
    accountant = dp.pld.PLDAccountant() if by == "pld" else dp.rdp.RdpAccountant()
    for spend in spends:
        noisy = dp.GaussianDpEvent(spend.noise_multiplier)
        step = dp.PoissonSampledDpEvent(spend.sample_rate, noisy) if spend.sample_rate < 1 else noisy
        accountant.compose(dp.SelfComposedDpEvent(step, spend.steps))
    return float(accountant.get_epsilon(delta)) if spends else 0.0


def _over(found: float, target: float) -> float:
    """How far above the target, by factors of e; much noise at a large delta costs nothing at all."""
    return log(max(found, 1e-9) / target)


def _root(over: Callable[[float], float], low: float, high: float) -> float:
    """Where falling `over` is at or just below 0, between `low` and `high`."""
    from scipy.optimize import brentq

    if over(low) <= 0:
        return low
    if over(high) > 0:
        raise ValueError(f"no noise up to {high:g} clips is enough: take fewer steps, or more patients")
    return min(high, float(brentq(over, low, high, rtol=CLOSE, xtol=CLOSE * low)) * (1 + CLOSE))
