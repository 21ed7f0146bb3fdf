"""What a soak measures: growth from quarter to quarter, and rounds beside the time that they may take."""

import os
import random

import pytest

from simulations.bench.soak import DEADLINE_S, OUTAGE_S, SLACK_S, WARM_ROUNDS, Soak, growth, overdue_rounds, size_of
from tests.test_faults import finished

ROUNDS = list(range(100))


def test_growth_is_from_the_first_quarter_after_the_warm_up_to_the_last():
    values = [0] * WARM_ROUNDS + [10 * n for n in range(100 - WARM_ROUNDS)]
    assert growth(ROUNDS, values) == (640.0, 64)  # 85 values: medians of 0..20 and of 64..84


def test_what_a_process_takes_in_its_first_rounds_and_one_peak_are_no_growth():
    warm = [n if n < WARM_ROUNDS else WARM_ROUNDS for n in ROUNDS]
    assert growth(ROUNDS, warm)[0] == 0.0
    peak = [100 if n != 60 else 10_000 for n in ROUNDS]
    assert growth(ROUNDS, peak)[0] == 0.0


def test_a_process_that_lived_shortly_tells_nothing_of_growth():
    assert growth(list(range(20)), list(range(20))) == (0.0, 0)


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
