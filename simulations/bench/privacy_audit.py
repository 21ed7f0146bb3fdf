"""An audit of differentially private training as it is: canaries that an attacker who sees every weight looks for.

    python -m simulations.bench.privacy_audit [--canaries N] [--steps N] [--noise X] [--rate Q]

The attack of simulations/attacks/claim.py at any size. Targets: the lower bound on epsilon is never above the epsilon
that is accounted for, and at least a tenth of it; without the noise, or when the noise is a third of what is accounted
for, the same guesses disprove the claim.
"""

import argparse
import sys

import numpy as np
import torch

from fedclient.training.chance import Chance
from fedclient.training.private import Normal
from shared_models.protect.privacy import Privacy
from simulations.attacks.claim import audit

LEAST_SHARE = 0.1  # of the claimed epsilon that the bound must reach, or the audit says nothing


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
