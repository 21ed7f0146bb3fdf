"""Logs as JSON lines: nobody is named in them, they stay bounded, and people read them in order of time."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedclient.cli
import fedserver.cli
from fedclient.site import Data, SiteFile, site_toml
from fedserver.enrol import init_federation
from fedserver.state import Run, add_run
from shared_models import logs
from shared_models.errors import ManifestInvalid, StateInvalid
from shared_models.files import write_atomic
from shared_models.logs import Entry, JsonLines, follow, in_words, parsed, prune, read, scrubbed
from shared_models.supervise import LOG_LIMIT_BYTES, rotate

DATA = "/srv/hospital data"


def line(message: str, *args: object, error: BaseException | None = None) -> dict[str, Any]:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("fedclient", logging.WARNING, "x.py", 1, message, args, info)
    text = JsonLines([DATA]).format(record)
    assert "\n" not in text
    told: dict[str, Any] = json.loads(text)
    return told


def test_a_record_is_one_line_of_json_with_time_level_origin_and_words():
    made = line("prepared %d of %d cases\nfor train", 3, 9)
    assert set(made) == {"time", "level", "from", "words"}
    assert (made["level"], made["from"], made["words"]) == ("WARNING", "fedclient", "prepared 3 of 9 cases\nfor train")
    assert made["time"].endswith("+00:00")


def test_the_module_that_a_process_was_started_with_is_named_and_not_main():
    record = logging.LogRecord("__main__", logging.INFO, "/x/fedserver/dispatch.py", 1, "up", (), None)
    assert json.loads(JsonLines().format(record))["from"] == "fedserver.dispatch"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"{DATA}/Doe, Jane/1.dcm", "[data]"),
        (f"cannot read '{DATA}/Jane Doe.nii.gz', skipped", "cannot read '[data]"),
        (f"{DATA}/O'Brien^Mary: x/1.dcm: is no DICOM", "[data]"),
        (f'cannot read "{DATA}/Doe" Jane/1.dcm"', 'cannot read "[data]'),
        (f"{DATA}/manifest.csv: row 1 lacks the column image", "[data]: row 1 lacks the column image"),
        (f"{DATA}: row 3 is {DATA}/Jane: Doe.dcm", "[data]: row 3 is [data]"),
        (f"{DATA}/manifest.csv of Jane: broken", "[data]"),
        (f"{DATA}/a\nsecond line", "[data]\nsecond line"),
        ("join fl1.eyJhIjoxfQ_-x.y now", "join [secret] now"),
        ("-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----", "[secret]"),
        ("round 3 of run lung-1", "round 3 of run lung-1"),
    ],
)
def test_what_lies_in_the_data_folder_and_what_is_secret_is_not_written(text, left):
    assert scrubbed(text, [DATA]) == left


def raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_the_text_of_an_error_that_is_not_ours_is_not_written_for_it_may_name_a_patient():
    made = line("the app failed", error=raised(FileNotFoundError(2, "No such file", f"{DATA}/JaneDoe.dcm")))
    assert made["error"]["type"] == "FileNotFoundError"
    assert made["error"]["errno"] == 2
    assert made["error"]["at"][0].startswith("test_logs.py:")
    assert "JaneDoe" not in json.dumps(made)
    made = line("the app failed", error=raised(KeyError("JaneDoe")))
    assert "JaneDoe" not in json.dumps(made)
    made = line("refused", error=raised(ManifestInvalid(f"row 2 of {DATA}/manifest.csv: has no mask")))
    assert made["error"]["words"] == "row 2 of [data]: has no mask", "ours is told, without what lies in the folder"


def test_a_process_that_ends_by_an_error_says_so_in_a_line_and_not_by_its_text(tmp_path):
    program = f"from shared_models import logs\nlogs.start([{DATA!r}])\nopen({DATA + '/JaneDoe.dcm'!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 1
    (text,) = done.stderr.splitlines()
    assert json.loads(text)["error"]["type"] == "FileNotFoundError"
    assert "JaneDoe" not in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def written(name: str, *lines: tuple[str, str]) -> None:
        text = "".join(
            json.dumps({"time": f"2026-11-26T02:{at}+00:00", "level": "INFO", "from": "x", "words": words}) + "\n"
            for at, words in lines
        )
        (tmp_path / name).write_text(text)

    written("node.log.1", ("00:01.000", "first"))
    written("node.log", ("00:03.000", "third"), ("00:05.000", "fifth"))
    written("executor.log", ("00:02.000", "second"), ("00:04.000", "fourth"))
    return tmp_path


def words(entries: list[Entry]) -> list[str]:
    return [entry.words for entry in entries]


def test_lines_of_all_processes_come_in_order_of_time_and_of_one_alone_where_it_is_named(folder):
    assert words(read(folder)) == ["first", "second", "third", "fourth", "fifth"]
    assert words(read(folder, last=2)) == ["fourth", "fifth"]
    assert words(read(folder, "node")) == ["first", "third", "fifth"]
    with pytest.raises(StateInvalid, match=r"'gateway': has no log in .* There are: executor, node"):
        read(folder, "gateway")


def test_what_a_library_printed_unasked_stays_behind_the_line_before_it(folder):
    with (folder / "executor.log").open("a") as file:
        file.write("free(): invalid pointer\x1b[31m\n")
    assert words(read(folder)) == ["first", "second", "third", "fourth", "free(): invalid pointer[31m", "fifth"]


def test_separators_of_lines_in_words_tear_no_line(folder):
    words = "study \u2028 a title \x85 of three lines"
    line = {"time": "2026-01-01T00:00:00Z", "level": "INFO", "words": words}
    (folder / "torn.log").write_text(json.dumps(line, ensure_ascii=False) + "\n")
    assert [entry.words for entry in read(folder, "torn")] == [words]


def test_a_line_for_people(folder):
    entry = read(folder)[0]
    assert in_words(entry) == "2026-11-26 02:00:01 INFO    node: first"
    text = '{"time": "t", "level": "ERROR", "words": "no", "error": {"type": "OSError", "at": ["a.py:1", "b.py:2"]}}'
    made = parsed("node", text)
    assert made is not None
    assert made.words == "no [OSError at ['b.py:2']]"
    assert parsed("node", "") is None
    assert parsed("node", '{"time": "t", "level": "INFO", "words": ""}') is None


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_new_lines_are_followed_through_a_rotation_and_torn_ones_waited_for(folder):
    steps = iter(
        [
            lambda: None,
            lambda: append(folder / "node.log", '{"time": "t", "level": "INFO", "words": "six'),
            lambda: append(folder / "node.log", 'th"}\n'),
            lambda: (folder / "node.log").write_text('{"time": "u", "level": "INFO", "words": "after the cut"}\n'),
            lambda: (folder / "run-a.log").write_text('{"time": "v", "level": "INFO", "words": "a new one"}\n'),
        ]
    )
    over = False

    def pause(_: float) -> None:
        nonlocal over
        step = next(steps, None)
        over = step is None
        if step is not None:
            step()

    found = list(follow(folder, None, lambda: over, pause))
    assert words(found) == ["sixth", "after the cut", "a new one"]


def test_all_logs_together_stay_bounded(tmp_path):
    for number in range(8):
        path = tmp_path / f"run-{number}.log"
        path.write_text("x")
        os.utime(path, (number, number))
        (tmp_path / f"run-{number}.log.1").write_text("x")
    (tmp_path / "gateway.log").write_text("x")
    prune(tmp_path, most=3)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        "gateway.log", "run-5.log", "run-6.log", "run-7.log",
    ]  # fmt: skip
    assert len(list(tmp_path.glob("*.log.1"))) == 3
    full = tmp_path / "gateway.log"
    full.write_bytes(b"x" * (LOG_LIMIT_BYTES + 1))
    rotate(full)
    assert (full.stat().st_size, full.with_name("gateway.log.1").stat().st_size) == (0, LOG_LIMIT_BYTES + 1)


def test_both_commands_show_their_logs(folder, tmp_path):
    write_atomic(tmp_path / "site.toml", site_toml(SiteFile("north", "h:1", "T", Data("d"))).encode())
    (tmp_path / "logs").mkdir()
    for path in folder.glob("*.log*"):
        path.rename(tmp_path / "logs" / path.name)
    run = CliRunner().invoke
    done = run(fedclient.cli.app, ["logs", "--site", str(tmp_path), "--last", "2"])
    assert (done.exit_code, len(done.stdout.splitlines())) == (0, 2)
    done = run(fedclient.cli.app, ["logs", "node", "--site", str(tmp_path), "--json"])
    assert [json.loads(text)["process"] for text in done.stdout.splitlines()] == ["node"] * 3
    made = init_federation(tmp_path / "federation", "Test", "127.0.0.1:1")
    (made.logs / "run-lung-1.log").write_text('{"time": "t", "level": "INFO", "words": "round 1"}\n')
    (made.logs / "gateway.log").write_text('{"time": "s", "level": "INFO", "words": "up"}\n')
    here = ["--federation", str(made.folder)]
    assert "round 1" in run(fedserver.cli.app, ["logs", "lung-1", *here]).stdout
    assert "up" in run(fedserver.cli.app, ["logs", "--process", "gateway", *here]).stdout
    assert len(run(fedserver.cli.app, ["logs", *here]).stdout.splitlines()) == 2
    assert "run 'nowhere': is not known here" in run(fedserver.cli.app, ["logs", "nowhere", *here]).stderr
    add_run(made.state, Run("lung-2", "lung", "0" * 64, "queued", None, 1.0, 1.0, ""))
    assert "run 'lung-2': is queued and has no log" in run(fedserver.cli.app, ["logs", "lung-2", *here]).stderr
    (made.logs / "run-lung-3.log").touch()
    assert "Nothing has been said" in run(fedserver.cli.app, ["logs", "lung-3", *here]).stdout
    assert run(fedserver.cli.app, ["logs", "lung-3", "--json", *here]).stdout == ""
    assert logs.files_of(made.logs, None)
