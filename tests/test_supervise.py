"""Processes are started again, told of, killed with their children; logs, ports and secrets stay bounded."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared_models.errors import ProcessFailed
from shared_models.supervise import (
    Child,
    Patience,
    _attend,
    _last_line,
    _Watched,
    end,
    kept_port,
    kept_secret,
    only_one,
    read_port,
    read_status,
    rotate,
    spawn,
    supervise,
    tell_deaths,
    troubles,
)

QUICK = Patience(first_s=0.05, longest_s=0.2, healthy_s=60, grace_s=0.5)


def wait(done: Callable[[], object], timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextmanager
def supervised(folder: Path, *commands: Sequence[str]) -> Iterator[threading.Event]:
    stop = threading.Event()
    children = [Child(f"child{i}", command, folder / f"logs/{i}.log") for i, command in enumerate(commands)]
    thread = threading.Thread(target=supervise, args=(children, stop, folder, QUICK))
    thread.start()
    try:
        wait(lambda: all(c["pid"] for c in status(folder).values()) and len(status(folder)) == len(commands))
        yield stop
    finally:
        stop.set()
        thread.join()


def status(folder: Path) -> dict[str, dict[str, Any]]:
    return dict(read_status(folder)["children"])


def test_a_process_that_has_failed_all_night_is_still_started_again(tmp_path):
    one = _Watched(Child("child", [sys.executable, "-S", "-c", "raise SystemExit(1)"], tmp_path / "child.log"))
    assert _attend(one, QUICK)
    one.failures = 3000
    wait(lambda: _attend(one, QUICK))
    assert (one.process, one.failures) == (None, 3001)
    assert one.next_start - time.monotonic() <= 1.25 * QUICK.longest_s


def test_a_child_that_dies_is_started_again_and_the_status_says_so(tmp_path: Path) -> None:
    with supervised(tmp_path, ["sleep", "60"]):
        first = status(tmp_path)["child0"]["pid"]
        os.kill(first, signal.SIGKILL)
        wait(lambda: status(tmp_path)["child0"]["pid"] not in (first, None))
        shown = status(tmp_path)["child0"]
        assert (shown["restarts"], shown["last_exit"], shown["state"]) == (1, -9, "running")


def test_a_child_that_cannot_live_is_tried_again_and_again_with_longer_pauses(tmp_path: Path) -> None:
    times = tmp_path / "times"
    with supervised(tmp_path, ["sh", "-c", f"date +%s.%N >> {times}; exec sh -c 'sleep 0.01; exit 3'"]):
        wait(lambda: times.exists() and len(times.read_text().split()) >= 5)
    moments = [float(word) for word in times.read_text().split()]
    assert status(tmp_path)["child0"]["last_exit"] in (3, -15)
    assert moments[4] - moments[3] > 0.14  # doubled up to 0.2 s, less a quarter


def test_the_last_words_of_a_child_that_dies_are_told_once_for_each_death_and_shown_by_the_status(
    tmp_path: Path,
) -> None:
    stop, said = threading.Event(), list[str]()
    child = Child(
        "link", ["sh", "-c", "echo first; printf 'state.db: is \\033damaged\\n'; exit 3"], tmp_path / "logs/link.log"
    )
    thread = threading.Thread(target=supervise, args=([child], stop, tmp_path, QUICK, tell_deaths(said.append)))
    with only_one(tmp_path):
        thread.start()
        wait(lambda: len(said) >= 2)
        shown = troubles(read_status_of_another_process(tmp_path))
        stop.set()
        thread.join()
    assert said[:2] == [
        "link has ended and is started again, so far once; see logs/link.log. state.db: is damaged",
        "link has ended and is started again, so far 2 times; see logs/link.log. state.db: is damaged",
    ]
    assert len(shown) == 1
    assert shown[0].endswith("see logs/link.log. state.db: is damaged")


def test_the_last_words_of_a_child_that_logs_json_lines_are_its_words(tmp_path: Path) -> None:
    line = json.dumps({"time": "t", "level": "CRITICAL", "from": "x", "words": "no disk"})
    (tmp_path / "node.log").write_text(f"first\n{line}\n")
    assert _last_line(tmp_path / "node.log") == "no disk"
    assert _last_line(tmp_path / "none.log") == ""


def read_status_of_another_process(folder: Path) -> dict[str, Any]:
    return {**json.loads((folder / "status.json").read_text())}


def test_a_child_that_is_killed_is_told_with_its_signal_and_one_that_lives_is_no_trouble(tmp_path: Path) -> None:
    with supervised(tmp_path, ["sleep", "60"]):
        quiet = troubles(read_status_of_another_process(tmp_path))
        os.kill(status(tmp_path)["child0"]["pid"], signal.SIGKILL)
        wait(lambda: status(tmp_path)["child0"]["restarts"])
        told = troubles(read_status_of_another_process(tmp_path))
    assert (quiet, told) == (
        [],
        ["child0 has ended by signal 9 and is started again, so far once; see logs/child0.log."],
    )


HOLDS_ITS_INTERPRETER = """
import ctypes, subprocess
print(subprocess.Popen(["sleep", "1000"]).pid, flush=True)
ctypes.PyDLL(None).sleep(1000)  # unlike CDLL, without letting other threads run
"""


def test_a_child_that_hangs_and_holds_its_interpreter_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    log, asked = tmp_path / "logs/child.log", list[int]()

    def hangs(pid: int) -> str:
        asked.append(pid)
        return "It hung." if log.read_text().strip() and len(set(asked)) == 1 else ""

    stop = threading.Event()
    child = Child("child", [sys.executable, "-c", HOLDS_ITS_INTERPRETER], log, hangs=hangs)
    thread = threading.Thread(target=supervise, args=([child], stop, tmp_path, QUICK))
    thread.start()
    wait(lambda: len(set(asked)) == 2)
    shown = status(tmp_path)["child"]
    stop.set()
    thread.join()
    assert (shown["restarts"], shown["last_exit"], shown["last_words"]) == (1, -9, "It hung.")
    started = int(log.read_text().split()[0])
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_a_full_disk_ends_no_process_that_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    with supervised(tmp_path, ["sh", "-c", f"echo one >> {starts}; exec sleep 60"]):
        wait(starts.exists)
        monkeypatch.setattr("shared_models.supervise.write_json", _full)
        os.kill(status(tmp_path)["child0"]["pid"], signal.SIGKILL)
        wait(lambda: starts.read_text() == "one\none\n")
        monkeypatch.undo()


def test_a_log_that_finds_no_room_aside_is_cut_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 200)
    monkeypatch.setattr("shared_models.supervise.shutil.copyfile", _full)
    rotate(log, limit_bytes=100)
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()] == [("log", 0)]


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device", "status.json")


def test_the_output_of_a_child_is_in_its_log(tmp_path: Path) -> None:
    with supervised(tmp_path, ["sh", "-c", "echo out; echo err >&2; sleep 60"]):
        wait(lambda: (tmp_path / "logs/0.log").read_text() == "out\nerr\n")
    assert (tmp_path / "logs/0.log").stat().st_mode & 0o777 == 0o600


def test_a_child_may_end_in_order_and_a_stubborn_one_is_killed_with_its_own_children(tmp_path: Path) -> None:
    polite = f"trap 'echo bye >> {tmp_path}/bye; exit 0' TERM; while :; do sleep 0.05; done"
    stubborn = f"trap '' TERM; sleep 61 & echo $! > {tmp_path}/grandchild; while :; do sleep 0.05; done"
    with supervised(tmp_path, ["sh", "-c", polite], ["sh", "-c", stubborn]):
        wait(lambda: (tmp_path / "grandchild").exists() and (tmp_path / "grandchild").read_text().strip())
        grandchild = int((tmp_path / "grandchild").read_text())
    assert (tmp_path / "bye").read_text() == "bye\n"
    wait(lambda: not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE)
    assert [child["last_exit"] for child in status(tmp_path).values()] == [0, -9]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_no_child_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    script = (
        "import sys, threading; from pathlib import Path; from shared_models.supervise import *\n"
        "folder = Path(sys.argv[1])\n"
        "with only_one(folder): supervise([Child('a', ['sleep', '62'], folder / 'a.log')], threading.Event(), folder)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait(lambda: (tmp_path / "status.json").exists())
    pid = status(tmp_path)["a"]["pid"]
    assert read_status(tmp_path)["supervisor"] == supervisor.pid
    supervisor.kill()
    supervisor.wait()
    wait(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 2)
    assert read_status(tmp_path)["supervisor"] is None


def test_a_folder_is_served_once_and_the_refusal_names_the_process(tmp_path: Path) -> None:
    with only_one(tmp_path):
        with pytest.raises(ProcessFailed, match=f"in use already by process {os.getpid()}"), only_one(tmp_path):
            pass
        assert read_status(tmp_path) == {"supervisor": None, "children": {}}  # no status yet
    with only_one(tmp_path):
        pass


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="link: /no/such/program could not be started"):
        spawn(Child("link", ["/no/such/program"], tmp_path / "log"))


def test_a_child_gets_the_environment_it_is_given(tmp_path: Path) -> None:
    process = spawn(Child("env", ["sh", "-c", "echo $ANSWER $HOME; exec sleep 60"], tmp_path / "log", {"ANSWER": "42"}))
    wait(lambda: (tmp_path / "log").read_text() == f"42 {os.environ['HOME']}\n")
    assert end(process, grace_s=5) == -15


def test_a_full_log_becomes_the_old_one_while_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        rotate(log, limit_bytes=50)
        writer.write(b"new")
        rotate(log, limit_bytes=50)
    assert log.read_bytes() == b"new"
    assert (tmp_path / "log.1").read_bytes() == b"x" * 100


def test_a_port_is_kept_until_somebody_else_has_it(tmp_path: Path) -> None:
    port = kept_port(tmp_path / "port")
    assert kept_port(tmp_path / "port") == port == read_port(tmp_path / "port")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert kept_port(tmp_path / "port") != port


def test_a_port_that_was_never_chosen_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="Start it first"):
        read_port(tmp_path / "port")


def test_a_secret_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    secret = kept_secret(tmp_path / "secrets/s")
    assert len(secret) == 32
    assert kept_secret(tmp_path / "secrets/s") == secret
    assert (tmp_path / "secrets/s").stat().st_mode & 0o777 == 0o600


def test_the_status_file_is_json_for_others_to_read(tmp_path: Path) -> None:
    with supervised(tmp_path, ["sleep", "60"]):
        written = json.loads((tmp_path / "status.json").read_text())
    assert set(written["children"]["child0"]) == {"pid", "state", "restarts", "last_exit", "since", "last_words"}
