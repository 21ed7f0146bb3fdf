"""Comparison runs at once: the first that fails, or Ctrl-C, ends them all, and each goes on later."""

import threading
import time
from pathlib import Path

import pytest

import simulations.run as running
from fedserver.checkpoint import RunFolder, read_state
from shared_models.errors import ProcessFailed
from shared_models.study import Evaluate, Rounds, Study
from simulations.engine import run_local
from simulations.run import Job, Machine, side_by_side
from tests.toys import new_run, nodes, toy_app

TOY = Study(name="toy", rounds=Rounds(count=2, quorum=1), evaluate=Evaluate(every=0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ProcessFailed])
def test_one_that_ends_in_an_error_ends_the_others(tmp_path, monkeypatch, error):
    stopped, begun = list[str](), list[str]()

    def carry_out(job: Job, folder: Path, how: Machine, stop: threading.Event) -> RunFolder:
        begun.append(job.name)
        if job.name == "a":
            while len(begun) < 3:
                time.sleep(0.01)
            raise error
        assert stop.wait(20)
        stopped.append(job.name)
        raise ProcessFailed("stopped")

    monkeypatch.setattr(running, "carry_out", carry_out)
    with pytest.raises(error):
        side_by_side([Job(name, TOY, {}) for name in "abc"], tmp_path, Machine(workers=3), lambda _: None)
    assert sorted(stopped) == ["b", "c"]


def test_a_run_that_is_stopped_keeps_its_finished_rounds_and_goes_on(tmp_path):
    run, stop = new_run(tmp_path, TOY), threading.Event()
    stop.set()
    with pytest.raises(ProcessFailed, match="The same command goes on from its last finished round"):
        run_local(run.path, nodes(["a"], tmp_path), toy_app(), stop=stop)
    assert run_local(run.path, nodes(["a"], tmp_path), toy_app()).round == read_state(run).round == 2
