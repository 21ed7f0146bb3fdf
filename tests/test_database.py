"""SQLite files of one owner: there whole or not at all, and what is not sound or not ours is refused."""

import sqlite3
from functools import partial

import pytest

from shared_models.database import check, connected, create, reading, writing
from shared_models.errors import StateInvalid
from tests.crash import WRITES, left_by_kills

SCHEMA = "CREATE TABLE things (name TEXT PRIMARY KEY) STRICT; PRAGMA user_version = 3;"


def names(path) -> list[str]:
    with connected(path) as db:
        return [row[0] for row in db.execute("SELECT name FROM things ORDER BY name")]


def made(path, tell) -> None:
    create(path, SCHEMA)


def test_killed_at_any_line_a_file_is_there_whole_or_not_at_all(quick_folder):
    here, found = quick_folder / "here", set()
    here.mkdir()
    for left in left_by_kills(here, partial(made, here / "state.db"), WRITES, quick_folder / "kept"):
        path = left.folder / "state.db"
        found.add(path.exists())
        if path.exists():
            check(path, 3, "a test")
        else:
            create(path, SCHEMA)
        assert path.stat().st_mode & 0o777 == 0o600
    assert found == {True, False}


def test_a_file_that_is_there_is_never_written_over(tmp_path):
    path = tmp_path / "state.db"
    create(path, SCHEMA)
    with writing(path) as db:
        db.execute("INSERT INTO things VALUES ('kept')")
    with pytest.raises(StateInvalid, match="is there already"):
        create(path, SCHEMA)
    assert names(path) == ["kept"]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


def test_a_transaction_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "state.db"
    create(path, SCHEMA)
    with pytest.raises(StateInvalid, match="UNIQUE"), writing(path) as db:
        db.executemany("INSERT INTO things VALUES (?)", [["first"], ["second"], ["first"]])
    assert names(path) == []


def test_what_is_missing_exposed_damaged_or_of_another_layout_is_refused(tmp_path):
    path = tmp_path / "state.db"
    with pytest.raises(StateInvalid, match=r"is missing. Point to a folder that a test made"):
        check(path, 3, "a test")
    create(path, SCHEMA)
    with pytest.raises(StateInvalid, match="has layout 3, this package reads 4"):
        check(path, 4, "a test")
    path.chmod(0o644)
    with pytest.raises(StateInvalid, match="must be ours alone"):
        check(path, 3, "a test")
    path.chmod(0o600)
    path.write_bytes(b"no database at all, whatever its name says" * 100)
    with pytest.raises(StateInvalid, match="not a database"):
        check(path, 3, "a test")
    with pytest.raises(StateInvalid, match=r"state\.db: "), connected(path) as db:
        db.execute("SELECT 1 FROM things")
    assert sqlite3.sqlite_version_info >= (3, 37)  # STRICT tables


def test_a_reader_writes_nothing_waits_for_no_writer_and_leaves_the_log_of_writes_as_it_was(tmp_path):
    path = tmp_path / "state.db"
    create(path, SCHEMA)
    log = tmp_path / "state.db-wal"
    with connected(path) as kept:  # so that nobody who closes is the last
        kept.execute("SELECT 1 FROM things").fetchall()
        with writing(path) as db:
            db.execute("INSERT INTO things VALUES ('first')")
        before = log.read_bytes()
        with writing(path) as db, reading(path) as reader:
            db.execute("INSERT INTO things VALUES ('second')")
            assert reader.execute("SELECT name FROM things").fetchall() == [("first",)]
        with pytest.raises(StateInvalid, match="readonly"), reading(path) as reader:
            reader.execute("INSERT INTO things VALUES ('third')")
        assert log.read_bytes().startswith(before)


def test_what_a_killed_writer_has_left_is_read_by_who_cannot_write(tmp_path):
    """The file and its log as they lie there after a crash, without SQLite's index in shared memory."""
    path, copy = tmp_path / "state.db", tmp_path / "copy" / "state.db"
    create(path, SCHEMA)
    copy.parent.mkdir()
    with connected(path) as db:
        db.execute("INSERT INTO things VALUES ('kept')")
        for end in ("", "-wal"):
            (copy.parent / f"state.db{end}").write_bytes((tmp_path / f"state.db{end}").read_bytes())
    with reading(copy) as reader:
        assert reader.execute("SELECT name FROM things").fetchall() == [("kept",)]
