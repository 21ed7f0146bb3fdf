"""What unlabelled cases are worth: lungs on chest X-rays of three hospitals, a tenth of the labels, a mean teacher.

    python -m simulations.bench.few_labels --data DIR [--seeds N ...] [--share S] [--tune] [--work DIR] [--json FILE]

A small form of the study `chest-xray` (64x64, a U-Net of 126 thousand weights, 12 rounds of 10 steps at each site), so
that it takes minutes on one core. One arm learns from the labelled tenth of each hospital's training patients alone,
the other from the rest as well, without their labels: same weights to begin with, same labelled batches, same number of
steps. What is told is the mean Dice over all patients of the federation.

`--tune` compares the settings of `CANDIDATES` by their validation patients; test patients are not looked at.
Target: over the seeds the mean test Dice rises by 0.02 or more.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from fedclient.site import open_site
from fedserver.checkpoint import read_state
from shared_models.files import write_json
from shared_models.scores import total, value_of
from shared_models.study import Study, load_study
from shared_models.weights import load
from shared_models.wire import Split
from simulations.engine import NodeConfig
from simulations.hidden import hidden
from simulations.run import Machine, carry_out, federation, node_configs
from simulations.settings import Changes, changed

SMALL: Changes = {
    "model": {"features": [8, 8, 16, 32, 64, 8]},
    "preprocess": {"size": [64, 64]},
    "train": {"local_steps": 10, "learning_rate": 2e-3, "schedule": "cosine"},
    "strategy": {"weighting": "uniform"},
    "rounds": {"count": 12},
    "evaluate": {"every": 0},
}
TEACHER: Changes = {"method": "mean_teacher", "ramp_rounds": 4, "mix": True}
CANDIDATES: Mapping[str, Changes] = {
    "teacher-10-mixed": {"unlabelled": {**TEACHER, "weight": 10.0}},
    "teacher-30-mixed": {"unlabelled": {**TEACHER, "weight": 30.0}},
    "teacher-3-mixed": {"unlabelled": {**TEACHER, "weight": 3.0}},
    "teacher-10": {"unlabelled": {**TEACHER, "weight": 10.0, "mix": False}},
}
CHOSEN = "teacher-10-mixed"
PLAIN = "labelled-only"
LEAST = 0.02  # of test Dice, that the teacher is to be worth


def dice(study: Study, name: str, nodes: Mapping[str, NodeConfig], work: Path, split: Split) -> float:
    """Mean Dice over all patients of a split, by the weights of the last round; the run goes on in `work`."""
    from fedclient.training.learner import ImageLearner  # imports torch

    run = carry_out(federation(name, study, nodes), work, Machine(device="cpu"))
    weights = load(run.weights(read_state(run).round))
    label = study.task.answers[0]
    found = [ImageLearner().score(open_site(config), study, weights, split)[label] for config in nodes.values()]
    return value_of(total(found))


def compared(
    arms: Mapping[str, Study], data: Path, share: float, seeds: Sequence[int], work: Path, split: Split
) -> dict[str, list[float]]:
    """Arm -> Dice of each seed."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    first = next(iter(arms.values()))
    nodes = hidden(
        first, node_configs(work, [data], Machine(device="cpu"), None), share, work, lambda said: print(said)
    )
    for seed in seeds:
        for arm, study in arms.items():
            found[arm].append(dice(replace(study, seed=seed), f"{arm}-{seed}", nodes, work, split))
            print(f"seed {seed}  {arm:20} {split} Dice {found[arm][-1]:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.few_labels", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="chest X-rays with a manifest.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.1, help="of the training patients that keep their labels")
    parser.add_argument("--tune", action="store_true", help="compare settings on validation patients instead")
    parser.add_argument("--work", type=Path, help="folder of the runs, which go on there; else a temporary one")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    plain = changed(load_study("chest-xray"), "small", SMALL)
    settings = CANDIDATES if asked.tune else {CHOSEN: CANDIDATES[CHOSEN]}
    arms = {PLAIN: plain} | {name: changed(plain, name, each) for name, each in settings.items()}
    with TemporaryDirectory() as folder:
        split: Split = "val" if asked.tune else "test"
        found = compared(arms, asked.data, asked.share, asked.seeds, asked.work or Path(folder), split)
    means = {arm: fmean(values) for arm, values in found.items()}
    results: dict[str, Any] = {"split": split, "share": asked.share, "dice": found, "means": means}
    for arm, mean in means.items():
        print(f"{arm:20} {split} Dice {mean:.4f}  by seed {' '.join(f'{value:.4f}' for value in found[arm])}")
    gain = None if asked.tune else means[CHOSEN] - means[PLAIN]
    if gain is not None:
        results["gain"] = gain
        print(f"mean teacher above labelled only: {gain:+.4f} (target {LEAST})")
    if asked.json is not None:
        write_json(asked.json, results)
    sys.exit(gain is not None and gain < LEAST)


if __name__ == "__main__":
    main()
