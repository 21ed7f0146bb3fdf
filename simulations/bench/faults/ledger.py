"""Whose updates a run has counted, of which round, and how often: read from its weights, beside what it says itself."""

import re
from typing import Any

import numpy as np

from fedserver.checkpoint import RunFolder, read_state, read_study
from shared_models.files import read_lines
from shared_models.update import weight_of
from shared_models.weights import load
from simulations.bench.faults.app import EXAMPLES, own_place

LATE = re.compile(r"(?P<site>\S+) \(round (?P<round>\d+)\)")
NEAR = 1e-4  # float32 and the fixed point of the sum


def updates_of(line: dict[str, Any]) -> list[tuple[str, int]]:
    """(site, round) of every update that a round says it has counted, by itself or in a secure sum."""
    found = [(name, LATE.fullmatch(name)) for name in line["sites"] or line.get("together", {}).get("sites", [])]
    return [(late["site"], int(late["round"])) if late else (name, int(line["round"])) for name, late in found]


def miscounted(run: RunFolder) -> list[str]:
    """What is wrong with the counting of a run, in words; nothing where every update moved the weights exactly once."""
    study, done = read_study(run), read_state(run).round
    lines = [line for line in read_lines(run.metrics) if not line.get("final") and line["round"] <= done]
    wrong = [] if [x["round"] for x in lines] == list(range(1, done + 1)) else ["a round is told twice or not at all"]
    everything = [update for line in lines for update in updates_of(line)]
    wrong += [f"{s} of round {n} was counted twice" for s, n in set(everything) if everything.count((s, n)) > 1]
    before = load(run.weights(0))
    for line in lines:
        after, number = load(run.weights(line["round"])), int(line["round"])
        shares = [(s, n, weight_of(EXAMPLES, study.strategy.weighting, study.rounds.late_weight ** (number - n)))
                  for s, n in updates_of(line)]  # fmt: skip
        whole = sum(weight for _, _, weight in shares)
        due = {name: np.zeros_like(array, np.float64) for name, array in before.items()}
        for site, n, weight in shares:
            due["site"][own_place(site)] += weight / whole
            due["round"][own_place(site)] += weight / whole * n / 1000
        for name, array in due.items():
            if np.abs(after[name].astype(np.float64) - before[name] - array).max() > NEAR:
                wrong.append(f"round {number}: the weights {name!r} moved otherwise than by the updates that it names")
        before = after
    return wrong
