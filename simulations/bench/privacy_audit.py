"""An audit of differentially private training as it is: canaries that an attacker who sees every weight looks for.

    python -m simulations.bench.privacy_audit [--canaries N] [--steps N] [--noise X] [--rate Q]

The attacker of Steinke et al. (2023), section 6: each canary is a patient whose gradient is as long as the clip and
points along a weight of its own; half of them take part, by a coin; how far its weight moved says which. The real
sampling, clipping and noise of `fedclient.training.private` train a linear layer. Targets: the lower bound on epsilon
is never above the epsilon that is accounted for, and at least a tenth of it; without the noise, or when the noise is a
third of what is accounted for, the same guesses disprove the claim.
"""

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedclient.data.cache import Facts, Stored
from fedclient.data.dataset import DataSet
from fedclient.training.chance import Chance
from fedclient.training.private import Normal, fit_private, poisson_lots
from shared_models.preprocess import Geometry
from shared_models.protect.accounting import epsilon
from shared_models.protect.privacy import Privacy
from shared_models.study import Augment, Train
from simulations.audit import Guesses, epsilon_at_least, guesses

DELTA = 1e-5
GRID = Geometry((1, 1, 1), (1.0, 1.0, 1.0), (1,), (0.0,), (1.0,))
LEAST_SHARE = 0.1  # of the claimed epsilon that the bound must reach, or the audit says nothing


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.privacy_audit", description=__doc__)
    parser.add_argument("--canaries", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--noise", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    privacy = Privacy(noise_multiplier=asked.noise, sample_rate=asked.rate, examples_per_patient=1)
    secret = Chance()
    ways: dict[str, Normal | None] = {
        "as it is": None,
        "a third of the noise": lambda count: secret.normal(count) / 3,
        "no noise": np.zeros,
    }
    failed = False
    for name, normal in ways.items():
        found = audit(privacy, asked.canaries, asked.steps, Chance(), normal)
        holds = found.at_least <= found.claimed
        failed |= holds != (normal is None) or (normal is None and found.at_least < LEAST_SHARE * found.claimed)
        print(
            f"{name:20}  claimed epsilon {found.claimed:6.3f}  at least {found.at_least:6.3f}  "
            f"({found.found.right} of {found.found.made} guesses right) {'holds' if holds else 'DISPROVED'}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
