"""The claimed epsilon put to the test in one training run: canaries that an attacker who sees every weight looks for.

The attacker of Steinke et al. (2023), section 6: each canary is a patient whose gradient is as long as the clip and
points along a weight of its own; half of them take part, by a coin; how far its weight moved says which. The real
sampling, clipping and noise of `fedclient.training.private` train a linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedclient.data.cache import Facts, Stored
from fedclient.data.dataset import DataSet
from fedclient.training.chance import Chance
from fedclient.training.private import Normal, fit_private, poisson_lots
from shared_models.protect.accounting import Spend, epsilon
from shared_models.protect.privacy import Privacy
from shared_models.study import Augment, Study, Train
from simulations.attacks.finding import Finding, Row
from simulations.attacks.people import GRID
from simulations.audit import Guesses, epsilon_at_least, guesses

DELTA = 1e-5
MOST_CLAIMED = 4.0  # what so many canaries can disprove
LEAST_NOISE = 1.0


@dataclass(frozen=True, slots=True)
class Audit:
    """What was claimed, and what guesses after one run say of it."""

    claimed: float
    at_least: float
    found: Guesses


def audit(privacy: Privacy, canaries: int, steps: int, chance: Chance, normal: Normal | None = None) -> Audit:
    """Trains once with canaries and looks for them; `normal` is other noise than what is accounted for."""
    took_part = chance.taken(canaries, 0.5)
    members = np.flatnonzero(took_part)
    cases = DataSet(tuple(_canary(int(n), canaries) for n in members))
    net = nn.Linear(canaries, 1, bias=False)
    nn.init.zeros_(net.weight)
    train = Train(local_steps=steps, batch_size=1, optimizer="sgd", learning_rate=1.0, precision="float32")
    lots = poisson_lots(cases, [np.array([n]) for n in range(len(members))], privacy, steps, Augment(), chance)
    fit_private(net, lots, lambda logits, _: -logits.mean(), train, privacy, chance, normal)
    scores: NDArray[np.float64] = net.weight.detach().double().numpy().ravel()
    claimed = epsilon([privacy.spend(steps)], DELTA)
    tried = [guesses(scores, took_part, each) for each in {canaries // 2, canaries // 8, canaries // 32}]
    # the best of three numbers of guesses, each at a third of the risk (Bonferroni)
    bounds = {found: epsilon_at_least(found, DELTA, 1 - 0.05 / len(tried)) for found in tried}
    best = max(bounds, key=bounds.__getitem__)
    return Audit(claimed, bounds[best], best)


def _canary(place: int, canaries: int) -> Stored:
    image = np.zeros((1, canaries), np.float16)
    image[0, place] = 1000.0  # far above the clip
    return Stored(f"{place:06d}", image, np.zeros((1, 1), np.uint8), Facts(GRID, 0))


def attack(study: Study, example: Privacy, canaries: int, tick: Callable[[], None] = lambda: None) -> Finding:
    """Audits the mechanism as it is and without its noise, which has to be found out."""
    own = study.protect.privacy
    noise = max((own or example).noise_multiplier, LEAST_NOISE)
    steps = most_steps(noise)
    privacy = Privacy(noise_multiplier=noise, sample_rate=1.0, examples_per_patient=1)
    honest = audit(privacy, canaries, steps, Chance())
    tick()
    silent = audit(privacy, canaries, steps, Chance(), np.zeros)
    tick()
    less = f" (the study's own, {own.noise_multiplier:g}, is less)" if own and own.noise_multiplier < noise else ""
    least = f"epsilon at least ({honest.claimed:.3g} claimed)"
    rows = (
        Row("nothing: accounted for, the noise left out", least, silent.at_least, f"above {silent.claimed:.3g}",
            silent.at_least > silent.claimed, control=True),
        Row("differential privacy", least, honest.at_least, f"at most {honest.claimed:.3g}",
            honest.at_least <= honest.claimed, study=own is not None and own.noise_multiplier >= LEAST_NOISE),
    )  # fmt: skip
    return Finding(
        "claim",
        "One-run audit of the mechanism and its claimed epsilon",
        f"{canaries} canaries, each a patient with a weight of its own, half of them in (Steinke et al. 2023); {steps} "
        f"step(s) with noise {noise:g}{less}, all patients in each, delta {DELTA:g}. What sampling adds to privacy "
        f"is not audited, nor the study's own number of steps.",
        rows,
        f"An attacker who sees every weight and made the patients up proves epsilon {honest.at_least:.2f}, where "
        f"{honest.claimed:.2f} is accounted for ({honest.found.right} of {honest.found.made} guesses right); without "
        f"the noise {silent.at_least:.2f}." + ("" if own else " The study itself has no differential privacy."),
    )


def most_steps(noise: float) -> int:
    """The most steps, up to a hundred, whose epsilon these canaries could disprove; at least one."""
    steps = 1
    while steps < 100 and _cost(noise, steps + 1) <= MOST_CLAIMED:
        steps += 1
    return steps


def _cost(noise: float, steps: int) -> float:
    """Steps of one Gaussian mechanism without sampling are one with less noise (Dong et al. 2022, corollary 3.3)."""
    return epsilon([Spend(max(noise / steps**0.5, 0.3), 1.0, 1)], DELTA)
