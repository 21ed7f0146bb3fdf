"""Runs and their processes: what a death, a pause, a full disk or another archive does to a run."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Context, RecordDict

from fedserver import dispatch
from fedserver.dispatch import FINISHED, MOST_DEATHS, PAUSED, Desk, Job, finished_round, settle
from fedserver.state import Run, RunState, add_run, change_run, create_state, find_run
from shared_models.archive import app_archive
from shared_models.errors import ProcessFailed, RoundPaused
from shared_models.files import write_json
from shared_models.supervise import Child, spawn


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    create_state(tmp_path / "state.db")
    add_run(tmp_path / "state.db", Run("a", "toy", "0" * 64, "running", 5, 1.0, 1.0, ""))
    return Desk(tmp_path, "127.0.0.1:1", "tests.test_dispatch:app")


def run_of(desk: Desk) -> Run:
    found = find_run(desk.state, "a")
    assert found is not None
    return found


def die(desk: Desk, job: Job, code: int = -9) -> RunState:
    settle(desk, job, run_of(desk), code)
    return run_of(desk).state


def test_a_finished_process_finishes_its_run(desk: Desk) -> None:
    assert die(desk, Job("a"), FINISHED) == "finished"


@pytest.mark.parametrize("code", [0, 1, -9, -15])
def test_flowers_own_exit_codes_finish_nothing(desk: Desk, code: int) -> None:
    assert die(desk, Job("a"), code) == "running"


@pytest.mark.parametrize("state", ["stopped", "failed", "paused", "finished"])
@pytest.mark.parametrize("code", [FINISHED, -9])
def test_what_a_person_or_the_app_has_decided_stays(desk: Desk, state: RunState, code: int) -> None:
    change_run(desk.state, "a", 2.0, state, "by hand")
    assert die(desk, Job("a"), code) == state
    assert run_of(desk).message == "by hand"


def test_the_first_death_restarts_at_once_and_the_next_ones_wait_longer(desk: Desk) -> None:
    job = Job("a")
    pauses = []
    for _ in range(MOST_DEATHS - 1):
        assert die(desk, job) == "running"
        pauses.append(job.next_start - time.monotonic())
    assert pauses == pytest.approx([0, 1, 2, 4], abs=0.1)


def test_a_process_that_keeps_dying_fails_its_run_with_the_log_to_read(desk: Desk) -> None:
    job = Job("a")
    states = [die(desk, job) for _ in range(MOST_DEATHS)]
    assert states == ["running"] * (MOST_DEATHS - 1) + ["failed"]
    assert "ended by signal 9, 5 times in 120 s after round 0; see logs/run-a.log" in run_of(desk).message


def test_a_finished_round_forgives_the_deaths_before_it(desk: Desk) -> None:
    job = Job("a")
    for number in range(1, 4 * MOST_DEATHS):
        write_json(desk.folder / "runs/a/state.json", {"round": number})
        assert die(desk, job) == "running"


def test_old_deaths_do_not_count(desk: Desk) -> None:
    job = Job("a", deaths=[time.monotonic() - 121.0] * 10)
    assert die(desk, job) == "running"


def test_the_last_round_is_read_from_the_runs_own_state(tmp_path: Path) -> None:
    assert finished_round(tmp_path, "a") == 0
    write_json(tmp_path / "runs/a/state.json", {"round": 7})
    assert finished_round(tmp_path, "a") == 7


def test_another_archive_is_not_run() -> None:
    dispatch._check_archive(app_archive(), skip_prompt=True)
    with pytest.raises(ProcessFailed, match="is not of this package"):
        dispatch._check_archive(app_archive() + b"x")


def test_the_folder_is_told_to_the_app_and_not_sent() -> None:
    assert dispatch._run_config(Path("/f"), Path("app"), {"run": "a"}) == {"run": "a", "federation": "/f"}


raised: list[Exception] = []


def app(grid: Any, context: Context) -> None:
    if raised:
        raise raised[0]


def call_app(desk: Desk, error: Exception | None) -> int:
    raised[:] = [error] if error else []
    outcome = {"code": 1}
    context = Context(5, 1, {}, RecordDict(), {"run": "a"})
    with pytest.raises(type(error)) if error else nullcontext():
        dispatch._run_app(desk, outcome, None, context)  # type: ignore[arg-type]
    return outcome["code"]


def test_an_app_that_returns_has_finished(desk: Desk) -> None:
    assert call_app(desk, None) == FINISHED


def test_a_round_without_quorum_pauses_the_run_with_its_reason(desk: Desk) -> None:
    assert call_app(desk, RoundPaused("round 3: 1 of 2 sites")) == PAUSED
    assert (run_of(desk).state, run_of(desk).message) == ("paused", "round 3: 1 of 2 sites")


def test_an_error_of_ours_is_kept_for_status_and_one_of_others_is_not(desk: Desk) -> None:
    assert call_app(desk, ProcessFailed("no disk")) == 1
    assert (run_of(desk).state, run_of(desk).message) == ("running", "no disk")
    change_run(desk.state, "a", 2.0, "running")
    assert call_app(desk, ValueError("whatever")) == 1
    assert run_of(desk).message == ""


class Superlink:
    """Counts the heartbeats that come for each token."""

    def __init__(self, away: bool = False) -> None:
        self.away, self.heard = away, list[str]()

    def client(self, _desk: Desk, token: str) -> Any:
        def beat(_request: object) -> None:
            self.heard.append(token)
            if self.away:
                raise httpx.ConnectError("refused")

        return nullcontext(SimpleNamespace(SendTaskHeartbeat=beat))


@pytest.mark.parametrize("away", [False, True])
def test_the_task_of_a_process_that_is_still_starting_is_held(desk: Desk, monkeypatch, away: bool) -> None:
    superlink = Superlink(away)
    monkeypatch.setattr(dispatch, "_task_client", superlink.client)
    job = Job("a", 5, token="t", child_at=0.0)
    for second in range(400):
        dispatch.hold(desk, job, float(second))
    assert superlink.heard == ["t"] * 30, "every ten seconds of the first five minutes"
    assert "'t'" not in repr(job)


class Clock:
    """The dispatcher's time, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 1000.0
        monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: self.at, time=time.time))


@pytest.fixture
def hanging(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A run whose process neither ends nor speaks, past the time in which the dispatcher speaks for it."""
    monkeypatch.setattr(Desk, "link", lambda _desk: None)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = spawn(Child("run a", command, desk.folder / "logs/run-a.log"))
    yield Job("a", 5, child=process)
    if process.returncode is None:
        process.kill()
        process.wait()


def test_a_full_disk_ends_neither_the_dispatcher_nor_a_run_that_has_its_process(desk, hanging, monkeypatch) -> None:
    stop, looked = threading.Event(), list[int | None]()

    def step(_desk: Desk, jobs: dict[str, Job], _client: object) -> None:
        jobs["a"] = hanging
        looked.append(hanging.child.poll())
        if len(looked) == 3:
            stop.set()
        Path("/dev/full").write_bytes(b"the log of another run")

    monkeypatch.setattr(dispatch, "_task_client", lambda _desk: nullcontext())
    monkeypatch.setattr(dispatch, "step", step)
    dispatch.dispatch(desk, stop)
    assert looked == [None] * 3


def watch_for(desk: Desk, job: Job, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.at += 1.0
        if job.child is not None:
            dispatch.watch(desk, job, run_of(desk))


def test_a_process_that_outlives_its_flower_run_is_killed_and_its_run_goes_on(desk, hanging, monkeypatch) -> None:
    clock, process = Clock(monkeypatch), hanging.child
    monkeypatch.setattr(dispatch, "run_states", lambda _link: {5: "finished:failed"})
    watch_for(desk, hanging, clock, 30)
    assert hanging.child is process, "it may be about to end by itself"
    watch_for(desk, hanging, clock, 15)
    for _ in range(200):  # a killed process takes a moment; who waits for it here would take it from `watch`
        if hanging.child is None:
            break
        dispatch.watch(desk, hanging, run_of(desk))
        time.sleep(0.05)
    assert (hanging.child, len(hanging.deaths), run_of(desk).state) == (None, 1, "running")
    assert hanging.stale == [5]


@pytest.mark.parametrize("away", [False, True])
def test_a_process_whose_flower_run_goes_on_or_cannot_be_asked_for_is_left_alone(
    desk, hanging, monkeypatch, away
) -> None:
    def states(_link: object) -> dict[int, str]:
        if away:
            raise ProcessFailed("the SuperLink does not answer")
        return {5: "running", 4: "finished:failed"}

    monkeypatch.setattr(dispatch, "run_states", states)
    watch_for(desk, hanging, Clock(monkeypatch), 300)
    assert hanging.child.poll() is None
