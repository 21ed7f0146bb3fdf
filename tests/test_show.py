"""What the command line shows while a run goes on, when it has ended, and of a federation as it stands."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fedserver.checkpoint import RunFolder, write_progress
from fedserver.report import facts
from fedserver.show import Tail, View, follow, frame, run_table, status_table, waits_for
from shared_models.errors import RoundPaused
from shared_models.files import append_json, read_lines, write_atomic
from tests.test_report import COMPARISON, SECOND, STUDY, toy_run
from tests.toys import new_run


def console(terminal: bool = False) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=120, color_system=None, _environ={})


def shown(what: RenderableType) -> str:
    on = console()
    on.print(what)
    return written(on)


def written(on: Console) -> str:
    assert isinstance(on.file, StringIO)
    return on.file.getvalue()


def progress(phase: str, number: int, **sites: tuple[str, str]) -> dict[str, Any]:
    return {
        "phase": phase,
        "round": number,
        "rounds": 5,
        "quorum": 2,
        "updated_at": 2e9,
        "deadline_in_s": 10.0,
        "left_s": 200.0,
        "sites": {s: {"state": state, "reason": reason, "attempt": 1} for s, (state, reason) in sites.items()},
    }


def steps(run: RunFolder, of: Iterable[Mapping[str, Any] | str]) -> Callable[[], str | None]:
    """An `ended` that writes the next step of a script each time that it is asked; a word ends the run."""
    script = iter(of)

    def ended() -> str | None:
        step = next(script)
        if isinstance(step, str):
            return step
        if "seconds" in step:
            append_json(run.metrics, step)
        else:
            write_progress(run, step)
        return None

    return ended


def line(number: int, dice: float) -> dict[str, Any]:
    return {"round": number, "seconds": 12.0, "sites": {"east": {"scores": {"lung": {"dice": dice}}}}, "left_out": {}}


ASKED, COUNTED = ("asked", "is working on it"), ("counted", "")
SCRIPT: list[Mapping[str, Any] | str] = [
    progress("train", 1, east=ASKED, north=ASKED),
    progress("train", 1, east=ASKED, north=ASKED),
    progress("train", 1, east=COUNTED, north=ASKED),
    progress("train", 1, east=COUNTED, north=("late", "did not answer within 30 s")),
    line(1, 0.9),
    progress("train", 2, east=ASKED, north=("away", "is offline")),
    "stopped",
]


def test_a_paused_run_names_the_site_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RoundPaused):
        toy_run(tmp_path, away={"north": "was invited and has not joined"}, delays={"south": 1e6})
    run, on = RunFolder(tmp_path / "toy"), console()
    assert follow(run, lambda: "paused", False, on, poll_s=0.0) == "paused"
    said = written(on).splitlines()
    assert "round 1 of 3: paused, too few sites have answered" in said
    assert "round 1 of 3: north away (was invited and has not joined)" in said
    assert said[-1] == "paused, waits for north (was invited and has not joined); south (is working on it)"


def test_without_a_terminal_every_change_is_one_line(tmp_path: Path) -> None:
    run, on = new_run(tmp_path, STUDY), console()
    assert follow(run, steps(run, SCRIPT), False, on, poll_s=0.0) == "stopped"
    assert written(on).splitlines() == [
        "round 1 of 5: training, about 3 min 20 s left",
        "round 1 of 5: east working",
        "round 1 of 5: north working",
        "round 1 of 5: east counted",
        "round 1 of 5: north late (did not answer within 30 s)",
        "round 1: done in 12 s, 1 update counted; validation Dice east 0.900",
        "round 2 of 5: training, about 3 min 20 s left",
        "round 2 of 5: east working",
        "round 2 of 5: north away (is offline)",
        "stopped, waits for east (is working on it); north (is offline)",
    ]


def test_json_lines_are_one_object_for_each_change(tmp_path: Path) -> None:
    run, on = new_run(tmp_path, STUDY), console()
    follow(run, steps(run, SCRIPT), True, on, poll_s=0.0)
    said = [json.loads(text) for text in written(on).splitlines()]
    assert [s["event"] for s in said] == ["progress", "progress", "progress", "round", "progress", "ended"]
    assert said[4]["waits_for"] == {"east": "is working on it", "north": "is offline"}
    assert (said[-1]["state"], said[-1]["run"]) == ("stopped", "toy")


def test_a_terminal_gets_a_bar_and_a_row_for_each_site(tmp_path: Path) -> None:
    run, on = new_run(tmp_path, STUDY), console(terminal=True)
    assert follow(run, steps(run, SCRIPT), False, on, poll_s=0.0) == "stopped"
    last = written(on).rsplit("round 2 of 5", 1)[1]
    assert "stopped" in last
    assert "is offline" in last
    assert "0.900" in last


def test_the_frame_shows_rounds_time_left_and_silence() -> None:
    sites = {"east": ASKED, "north": ("rejected", "UPDATE_NONFINITE: it holds NaN")}
    text = shown(frame(View(progress("train", 3, **sites), scores={"east": "0.912"}, left_s=130.0), quiet_s=90.0))
    for words in ("round 3 of 5", "training", "about 2 min 10 s left", "no news for 1 min 30 s", "working", "0.912"):
        assert words in text
    assert "answer not accepted" in text
    assert "UPDATE_NONFINITE" in text
    assert "known after the first round" in shown(frame(View(progress("train", 1, east=ASKED))))
    assert "waiting for the run to begin" in shown(frame(View({})))


def test_a_finished_run_is_followed_to_its_test(tmp_path: Path) -> None:
    run, on = toy_run(tmp_path), console()
    assert follow(run, lambda: "finished", False, on, poll_s=0.0) == "finished"
    said = written(on).splitlines()
    assert "test Dice: east 0.850, north 0.650, south 0.500" in said
    assert said[-1] == "finished"


def test_what_a_process_that_has_gone_left_behind_is_not_shown_as_news(tmp_path: Path) -> None:
    run, on = new_run(tmp_path, STUDY), console()
    old = progress("paused", 2, east=("away", "is offline")) | {"updated_at": 1e9}
    script: list[Mapping[str, Any] | str] = [old, progress("train", 2, east=ASKED), "finished"]
    follow(run, steps(run, script), False, on, poll_s=0.0)
    assert "paused" not in written(on)
    assert written(on).startswith("round 2 of 5: training")


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "later")
    answers = iter([None, None, "failed"])
    on = console()
    assert follow(run, lambda: next(answers), False, on, poll_s=0.0) == "failed"
    assert written(on) == "failed\n"


def test_lines_come_once_even_when_a_resumed_run_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    append_json(path, line(1, 0.5))
    append_json(path, line(2, 0.6))
    assert [x["round"] for x in tail.read()] == [1, 2]
    write_atomic(path, path.read_bytes().splitlines(keepends=True)[0])
    append_json(path, line(2, 0.7))
    assert [x["sites"]["east"]["scores"]["lung"]["dice"] for x in tail.read()] == [0.7]
    with path.open("ab") as file:
        file.write(b'{"round": 3, "si')
    assert tail.read() == []
    append_json(path, line(3, 0.8))
    assert [x["round"] for x in tail.read()] == [3]
    assert len(read_lines(path)) == 3


def test_a_site_cannot_send_commands_to_the_terminal(tmp_path: Path) -> None:
    run, on = new_run(tmp_path, STUDY), console()
    evil = progress("train", 1, **{"ea\x1b[2Jst": ("rejected", "\x1b]0;owned\x07 [bold]loud[/bold]\r\nround 9")})
    follow(run, steps(run, [evil, "failed"]), False, on, poll_s=0.0)
    text = written(on) + shown(frame(View(evil))) + shown(status_table(status(evil)))
    assert not {"\x1b", "\x07", "\r"} & set(text)
    assert "[bold]loud[/bold]" in text
    assert not any(row.startswith("round 9") for row in text.splitlines())


def status(now: Mapping[str, Any], state: str = "running", message: str = "") -> dict[str, Any]:
    run = {"id": "lung-1", "study": "lung-ct", "state": state, "message": message, "finished_rounds": 1, "rounds": 5}
    sites = [
        {"name": "east", "state": "active", "online": True, "reason": ""},
        {"name": "north", "state": "active", "online": False, "reason": "is offline"},
        {"name": "south", "state": "invited"},
    ]
    return {"runs": [run | {"progress": dict(now)}], "sites": sites}


def test_status_names_whom_a_run_waits_for_and_why_a_site_is_away() -> None:
    now = progress("paused", 2, east=COUNTED, north=("lost", "its node went away while working"))
    rows = [" ".join(row.split()) for row in shown(status_table(status(now))).splitlines()]
    assert "lung-1 lung-ct paused 2 of 5 north: its node went away while working" in rows
    assert "east active yes" in rows
    assert "north active no is offline" in rows
    assert "south invited was invited and has not joined" in rows
    failed = shown(status_table(status(now, "failed", "the server ran out of memory")))
    assert "the server ran out of memory" in failed
    assert "1 of 5" in failed
    assert "north:" not in failed
    assert waits_for({}) == {}


def test_status_names_the_sites_that_a_round_does_without_and_says_when_nothing_serves() -> None:
    seats = {
        "north": {"state": "refused", "reason": "DATA_INVALID", "attempt": 1},
        "south": {"state": "counted", "reason": "", "attempt": 1},
        "east": {"state": "rejected", "reason": "UPDATE_NONFINITE: holds NaN", "attempt": 1},
    }
    progress = {"phase": "train", "round": 2, "rounds": 3, "quorum": 1, "sites": seats}
    run = {"id": "r-1", "study": "r", "state": "running", "message": "", "finished_rounds": 1, "rounds": 3}
    facts = {"runs": [{**run, "progress": progress}], "sites": [], "served": False, "troubles": ["link has ended"]}
    text = " ".join(shown(status_table(facts)).split())
    assert "without north: refused (DATA_INVALID)" in text
    assert "without east: answer not accepted (UPDATE_NONFINITE: holds NaN)" in text
    assert "without south" not in text
    assert "Nothing serves this federation: start `fedserver serve`" in text
    assert "link has ended" in text


def test_an_empty_federation_is_told_what_to_do_next() -> None:
    text = shown(status_table({"runs": [], "sites": []}))
    assert "fedserver run STUDY" in text
    assert "fedserver invite SITE" in text


def test_the_table_at_the_end_marks_the_worst_site(tmp_path: Path) -> None:
    run = toy_run(tmp_path)
    rows = [row.split() for row in shown(run_table(facts(run))).splitlines()]
    assert ["south", "worst", "0.500", "\u2013", "1"] in rows
    assert ["mean", "over", "sites", "0.667"] in rows
    rows = [row.split() for row in shown(run_table(facts(run, [COMPARISON]))).splitlines()]
    assert ["east", "worst", "0.800", "0.500", "0.910", "0.850", "+5.0"] in rows
    assert ["south", "0.950", "0.150", "0.930", "0.940", "\u22121.0"] in rows
    seeds = shown(run_table(facts(run, [COMPARISON, SECOND])))
    assert "0.860 ± 0.014" in seeds
    assert "+6.0 ± 1.4" in seeds


def test_showing_imports_nothing_that_is_slow_or_not_its_own() -> None:
    heavy = "{'flwr', 'torch', 'sqlite3', 'matplotlib', 'jinja2', 'tensorboard'} & set(sys.modules)"
    code = f"import sys, fedserver.show, fedserver.report; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
