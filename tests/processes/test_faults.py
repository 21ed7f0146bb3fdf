"""A fault that only real processes show: training that hangs in a call which holds its interpreter."""

import pytest

from simulations.bench.faults.fleet import fleet
from simulations.bench.faults.sent import hanging_call


@pytest.mark.process
def test_training_that_hangs_is_ended_from_outside_named_and_its_site_takes_the_next_order(tmp_path):
    with fleet(tmp_path, 3) as here:
        seen = hanging_call(here)
    assert "failed TRAIN_TIMEOUT" in seen
