"""What differential privacy costs in Dice: lungs on the phantom, for each patient at epsilon 8 and 3, beside none.

    python -m simulations.bench.private_utility [--seeds N] [--cache DIR] [--workers N] [--json FILE]

Three sites of a hundred training patients and two slices each, twelve test patients; the study `lung-ct-private` (a
U-Net of 12 thousand weights at 32x32, thirty steps that take half of the patients). Noise is what the accountant asks
for the epsilon, all else alike; without privacy the same network takes as many steps on batches of as many slices.
Targets: no epsilon that is told is above what was asked for; at epsilon 8 the mean over sites and seeds stays within
0.2 of training without privacy, and at epsilon 3 above 0.4.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from fedserver.privacy import spent
from fedserver.report import facts
from shared_models.files import write_json
from shared_models.protect.accounting import noise_for
from shared_models.protect.privacy import Protect
from shared_models.study import Study, load_study
from simulations.phantoms import PhantomPlan, phantom
from simulations.run import Machine, carry_out, federation, node_configs, score

EPSILONS = (None, 8.0, 3.0)
PLAN = PhantomPlan(sites=3, train=100, val=1, test=12, slices=2, size=64)
PLAIN_RATE = 5e-3  # learning rate without noise
MOST_LOSS, LEAST = 0.2, 0.4


def study_at(epsilon: float | None, seed: int) -> Study:
    """The ready study with the noise that an epsilon takes; None is training without privacy."""
    study = replace(load_study("lung-ct-private"), seed=seed)
    privacy, steps = study.protect.privacy, study.train.local_steps
    assert privacy is not None, "of the ready study"
    assert steps is not None, "check_private has seen to it"
    if epsilon is None:
        return replace(study, protect=Protect(), train=replace(study.train, learning_rate=PLAIN_RATE))
    noise = noise_for(epsilon, privacy.sample_rate, steps * study.rounds.count, privacy.delta)
    return replace(study, protect=Protect(replace(privacy, noise_multiplier=noise)))


def one(study: Study, data: Path, workers: int) -> dict[str, Any]:
    """Test Dice by site after the whole run, and the epsilon that the report tells."""
    with TemporaryDirectory() as folder:
        nodes = node_configs(Path(folder), [data], Machine(device="cpu"), None)
        run = carry_out(federation("federated", study, nodes), Path(folder), Machine(workers=workers, device="cpu"))
        told = spent(study, facts(run)["rounds"])
        dice = {site: round(part.value, 4) for site, part in score(run, nodes).items()}
    return {"dice": dice, "epsilon": None if told is None else max(row["epsilon"] for row in told["sites"].values())}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.private_utility", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fedimaging" / "phantom")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    data = phantom(asked.cache, PLAN, processes=2)
    means: dict[float | None, float] = {}
    rows, failed = list[dict[str, Any]](), False
    for epsilon in EPSILONS:
        studies = [study_at(epsilon, seed) for seed in range(asked.seeds)]
        found = [one(study, data, asked.workers) for study in studies]
        each = [fmean(row["dice"].values()) for row in found]
        means[epsilon] = fmean(each)
        failed |= epsilon is not None and max(row["epsilon"] for row in found) > epsilon
        privacy = studies[0].protect.privacy
        noise = "" if privacy is None else f"  noise {privacy.noise_multiplier:.3f}, told {found[0]['epsilon']:.3f}"
        print(
            f"{'no privacy' if epsilon is None else f'epsilon {epsilon:g}':12} Dice {means[epsilon]:.3f}"
            f"  by seed {' '.join(f'{value:.3f}' for value in each)}"
            f"  worst site {min(min(row['dice'].values()) for row in found):.3f}{noise}",
            flush=True,
        )
        rows.append({"epsilon": epsilon, "runs": found, "mean": means[epsilon]})
    if asked.json is not None:
        write_json(asked.json, {"rows": rows})
    failed |= means[None] - means[8.0] > MOST_LOSS or means[3.0] < LEAST
    sys.exit(failed)


if __name__ == "__main__":
    main()
