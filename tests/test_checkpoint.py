"""A run on disk: killed at any point, it goes on to the same weights, and no line of its metrics stands twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedserver.checkpoint as checkpoint
from fedserver.checkpoint import (
    RunFolder,
    State,
    create_run,
    finish_round,
    forget_unfinished,
    read_progress,
    read_state,
    read_study,
    schema_on_disk,
    write_progress,
)
from fedserver.optimizers import optimizer_of
from shared_models.errors import StateInvalid
from shared_models.files import append_json, file_sha256, read_json, read_lines, write_json
from shared_models.study import Strategy, Study, canonical, sha256
from shared_models.update import Total
from shared_models.weights import Arrays, InMemory, load, schema_of

STUDIES = {
    "fedavg": Study(name="toy"),
    "fedavgm": Study(name="toy", strategy=Strategy(name="fedavgm", momentum=0.5, server_learning_rate=0.75)),
    "fedadam": Study(name="toy", strategy=Strategy(name="fedadam", server_learning_rate=0.1)),
}
INITIAL: Arrays = {
    "a": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.array(0.5, np.float32),
    "n": np.array([7], np.int64),
}


class Killed(BaseException):
    """In the place of SIGKILL: no handler of ours may go on after it."""


def updates(round_number: int) -> Total:
    """What the sites of a round sent, summed: a function of the round."""
    total = Total(schema_of(INITIAL))
    for site in range(3):
        rng = np.random.default_rng([round_number, site])
        delta = {n: np.asarray(rng.integers(-64, 64, a.shape) / 256, np.float32) for n, a in INITIAL.items()}
        total.add(InMemory({**delta, "n": np.array([round_number], np.int64)}), 10 + site)
    return total


def one_round(folder: RunFolder) -> State:
    state = read_state(folder)
    forget_unfinished(folder, state)
    optimizer = optimizer_of(read_study(folder).strategy)
    return finish_round(folder, state, updates(state.round + 1), optimizer, ("a", "b"), {"sites": {"a": state.round}})


def played(runs: Path, study: Study, rounds: int = 3) -> RunFolder:
    folder = create_run(runs, "toy", study, INITIAL)
    for _ in range(rounds):
        one_round(folder)
    return folder


def content(folder: RunFolder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.path.iterdir()}


# A round


def test_a_round_moves_the_weights_by_the_mean_and_tells_it(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    state, total = read_state(folder), updates(1)
    weights = load(folder.weights(1))
    for name in ("a", "b"):
        moved = (INITIAL[name].astype(np.float64) + total.take_mean(name)).astype(np.float32)
        assert weights[name].tobytes() == moved.tobytes()
    assert weights["n"].tolist() == [8]
    assert schema_on_disk(folder, 1) == schema_of(INITIAL)
    assert state == State(
        "toy", sha256(STUDIES["fedavg"]), 1, file_sha256(folder.weights(1)), ("a", "b"), counted={"a": 1, "b": 1}
    )
    assert read_lines(folder.metrics) == [{"round": 1, "weights_sha256": state.weights_sha256, "sites": {"a": 0}}]


def test_weights_of_earlier_rounds_stay_as_they_are(tmp_path):
    folder = played(tmp_path, STUDIES["fedavgm"], rounds=2)
    before = content(folder)
    one_round(folder)
    after = content(folder)
    for name, data in before.items():
        if name.endswith(".safetensors"):
            assert after[name] == data
    assert set(after) - set(before) == {"round-0003.safetensors", "server-0003.safetensors"}


def test_a_server_optimizer_without_memory_leaves_no_file_of_it(tmp_path):
    assert not list(played(tmp_path, STUDIES["fedavg"]).path.glob("server-*"))


def test_everything_of_a_run_is_its_owners_alone(tmp_path):
    folder = played(tmp_path / "runs", STUDIES["fedavgm"])
    write_progress(folder, {"phase": "train"})
    assert {p.stat().st_mode & 0o077 for p in [folder.path, *folder.path.iterdir()]} == {0}


# Killed


def kill_before(real: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    raise Killed


def kill_after(real: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    real(*arguments, **words)
    raise Killed


def kill_within(real: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    """Where the first of several tensors is written."""
    path, schema, tensors = arguments
    real(path, schema, (next(tensors) if n == 0 else kill_before(real) for n in range(len(schema))))


POINTS = [
    ("save", kill_before), ("save", kill_within), ("save", kill_after),
    ("save_arrays", kill_before), ("save_arrays", kill_after),
    ("append_json", kill_before), ("append_json", kill_after),
    ("write_json", kill_before), ("write_json", kill_after),
]  # fmt: skip


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, how: Callable[..., Any], act: Callable[[], object]) -> None:
    real = getattr(checkpoint, name)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, name, lambda *a, **w: how(real, *a, **w))
        with pytest.raises(Killed):
            act()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("name", "how"), POINTS, ids=[f"{h.__name__} {n}" for n, h in POINTS])
def test_killed_at_any_point_of_a_round_the_run_ends_with_the_same_bytes(tmp_path, monkeypatch, name, how, times):
    whole = played(tmp_path / "whole", STUDIES["fedadam"])
    cut = played(tmp_path / "cut", STUDIES["fedadam"], rounds=1)
    for _ in range(times):
        if read_state(cut).round < 2:
            killed_at(monkeypatch, name, how, lambda: one_round(cut))
    while read_state(cut).round < 3:
        one_round(cut)
    assert content(cut) == content(whole)
    assert [line["round"] for line in read_lines(cut.metrics)] == [1, 2, 3]


@pytest.mark.parametrize(("name", "how"), POINTS[:3] + POINTS[5:], ids=lambda p: getattr(p, "__name__", p))
def test_the_state_never_names_what_is_not_there(tmp_path, monkeypatch, name, how):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    killed_at(monkeypatch, name, how, lambda: one_round(folder))
    state = read_state(folder)
    assert state.round == (2 if (name, how) == ("write_json", kill_after) else 1)
    assert file_sha256(folder.weights(state.round)) == state.weights_sha256


def test_a_torn_line_of_a_killed_round_is_forgotten(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=2)
    lines = folder.metrics.read_bytes()
    folder.metrics.write_bytes(lines + b'{"round":3,"weigh')
    forget_unfinished(folder, read_state(folder))
    one_round(folder)
    assert [line["round"] for line in read_lines(folder.metrics)] == [1, 2, 3]
    assert folder.metrics.read_bytes().startswith(lines)


@pytest.mark.parametrize("line", ["no json", "{}", "[]", '{"round": null}'])
def test_a_damaged_metrics_file_is_told_and_left_as_it_is(tmp_path, line):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    damaged = folder.metrics.read_text() + line + "\n" + folder.metrics.read_text()
    folder.metrics.write_text(damaged)
    with pytest.raises(StateInvalid, match=r"metrics\.jsonl: has a line that tells of no round"):
        forget_unfinished(folder, read_state(folder))
    assert folder.metrics.read_text() == damaged


def test_forgetting_touches_nothing_where_nothing_is_unfinished(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=2)
    append_json(folder.metrics, {"round": 2, "final": True})
    before = (folder.metrics.stat().st_ino, folder.metrics.read_bytes())
    forget_unfinished(folder, read_state(folder))
    assert (folder.metrics.stat().st_ino, folder.metrics.read_bytes()) == before


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("write_atomic", kill_before),
        ("write_atomic", kill_after),
        ("save_arrays", kill_after),
        ("write_json", kill_before),
    ],
)
def test_killed_while_it_is_made_a_run_is_made_anew(tmp_path, monkeypatch, name, how):
    study = STUDIES["fedavg"]
    killed_at(monkeypatch, name, how, lambda: create_run(tmp_path / "cut", "toy", study, INITIAL))
    with pytest.raises(StateInvalid, match="holds no run"):
        read_state(RunFolder(tmp_path / "cut" / "toy"))
    made = create_run(tmp_path / "cut", "toy", study, INITIAL)
    assert content(made) == content(create_run(tmp_path / "whole", "toy", study, INITIAL))


# Doubted


def test_a_run_is_not_made_over_another(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    before = content(folder)
    with pytest.raises(StateInvalid, match=r"holds a run already\. Choose another name"):
        create_run(tmp_path, "toy", STUDIES["fedavg"], INITIAL)
    assert content(folder) == before


def test_a_study_that_was_changed_meanwhile_is_refused(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    changed = replace(STUDIES["fedavg"], seed=1)
    (folder.path / "study.json").write_bytes(canonical(changed))
    with pytest.raises(StateInvalid, match=r"study\.json was changed after the run began"):
        one_round(folder)
    (folder.path / "study.json").write_bytes(b'{"name":"toy","code":"x"}')
    with pytest.raises(StateInvalid, match=r"study\.json was changed after the run began"):
        one_round(folder)
    assert not folder.weights(2).exists()


def test_missing_weights_are_told_and_an_older_round_is_not_taken_for_them(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=2)
    folder.weights(2).unlink()
    with pytest.raises(StateInvalid, match=r"round-0002\.safetensors: is missing\. Restore the folder"):
        read_state(folder)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"round": 1}', '{"round": 1, "cohort": 3}', '{"cohort": []}'),
        *(
            '{"run": "toy", "study_sha256": "a", "weights_sha256": "b", "round": ' + r + "}"
            for r in ('"1"', "1.0", "null")
        ),
        '{"run": "toy", "study_sha256": "a", "weights_sha256": "b", "round": 1, "cohort": "north"}',
    ],
)
def test_a_state_that_somebody_edited_is_told(tmp_path, text):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    (folder.path / "state.json").write_text(text)
    with pytest.raises(StateInvalid, match="Restore the folder from its backup"):
        read_state(folder)


def test_a_lost_study_and_a_folder_that_is_no_run_are_told(tmp_path):
    folder = played(tmp_path, STUDIES["fedavg"], rounds=1)
    (folder.path / "study.json").unlink()
    with pytest.raises(StateInvalid, match=r"cannot be read \(FileNotFoundError\)"):
        read_state(folder)
    with pytest.raises(StateInvalid, match="holds no run"):
        read_state(RunFolder(tmp_path / "nowhere"))


def test_a_state_is_read_as_it_was_written(tmp_path):
    folder = create_run(tmp_path, "toy", STUDIES["fedavg"], INITIAL)
    state = read_state(folder)
    assert state == State("toy", sha256(STUDIES["fedavg"]), 0, file_sha256(folder.weights(0)), ())
    assert read_json(folder.path / "state.json")["round"] == 0
    write_json(folder.path / "state.json", {**read_json(folder.path / "state.json"), "cohort": ["x", "y"]})
    assert read_state(folder).cohort == ("x", "y")
    assert read_study(folder) == STUDIES["fedavg"]


# Progress


def test_progress_is_replaced_whole_and_a_run_without_any_has_none(tmp_path):
    folder = create_run(tmp_path, "toy", STUDIES["fedavg"], INITIAL)
    assert read_progress(folder) == {}
    write_progress(folder, {"phase": "train", "sites": {"a": 1}})
    write_progress(folder, {"phase": "finished"})
    assert read_progress(folder) == {"phase": "finished"}
    (folder.path / "progress.json").write_bytes(b"")  # a power cut: it is not synced
    assert read_progress(folder) == {}
    assert not list(folder.path.glob(".progress*"))
