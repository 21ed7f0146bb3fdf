"""Runs take their turn, rest when a person says so, and go on; what a person has said survives whatever dies."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedserver.cli
from fedserver import dispatch
from fedserver.checkpoint import RunFolder
from fedserver.dispatch import Desk, Job, rest, step, watch
from fedserver.enrol import Federation, init_federation, open_log
from fedserver.overview import overview
from fedserver.queue import Hold, due, finished_round, hold_of, pause, resume, waiting
from fedserver.state import Run, RunState, add_run, change_run, find_run, list_runs
from fedserver.submit import submit
from shared_models.audit import AuditLog
from shared_models.errors import StateInvalid
from shared_models.files import read_lines, write_atomic, write_json
from shared_models.study import canonical
from tests.test_submit import OTHER, STUDY


def run(name: str, state: RunState = "queued", at: float = 1.0) -> Run:
    return Run(name, "toy", "0" * 64, state, None, 1.0, at, "")


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", "Test", "127.0.0.1:8443")


def put(federation: Federation, name: str, state: RunState = "queued", done: int = 0, at: float = 1.0) -> RunFolder:
    add_run(federation.state, run(name, state, at))
    write_atomic(federation.runs / name / "study.json", canonical(STUDY))
    write_json(federation.runs / name / "state.json", {"round": done})
    return RunFolder(federation.runs / name)


def state_of(federation: Federation, name: str) -> str:
    found = find_run(federation.state, name)
    assert found is not None
    return found.state


# Turns


def test_one_run_is_carried_out_at_a_time_in_the_order_in_which_they_came():
    runs = [run("b", at=2), run("a", at=1), run("c", at=3), run("z", "finished"), run("y", "paused")]
    assert waiting(runs) == ["a", "b", "c"]
    assert due(runs, (), 1) == ["a"]
    assert due(runs, ("a",), 1) == []
    assert due(runs, ("a",), 2) == ["b"]
    assert due(runs, ("a", "b"), 64) == ["c"]
    assert due([], (), 1) == []


def test_a_run_that_had_begun_goes_before_one_that_has_not_when_the_dispatcher_starts_again():
    assert due([run("a", at=1), run("b", "running", at=9)], (), 1) == ["b"]


def test_one_that_is_still_ending_keeps_the_next_one_waiting():
    assert due([run("a", "stopped"), run("b")], ("a",), 1) == []


def test_a_run_that_goes_on_after_a_pause_stands_at_the_end_of_the_queue(federation):
    put(federation, "first", "paused", at=1)
    put(federation, "second", at=2)
    resume(federation, "first")
    assert waiting(list_runs(federation.state)) == ["second", "first"]
    places = {r["id"]: r["queue"] for r in overview(federation)["runs"]}
    assert places == {"first": 2, "second": 1}


def test_resume_says_whether_a_run_takes_its_turn_anew_or_only_goes_on(federation):
    put(federation, "rests", "paused")
    put(federation, "runs", "running")
    pause(federation, "runs", at_once=False)
    assert resume(federation, "runs") == "goes on without a pause"
    assert hold_of(RunFolder(federation.runs / "runs")) is None
    assert resume(federation, "rests").startswith("is queued again")


class Nobody:
    """A SuperLink that starts runs and hands out no task."""

    def AcquireTask(self, _: object) -> "Nobody":  # noqa: N802
        return self

    token = ""

    def HasField(self, _: str) -> bool:  # noqa: N802
        return False


@pytest.fixture
def desk(federation, monkeypatch) -> Desk:
    numbers = iter(range(1, 100))
    monkeypatch.setattr(dispatch, "start_run", lambda *_: next(numbers))
    monkeypatch.setattr(dispatch, "stop_run", lambda *_: None)
    monkeypatch.setattr(dispatch, "run_states", lambda *_, **__: {})
    return Desk(federation.folder, "127.0.0.1:1", "app")


def link(desk: Desk) -> None:
    write_json(desk.folder / "superlink/port", 1)


def test_the_dispatcher_begins_the_next_run_when_the_first_is_stopped(federation, desk):
    link(desk)
    for at, name in enumerate(("a", "b", "c")):
        put(federation, name, at=at)
    jobs: dict[str, Job] = {}
    step(desk, jobs, Nobody())  # type: ignore[arg-type]
    assert [state_of(federation, name) for name in "abc"] == ["running", "queued", "queued"]
    change_run(federation.state, "a", 5.0, "stopped")
    for _ in range(3):
        step(desk, jobs, Nobody())  # type: ignore[arg-type]
    assert [state_of(federation, name) for name in "abc"] == ["stopped", "running", "queued"]
    both = Desk(desk.folder, desk.superlink, desk.app, at_once=2)
    step(both, jobs, Nobody())  # type: ignore[arg-type]
    assert [state_of(federation, name) for name in "abc"] == ["stopped", "running", "running"]


# Pauses


def test_a_queued_run_is_paused_at_once_and_queued_again_by_resume(federation):
    put(federation, "a")
    assert pause(federation, "a", False) == "is paused"
    assert state_of(federation, "a") == "paused"
    resume(federation, "a")
    assert state_of(federation, "a") == "queued"
    events = [line["event"] for line in read_lines(federation.folder / "audit.jsonl")]
    assert events[-2:] == ["run-paused", "run-resumed"]


def test_a_running_run_pauses_once_its_round_is_finished(federation, desk):
    folder = put(federation, "a", "running", done=2)
    assert pause(federation, "a", False) == "pauses when round 3 is finished"
    found = hold_of(folder)
    assert found is not None
    assert found.after == 3
    assert overview(federation)["runs"][0]["pausing"] == 3
    job = Job("a")
    assert rest(desk, job, run("a", "running")).state == "running", "round 3 is still under way"
    write_json(folder.path / "state.json", {"round": 3})
    assert rest(desk, job, run("a", "running")).state == "paused"
    paused = find_run(federation.state, "a")
    assert paused is not None
    assert paused.message == "paused by the coordinator after round 3; `fedserver resume a` goes on."
    assert hold_of(folder) is None
    assert rest(desk, job, run("a", "paused")).state == "paused"


def test_a_pause_that_cannot_be_written_down_yet_is_still_wanted(federation, desk, monkeypatch):
    def full(*_: object, **__: object) -> Run:
        raise StateInvalid("database or disk is full")

    folder = put(federation, "a", "running", done=3)
    pause(federation, "a", True)
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "change_run", full)
        with pytest.raises(StateInvalid):
            rest(desk, Job("a"), run("a", "running"))
    assert hold_of(folder) is not None
    assert rest(desk, Job("a"), run("a", "running")).state == "paused"
    assert hold_of(folder) is None


def test_the_process_of_a_paused_run_is_told_to_end_and_its_run_stays_paused(federation, desk):
    folder = put(federation, "a", "running", done=2)
    assert pause(federation, "a", True) == "pauses at once"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
    job = Job("a", flower_run_id=7, child=child)
    watch(desk, job, run("a", "running"))
    assert job.ending_since is not None
    until = time.monotonic() + 20
    while job.child is not None and time.monotonic() < until:
        found = find_run(federation.state, "a")
        assert found is not None
        watch(desk, job, found)
        time.sleep(0.05)
    assert job.child is None
    assert job.stale == [7]
    assert state_of(federation, "a") == "paused"
    assert finished_round(folder) == 2
    assert child.returncode == -15


def test_a_run_that_is_resumed_while_its_process_still_ends_is_carried_on_by_a_new_one(federation, desk):
    put(federation, "a", "running", done=2)
    pause(federation, "a", True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
    job = Job("a", flower_run_id=7, child=child)
    watch(desk, job, run("a", "running"))
    resume(federation, "a")
    until = time.monotonic() + 20
    while job.child is not None and time.monotonic() < until:
        watch(desk, job, run("a", "queued"))
        time.sleep(0.05)
    assert (job.child, job.resting, state_of(federation, "a")) == (None, False, "queued")
    link(desk)
    job.next_start = 0.0
    dispatch.begin(desk, job)
    assert (state_of(federation, "a"), job.resting) == ("running", False)


def test_submitting_the_same_study_again_goes_on_with_a_paused_run_too(federation):
    made = submit(federation, STUDY, None, False)
    change_run(federation.state, made.id, 1.0, "running")
    pause(federation, made.id, False)
    change_run(federation.state, made.id, 1.0, "paused")
    assert submit(federation, STUDY, None, False).id == made.id
    assert hold_of(made.folder) is None
    assert state_of(federation, made.id) == "queued"


def test_what_cannot_be_paused_or_resumed_is_told(federation):
    put(federation, "a", "finished")
    with pytest.raises(StateInvalid, match=r"is finished\. Only a run that is queued or running"):
        pause(federation, "a", False)
    with pytest.raises(StateInvalid, match=r"is finished\. `fedserver run --new`"):
        resume(federation, "a")
    for what in (lambda: pause(federation, "b", False), lambda: resume(federation, "b")):
        with pytest.raises(StateInvalid, match="is not known here"):
            what()


def test_a_run_that_is_begun_while_it_is_paused_rests_after_its_round(federation, monkeypatch):
    folder = put(federation, "a", "queued")
    log = open_log

    def begun_meanwhile(opened: Federation) -> AuditLog:
        change_run(opened.state, "a", time.time(), "running")
        return log(opened)

    monkeypatch.setattr("fedserver.queue.open_log", begun_meanwhile)
    assert pause(federation, "a", False) == "pauses when round 1 is finished"
    assert state_of(federation, "a") == "running"
    assert hold_of(folder) is not None


def test_a_run_whose_rounds_are_finished_is_not_said_to_pause_after_the_next(federation):
    folder = put(federation, "a", "running", done=STUDY.rounds.count)
    with pytest.raises(StateInvalid, match="has finished its rounds and is being scored"):
        pause(federation, "a", False)
    assert hold_of(folder) is None
    assert pause(federation, "a", True) == "pauses at once"


def test_a_spoilt_note_holds_nothing_back(federation):
    folder = put(federation, "a", "running")
    (folder.path / "hold.json").write_text("{")
    assert hold_of(folder) is None
    write_json(folder.path / "hold.json", {"after": 2, "at": 1.0})
    assert hold_of(folder) == Hold(2, 1.0)


def test_the_commands_pause_and_resume_and_status_shows_who_waits(federation):
    submit(federation, STUDY, "first", False)
    submit(federation, OTHER, "second", False)
    change_run(federation.state, "first", time.time(), "running")
    here = ["--federation", str(federation.folder)]
    invoke = CliRunner(env={"COLUMNS": "200"}).invoke
    assert invoke(fedserver.cli.app, ["pause", "first", *here]).stdout == "first pauses when round 1 is finished.\n"
    shown = invoke(fedserver.cli.app, ["status", *here]).stdout
    assert "will pause after round 1" in shown
    assert "waits for its turn, 1. in the queue" in shown
    assert "goes on without a pause" in invoke(fedserver.cli.app, ["resume", "first", *here]).stdout
    assert "will pause" not in invoke(fedserver.cli.app, ["status", *here]).stdout
    assert invoke(fedserver.cli.app, ["pause", "nowhere", *here]).exit_code == 1
