"""The tool of the tests that kill: what it keeps of each line is what a process leaves that is killed there."""

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from shared_models.database import create, writing
from shared_models.files import write_atomic
from tests.crash import digest, fresh, killed_at, left_by_kills

HERE = ("tests/test_crash.py",)
SCHEMA = "CREATE TABLE things (name TEXT PRIMARY KEY) STRICT;"


def written(folder: Path, tell) -> None:
    """Files that grow, are replaced and are removed; a table in two transactions, the second of which fails."""
    (folder / "log").write_text("one\n")
    tell("log")
    with (folder / "log").open("a") as log:
        log.write("two\n")
        log.flush()
        log.write("three\n")
    write_atomic(folder / "whole", b"first")
    write_atomic(folder / "whole", b"other")  # as long as the first
    create(folder / "state.db", SCHEMA)
    with writing(folder / "state.db") as db:
        db.execute("INSERT INTO things VALUES ('kept')")
        tell("inside")
    tell("committed")
    try:
        with writing(folder / "state.db") as db:
            db.execute("INSERT INTO things VALUES ('taken back')")
            raise ValueError
    except ValueError:
        (folder / "whole").unlink()


def told(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """What lies in a folder: plain files by their bytes, the table by its rows (SQLite's own files differ by salts)."""
    plain = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith("state.db")}
    if not (folder / "state.db").exists():
        return plain, []
    with closing(sqlite3.connect(folder / "state.db")) as db:
        return plain, [row[0] for row in db.execute("SELECT name FROM things")]


def test_what_is_kept_of_each_line_is_what_a_process_leaves_that_is_killed_there(quick_folder):
    (quick_folder / "act").mkdir()
    found = left_by_kills(quick_folder / "act", partial(written, quick_folder / "act"), HERE, quick_folder / "kept")
    states = [told(left.folder) for left in found]
    line, ended = 0, False
    while not ended:
        line += 1
        folder = fresh(quick_folder, line)
        words, ended = killed_at(line, partial(written, folder), HERE)
        place = max(n for n, left in enumerate(found) if left.line <= line)
        assert (tuple(words), ended, told(folder)) == (found[place].words, found[place].ended, states[place]), line
    assert found[-1].line == line
    assert b"one\ntwo\n" in [plain.get("log") for plain, _ in states]  # which is there between two lines alone


def test_a_change_that_leaves_size_and_names_as_they_were_is_seen(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    before = digest(tmp_path)
    (tmp_path / "a").write_bytes(b"21")
    assert digest(tmp_path) != before
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path) != before


def test_an_act_that_fails_is_no_end(tmp_path):
    def act(tell) -> None:
        raise OSError("no room")

    (tmp_path / "act").mkdir()
    with pytest.raises(AssertionError, match="no room"):
        left_by_kills(tmp_path / "act", act, HERE, tmp_path / "kept")
