"""Files are there whole or not at all, whatever becomes of who writes them, and are their owner's alone."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_models.files import append_json, canonical_json, read_json, read_lines, replacing, write_atomic, write_json

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def run_and_kill(code: str, *arguments: object) -> None:
    """Another process that kills itself with SIGKILL where `code` says `die()`."""
    die = "import os, sys, pathlib\nfrom shared_models import files\ndie = lambda: os.kill(os.getpid(), 9)\n"
    ended = subprocess.run([sys.executable, "-c", die + code, *map(str, arguments)], timeout=30, check=False)
    assert ended.returncode == -signal.SIGKILL


# Whole files


def write_half(path: Path, error: BaseException) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_fails_or_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_atomic(tmp_path / "f", b"old")
    with pytest.raises(error):
        write_half(tmp_path / "f", error())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    write_atomic(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space") as refused:
        write_atomic(tmp_path / "f", b"new")
    assert refused.value.filename == str(tmp_path / "f")  # which a command then names
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


@pytest.mark.parametrize(
    "code",
    [
        "with files.replacing(pathlib.Path(sys.argv[1])) as file:\n    file.write(b'x' * 100_000); file.flush(); die()",
        "files.os.fsync = lambda handle: die()\nfiles.write_atomic(pathlib.Path(sys.argv[1]), b'new')",
        "pathlib.Path.replace = lambda self, to: die()\nfiles.write_atomic(pathlib.Path(sys.argv[1]), b'new')",
    ],
    ids=["while it writes", "before it is on the disk", "before it takes its place"],
)
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path, code):
    write_atomic(tmp_path / "f", b"old")
    run_and_kill(code, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old"
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_content_is_on_the_disk_before_it_takes_its_place_and_the_name_after(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        events.append("folder" if os.path.isdir(handle) else "content")  # noqa: PTH112 a handle
        fsync(handle)

    def note_replace(self: Path, to: Path) -> Path:
        events.append("name")
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomic(tmp_path / "f", b"new")
    assert events == ["content", "name", "folder"]


def test_threads_that_write_one_file_at_once_leave_one_of_their_contents_whole(tmp_path):
    contents = [bytes([n]) * (1 << 18) for n in range(8)]
    barrier = threading.Barrier(len(contents))
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            barrier.wait(10)
            for _ in range(3):
                write_atomic(tmp_path / "f", content)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "f").read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_are_0600_and_folders_made_for_them_0700(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a" / "b" / "f", b"")
        write_json(tmp_path / "a" / "c" / "d" / "g", {})
        append_json(tmp_path / "e" / "f" / "lines", {"n": 1})
        (tmp_path / "open").touch(0o666)
        write_atomic(tmp_path / "open", b"now private")
    finally:
        os.umask(before)
    made = [p for p in tmp_path.rglob("*")]
    assert {mode(p) for p in made if p.is_file()} == {0o600}
    assert {mode(p) for p in made if p.is_dir()} == {0o700}
    assert len(made) == 10


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "f").symlink_to(tmp_path / "elsewhere")
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert not (tmp_path / "f").is_symlink()


# JSON


@settings(max_examples=50)
@given(anything)
def test_canonical_json_comes_back_and_has_one_form(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert b"\n" not in text


def test_canonical_json_knows_no_order_of_keys_and_no_blanks():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()


@pytest.mark.parametrize("write", [write_json, append_json])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_is_no_json_is_refused_and_changes_nothing(tmp_path, write, odd):
    write(tmp_path / "f", {"n": 1})
    before = (tmp_path / "f").read_bytes()
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path / "f", {"n": odd})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", before)]


def test_written_json_is_read_back(tmp_path):
    write_json(tmp_path / "f", {"b": [1, None], "a": "é\n"})
    assert read_json(tmp_path / "f") == {"b": [1, None], "a": "é\n"}


# Lines of JSON


def test_lines_come_back_in_their_order_and_a_missing_file_has_none(tmp_path):
    assert read_lines(tmp_path / "lines") == []
    for n in range(3):
        append_json(tmp_path / "lines", {"n": n, "text": "a\nb\u2028c"})
    assert [line["n"] for line in read_lines(tmp_path / "lines")] == [0, 1, 2]
    assert read_lines(tmp_path / "lines")[0]["text"] == "a\nb\u2028c"


def test_wherever_a_writer_was_killed_the_torn_line_is_left_out_and_then_cut_off(tmp_path):
    path = tmp_path / "lines"
    append_json(path, {"n": 0})
    append_json(path, {"n": 1, "words": "torn é"})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert read_lines(path) == [{"n": 0}]
        append_json(path, {"n": 2})
        assert read_lines(path) == [{"n": 0}, {"n": 2}]


def test_a_file_that_is_nothing_but_a_torn_line_starts_anew(tmp_path):
    (tmp_path / "lines").write_bytes(b'{"n": 0')
    assert read_lines(tmp_path / "lines") == []
    append_json(tmp_path / "lines", {"n": 1})
    assert read_lines(tmp_path / "lines") == [{"n": 1}]


def test_a_writer_killed_before_its_line_is_on_the_disk_leaves_a_file_that_can_be_read(tmp_path):
    append_json(tmp_path / "lines", {"n": 0})
    run_and_kill(
        "files.os.fsync = lambda handle: die()\nfiles.append_json(pathlib.Path(sys.argv[1]), {'n': 1})",
        tmp_path / "lines",
    )
    assert read_lines(tmp_path / "lines") in ([{"n": 0}], [{"n": 0}, {"n": 1}])


def test_a_disk_that_takes_half_a_line_is_told_and_leaves_the_lines_before(tmp_path, monkeypatch):
    append_json(tmp_path / "lines", {"n": 0})
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, content, at: pwrite(handle, content[: len(content) // 2], at))
    with pytest.raises(OSError, match="No space left") as refused:
        append_json(tmp_path / "lines", {"n": 1})
    assert refused.value.filename == str(tmp_path / "lines")
    assert (tmp_path / "lines").read_bytes() == b'{"n":0}\n'


def test_a_disk_that_takes_no_more_is_told_with_the_file_that_could_not_grow(tmp_path, monkeypatch):
    append_json(tmp_path / "lines", {"n": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            append_json(tmp_path / "lines", {"n": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.value.filename == str(tmp_path / "lines")
    assert read_lines(tmp_path / "lines") == [{"n": 0}]


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path):
    (tmp_path / "lines").write_bytes(b'{"n":0}\n{"n":\n{"n":2}\n')
    with pytest.raises(ValueError):
        read_lines(tmp_path / "lines")
