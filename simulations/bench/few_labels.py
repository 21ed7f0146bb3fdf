"""What unlabelled cases are worth: lungs on chest X-rays of three hospitals, a tenth of the labels, a mean teacher.

    python -m simulations.bench.few_labels --data DIR [--seeds N] [--share S] [--workers N] [--device D] [--out DIR]

The study `chest-xray` as it is, but that each hospital has labels of a tenth of its training patients. One setting
learns from these alone, the others from the rest of the images as well: same weights to begin with, same labelled
batches, same number of steps. It is a comparison as `fedsim compare` makes them, with its tables in DIR, and goes on
where it was. The teacher whose validation score is the highest is the one whose test score counts. Target: 0.02 above
labels alone, mean over seeds.
"""

import argparse
import sys
from pathlib import Path

from simulations.compare_run import Request, carry_out_request, machine_of, told
from simulations.compare_tables import summary
from simulations.run_commands import CACHE
from simulations.site_options import SiteOptions

STUDY, PLAIN = "chest-xray", "study"
WEIGHTS = (3, 10, 30)  # of what unlabelled cases say beside the loss of the labelled ones
TEACHER = ('unlabelled.method="mean_teacher"', "unlabelled.mix=true", "unlabelled.ramp_rounds=6")
LEAST = 0.02  # of test Dice, that the teacher is to be worth


def settings() -> dict[str, list[str]]:
    """Name -> what it changes."""
    return {f"teacher-{w}": [*TEACHER, f"unlabelled.weight={w}.0"] for w in WEIGHTS}


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m simulations.bench.few_labels", description=__doc__)
    words.add_argument("--data", required=True, help="chest X-rays with a manifest.csv")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--share", type=float, default=0.1, help="of the training patients that keep their labels")
    words.add_argument("--workers", type=int, help="runs at once")
    words.add_argument("--device", default="auto")
    words.add_argument("--out", type=Path, default=Path("runs/few-labels"))
    asked = words.parse_args()
    teachers = settings()
    request = Request(
        studies=[STUDY],
        strategies=[PLAIN, *teachers],
        out=asked.out,
        sets=[f"{name}:{change}" for name, changes in teachers.items() for change in changes],
        data=[asked.data],
        options=SiteOptions(labelled=asked.share),
        seeds=asked.seeds,
    )

    def quiet(done: int, of: int) -> None:
        """Rounds are many; that a run has ended is told by `say`."""

    def say(line: str) -> None:
        print(line, flush=True)

    results = carry_out_request(request, machine_of(asked.workers, 1, asked.device), CACHE, say, quiet)
    found = {line.setting: line for line in summary(results["studies"][STUDY]).lines if line.kind == "federated"}
    chosen = max(teachers, key=lambda name: found[name].validation.mean)
    gain = found[chosen].test.mean - found[PLAIN].test.mean
    print(f"\n{told(results)}\n")
    print(f"labels alone {found[PLAIN].test.mean:.4f}, {chosen} (by validation) {found[chosen].test.mean:.4f}")
    print(f"mean teacher above labels alone: {gain:+.4f} (target {LEAST})")
    sys.exit(not gain >= LEAST)  # nor where a score is missing


if __name__ == "__main__":
    main()
