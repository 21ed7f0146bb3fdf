"""What a soak measures: growth from quarter to quarter, and rounds beside the time that they may take."""

import os
import random

import pytest

from fedserver.checkpoint import RunFolder
from simulations.bench.soak import (
    DEADLINE_S,
    MIB,
    OUTAGE_S,
    SLACK_S,
    WARM_ROUNDS,
    Sampled,
    Soak,
    growth,
    overdue_rounds,
    processes,
    size_of,
)
from tests.test_faults import finished

ROUNDS = list(range(100))


def test_growth_is_from_the_first_quarter_after_the_warm_up_to_the_last():
    values = [0] * WARM_ROUNDS + [10 * n for n in range(100 - WARM_ROUNDS)]
    assert growth(ROUNDS, values) == (640.0, 64)  # 85 values: medians of 0..20 and of 64..84


def test_what_a_process_takes_in_its_first_rounds_and_one_peak_are_no_growth():
    warm = [n if n < WARM_ROUNDS else WARM_ROUNDS for n in ROUNDS]
    assert growth(ROUNDS, warm) == (0.0, 64)
    peak = [100 if n != 60 else 10_000 for n in ROUNDS]
    assert growth(ROUNDS, peak) == (0.0, 64)


def test_a_process_that_lived_shortly_tells_nothing_of_growth():
    assert growth(list(range(20)), list(range(20))) is None


def test_a_line_that_comes_back_within_a_few_rounds_is_no_growth():
    rounds = [0, *[15] * 8, *[16] * 8]  # many looks at a node that was cut off, then at the same with its connection
    assert growth(rounds, [90, *[90] * 8, *[140] * 8]) is None


def soak_of(tmp_path, **seen):
    return Soak(None, RunFolder(tmp_path), random.Random(0), **seen)  # type: ignore[arg-type]


def test_a_kind_of_process_of_which_none_lived_long_enough_falls_short(tmp_path):
    short = Sampled("site node", list(range(20)), [5] * 20, [9] * 20)
    going = soak_of(tmp_path, processes={1: short, 2: short})
    (told,) = processes(going)
    assert told.startswith("site node: none of 2 processes lived long enough to be measured")
    going.processes[3] = Sampled("site node", ROUNDS, [5] * 100, [9] * 100)
    assert processes(going) == []


@pytest.mark.parametrize(
    ("mib", "files", "told"),
    [
        (0.65, 0.0, "site node: memory grew by 41.6 MiB in 64 rounds"),  # 24 (1 + 64 / 100) = 39.4 MiB are allowed
        (0.6, 0.0, ""),
        (0.0, 0.25, "site node: 16 more open files"),
    ],
)
def test_memory_or_files_that_grow_fall_short(tmp_path, mib, files, told):
    node = Sampled("site node", ROUNDS, [int(n * mib * MIB) for n in ROUNDS], [int(n * files) for n in ROUNDS])
    assert processes(soak_of(tmp_path, processes={1: node})) == ([told] if told else [])


def test_logs_are_left_out_of_a_folders_size(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.log").write_bytes(bytes(1000))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/b").write_bytes(bytes(10))
    assert size_of(tmp_path) == 10


@pytest.mark.parametrize(("struck", "late"), [([], 1), ([(2, "kill run")], 0), ([(1, "kill run")], 0)])
def test_a_round_may_take_longer_only_where_the_coordinator_was_struck_in_it_or_just_before(tmp_path, struck, late):
    run = finished(tmp_path, [{"s1": 1.0}, {"s1": 1.0}], [["s1"], ["s1"]])
    for number, at in ((0, 0.0), (1, 5.0), (2, 5.0 + DEADLINE_S + SLACK_S + OUTAGE_S / 2)):
        os.utime(run.weights(number), (at, at))
    going = Soak(None, run, random.Random(0), struck=struck)  # type: ignore[arg-type]
    assert len(overdue_rounds(going)) == late
