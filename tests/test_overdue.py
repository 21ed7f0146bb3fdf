"""Orders that take too long: who ends them, when, and what stays spent."""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fedclient.ledger import open_ledger
from fedclient.limits import Limits
from fedclient.overdue import GRACE_S, LONGEST_S, hanging, limited, longest_at, longest_s
from fedclient.site import Site
from fedclient.work import Learned, carry_out
from shared_models.errors import OrderRefused
from shared_models.files import write_json
from shared_models.study import Study
from shared_models.weights import Arrays
from tests.test_spending import ROUND, order, site_at, spent, with_budget
from tests.toys import WEIGHTS, Clock, ToyLearner


def test_an_order_may_take_a_minute_less_than_its_answer_is_waited_for_unless_the_hospital_says_otherwise():
    assert longest_s(Limits(), 7200.0) == 7140.0
    assert longest_s(Limits(order_s=90.0), 7200.0) == 90.0
    assert longest_s(Limits(order_s=9000.0), 7200.0) == 9000.0


@pytest.mark.parametrize(("told", "taken"), [(1e300, LONGEST_S), (-5.0, 1.0), (float("nan"), 1.0)])
def test_what_a_coordinator_says_of_its_patience_stays_within_bounds(told, taken):
    assert longest_s(Limits(), told) == taken


def test_a_site_file_that_cannot_be_used_leaves_the_coordinators_patience(tmp_path):
    assert longest_at(tmp_path, 600.0) == 540.0


def test_work_goes_on_until_its_time_is_over_and_is_then_refused_with_the_key_to_mend(tmp_path):
    clock = Clock()
    site = limited(replace(site_at(tmp_path), limits=Limits(order_s=60.0)), 600.0, clock)
    clock.sleep(59.0)
    site.go_on()
    clock.sleep(2.0)
    with pytest.raises(OrderRefused, match=r"more than 60 s\. Set `order_s` under") as refused:
        site.go_on()
    assert refused.value.code == "TRAIN_TIMEOUT"


def test_within_its_time_consent_may_still_end(tmp_path):
    def withdrawn() -> None:
        raise OrderRefused("STUDY_WITHDRAWN", "by a person")

    site = limited(replace(site_at(tmp_path), go_on=withdrawn), 600.0)
    with pytest.raises(OrderRefused, match="by a person"):
        site.go_on()


@dataclass(frozen=True)
class Slow(ToyLearner):
    """Every step takes a minute."""

    clock: Clock = field(default_factory=Clock)

    def learn(self, site: Site, study: Study, round_number: int, weights: Arrays) -> Learned:
        for _ in range(study.train.local_steps or 0):
            site.go_on()
            self.clock.sleep(60.0)
        return super().learn(site, study, round_number, weights)


def test_private_work_that_ran_out_of_time_stays_spent_and_gives_no_update(tmp_path):
    with_budget(tmp_path, 50.0)
    slow = Slow()
    with pytest.raises(OrderRefused) as refused:
        carry_out(order(), WEIGHTS, limited(site_at(tmp_path), 300.0, slow.clock), slow)
    assert refused.value.code == "TRAIN_TIMEOUT"
    assert spent(tmp_path) == (ROUND,)
    assert open_ledger(tmp_path).accounts()[0].open == 1


def noted(folder: Path, pid: int, ended_s: float) -> Path:
    path = folder / "task"
    write_json(path, {"token": "x", "pid": pid, "until": time.monotonic() - ended_s})
    return path


def test_the_executor_of_an_order_whose_time_and_grace_are_over_is_to_be_killed(tmp_path):
    task = noted(tmp_path, os.getpid(), GRACE_S + 1)
    assert hanging(task, os.getpid()) == "It hung and was ended: its order is answered as TRAIN_TIMEOUT."


def test_work_within_its_grace_a_successor_and_an_idle_executor_are_left_alone(tmp_path):
    assert hanging(noted(tmp_path, os.getpid(), GRACE_S - 2), os.getpid()) == ""
    assert hanging(noted(tmp_path, os.getpid() + 1, GRACE_S + 1), os.getpid()) == ""
    (tmp_path / "task").write_text("{")
    assert hanging(tmp_path / "task", os.getpid()) == ""
    assert hanging(tmp_path / "none", os.getpid()) == ""
