"""A study becomes a queued run, once; and what is on disk is told, whatever has become of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import fedserver.submit as submitting
from fedserver.checkpoint import RunFolder, create_run, read_state, read_study, write_progress
from fedserver.enrol import Federation, init_federation, invite
from fedserver.overview import overview
from fedserver.show import status_table
from fedserver.state import Run, RunState, add_run, change_run, find_run, list_runs
from fedserver.submit import Submitted, outcome, submit, watched
from fedserver.withdrawal import retrain
from shared_models.errors import StateInvalid
from shared_models.files import write_json
from shared_models.nets import initial_weights
from shared_models.study import Model, Preprocess, Rounds, Study, sha256
from shared_models.supervise import only_one
from shared_models.weights import load

STUDY = Study(
    name="tiny",
    model=Model(features=(4, 4, 4, 4, 4, 4), groups=2),
    preprocess=Preprocess(size=(32, 32)),
    rounds=Rounds(count=4),
)
OTHER = replace(STUDY, seed=1)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return init_federation(tmp_path / "federation", "Test", "127.0.0.1:8443")


def put(federation: Federation, study: Study = STUDY, name: str | None = None, new: bool = False) -> Submitted:
    return submit(federation, study, name, new)


def ends(federation: Federation, run_id: str, state: RunState) -> None:
    change_run(federation.state, run_id, 1.0, state, "for a reason")


def states(federation: Federation) -> dict[str, str]:
    return {run.id: run.state for run in list_runs(federation.state)}


@pytest.mark.parametrize("name", ["../elsewhere", "Lung again", "x" * 65])
def test_a_run_that_is_trained_again_has_a_name_that_sites_understand(federation, name):
    invite(federation, "east")
    add_run(federation.state, Run("lung", "lung", "a" * 64, "finished", None, 1.0, 1.0, ""))
    with pytest.raises(StateInvalid, match="a name is lower-case letters, digits and -, at most 64"):
        retrain(federation, "lung", ["east"], name)


def test_a_submitted_study_is_a_queued_run_with_its_first_weights(federation):
    made = put(federation)
    assert (made.id, made.rounds) == ("tiny-1", 4)
    assert made.folder.path == federation.runs / "tiny-1"
    assert read_study(made.folder) == STUDY
    assert read_state(made.folder).round == 0
    wanted = initial_weights(STUDY)
    assert {n: a.tobytes() for n, a in load(made.folder.weights(0)).items()} == {
        n: a.tobytes() for n, a in wanted.items()
    }
    found = find_run(federation.state, "tiny-1")
    assert found is not None
    assert (found.study_name, found.study_sha256, found.state, found.message) == ("tiny", sha256(STUDY), "queued", "")


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_study_whose_run_is_under_way_is_left_to_it(federation, state):
    first = put(federation)
    ends(federation, first.id, state)
    before = find_run(federation.state, first.id)
    assert put(federation) == put(federation, name=first.id) == first
    assert find_run(federation.state, first.id) == before


@pytest.mark.parametrize("state", ["paused", "failed", "stopped"])
def test_an_unfinished_run_of_the_study_goes_on(federation, state):
    first = put(federation)
    ends(federation, first.id, state)
    assert put(federation) == first
    assert states(federation) == {"tiny-1": "queued"}


def test_the_newest_unfinished_run_goes_on_and_no_other(federation):
    put(federation)
    put(federation, new=True)
    ends(federation, "tiny-1", "paused")
    ends(federation, "tiny-2", "paused")
    assert put(federation).id == "tiny-2"
    assert states(federation) == {"tiny-1": "paused", "tiny-2": "queued"}


def test_a_finished_run_is_followed_by_a_new_one_with_the_next_number(federation):
    put(federation)
    ends(federation, "tiny-1", "finished")
    assert put(federation).id == "tiny-2"
    assert states(federation) == {"tiny-1": "finished", "tiny-2": "queued"}


def test_new_begins_anew_beside_an_unfinished_run(federation):
    put(federation)
    assert put(federation, new=True).id == "tiny-2"
    assert put(federation, new=True).id == "tiny-3"
    assert states(federation) == dict.fromkeys(("tiny-1", "tiny-2", "tiny-3"), "queued")


def test_another_study_of_the_same_name_never_goes_on_with_the_first_ones_run(federation):
    put(federation)
    ends(federation, "tiny-1", "paused")
    other = put(federation, OTHER)
    assert other.id == "tiny-2"
    assert read_study(other.folder) == OTHER
    assert states(federation)["tiny-1"] == "paused"


def test_a_run_may_be_named_and_goes_on_by_its_name(federation):
    assert put(federation, name="pilot").id == "pilot"
    ends(federation, "pilot", "stopped")
    assert put(federation, name="pilot").id == "pilot"
    assert states(federation) == {"pilot": "queued"}
    assert put(federation, name="second").id == "second"


@pytest.mark.parametrize(
    ("study", "state", "new", "words"),
    [
        (OTHER, "queued", False, r"run 'pilot': the name is taken \(tiny, queued\). Choose another"),
        (STUDY, "finished", False, r"the name is taken \(tiny, finished\)"),
        (STUDY, "paused", True, r"the name is taken \(tiny, paused\)"),
    ],
)
def test_a_name_that_is_taken_is_refused(federation, study, state, new, words):
    put(federation, name="pilot")
    ends(federation, "pilot", state)
    with pytest.raises(StateInvalid, match=words):
        put(federation, study, "pilot", new)
    assert states(federation) == {"pilot": state}


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "Pilot", "a b", "-a", "a\n", "a" * 65, "é", "a_b"])
def test_a_name_that_makes_no_folder_is_refused(federation, name):
    with pytest.raises(StateInvalid, match="a name is lower-case letters, digits and -"):
        put(federation, name=name)
    assert states(federation) == {}
    assert not list(federation.runs.iterdir())


# Killed


def test_a_command_that_was_killed_before_the_run_was_queued_is_made_good_by_the_next(federation, monkeypatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(submitting, "add_run", die)
        with pytest.raises(KeyboardInterrupt):
            put(federation)
    assert states(federation) == {}
    assert put(federation).id == "tiny-1"
    assert states(federation) == {"tiny-1": "queued"}


@pytest.mark.parametrize("name", [None, "tiny-1"])
def test_what_a_killed_command_left_of_another_study_is_not_taken_for_this_one(federation, name):
    create_run(federation.runs, "tiny-1", OTHER, initial_weights(OTHER))
    with pytest.raises(StateInvalid, match=r"tiny-1: holds a run of another study\. Move that folder away"):
        put(federation, STUDY, name)
    assert states(federation) == {}
    assert put(federation, OTHER).id == "tiny-1"


# What is told


def test_how_a_run_ended_is_told_and_nothing_while_it_is_under_way(federation):
    put(federation)
    told: dict[RunState, str | None] = {}
    for state in ("queued", "running", "paused", "failed", "stopped", "finished"):
        ends(federation, "tiny-1", state)
        told[state] = outcome(federation, "tiny-1")
    assert told == {
        "queued": None, "running": None, "paused": "paused", "failed": "failed", "stopped": "stopped",
        "finished": "finished",
    }  # fmt: skip
    assert outcome(federation, "unknown") is None


def test_the_overview_names_sites_and_runs_and_can_be_written_as_json(federation):
    invite(federation, "north")
    run = put(federation)
    write_progress(
        run.folder, {"phase": "train", "round": 1, "sites": {"north": {"state": "asked", "reason": "", "attempt": 1}}}
    )
    facts = overview(federation)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["federation"], facts["address"], facts["served"]) == ("Test", "127.0.0.1:8443", False)
    (site,) = facts["sites"]
    assert (site["name"], site["state"], site["joined_at"]) == ("north", "invited", None)
    (told,) = facts["runs"]
    assert (told["id"], told["study"], told["state"], told["message"]) == ("tiny-1", "tiny", "queued", "")
    assert (told["finished_rounds"], told["rounds"]) == (0, 4)
    assert told["progress"]["phase"] == "train"


def test_the_overview_says_whether_the_federation_is_served(federation):
    (federation.folder / "status.json").write_text('{"supervisor": 1, "children": {}}')
    assert not overview(federation)["served"]
    with only_one(federation.folder):
        assert overview(federation)["served"]


def test_a_run_that_nobody_serves_any_more_is_not_waited_for_without_end(federation):
    run_id, now = submit(federation, STUDY, None, False).id, 100.0
    look = watched(federation, run_id, patience_s=30, clock=lambda: now)
    with only_one(federation.folder):
        write_json(federation.folder / "status.json", {"supervisor": 1, "children": {}})
        assert look() is None
    assert look() is None  # a supervisor that was killed may come back
    now = 129.0
    assert look() is None
    now = 130.0
    assert look() == "unserved"
    with only_one(federation.folder):
        assert look() is None
    change_run(federation.state, run_id, 1.0, "finished")
    assert look() == "finished"


def test_one_damaged_run_hides_no_other(federation):
    put(federation, name="lost")
    put(federation, name="sound")
    RunFolder(federation.runs / "lost").weights(0).unlink()
    facts = overview(federation)
    told = {run["id"]: run for run in facts["runs"]}
    assert "is missing. Restore the folder" in told["lost"]["message"]
    assert (told["sound"]["finished_rounds"], told["sound"]["message"]) == (0, "")
    assert rendered(facts)


def rendered(facts: object) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(status_table(facts))  # type: ignore[arg-type]
    return captured.get()


def test_an_empty_federation_has_an_overview(federation):
    facts = overview(federation)
    assert (facts["sites"], facts["runs"], facts["processes"]) == ([], [], {})
