"""Peak memory of the aggregating process for rules that need every update: 31 M parameters, 32 sites.

    python -m simulations.bench.robust_memory [rule ...]

The round of `simulations.bench.server_memory`, with median, trimmed mean and Krum (or the rules named) in the place of
the mean: updates are files that wait on disk, and a block of each is in memory at a time. Target: at most 4 times the
model.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from shared_models.strategy import Strategy
from shared_models.study import Evaluate, Rounds, Study
from simulations.bench.server_memory import in_a_process_of_its_own, prepare

SITES, MALICIOUS = 32, 7
MOST_MODELS = 4.0
RULES = ("median", "trimmed_mean", "krum")


def study_of(rule: str) -> Study:
    words: dict[str, Any] = {"robust": rule, "malicious": 0 if rule == "norm_bound" else MALICIOUS}
    strategy = Strategy(weighting="uniform", **words)
    return Study(name="memory", strategy=strategy, rounds=Rounds(count=1, quorum=SITES), evaluate=Evaluate(every=0))


def main() -> None:
    rules = sys.argv[1:] or list(RULES)
    allowed = [rule for rule in get_args(Strategy.__annotations__["robust"]) if rule != "none"]
    if strange := set(rules) - set(allowed):
        sys.exit(f"no such rule: {', '.join(sorted(strange))}. There are {', '.join(allowed)}.")
    worst = 0.0
    for rule in rules:
        with tempfile.TemporaryDirectory() as folder:
            size = prepare(Path(folder), {SITES: study_of(rule)})
            began = time.monotonic()
            found = in_a_process_of_its_own(Path(folder), SITES)
            models = (found["peak_mib"] - found["idle_mib"]) / size
            worst = max(worst, models)
            print(
                f"{rule:13} {models:.2f} times the model of {size:.0f} MiB, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(f"\n{SITES} sites: at worst {worst:.2f} times the model (at most {MOST_MODELS:g})")
    if worst > MOST_MODELS:
        sys.exit("falls short of its target")


if __name__ == "__main__":
    main()
