"""Keeps the processes of one folder alive: start, watch, restart with backoff, logs, an orderly end.

There is one supervisor for each folder (a lock that ends with its process), and no process outlives it (Linux:
PR_SET_PDEATHSIG), so that a killed supervisor leaves nothing that would take messages from its successor.
"""

import ctypes
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared_models.errors import ProcessFailed, StateInvalid
from shared_models.files import private_folder, read_json, write_atomic, write_json
from shared_models.identity import load_secret
from shared_models.logs import parsed

POLL_S = 0.2
LOG_LIMIT_BYTES = 10 * 2**20  # a full log becomes NAME.1, the one before it goes
LATELY_S = 60.0
PR_SET_PDEATHSIG = 1


def _never(pid: int) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep alive.

    Attributes:
        env: what is added to the supervisor's own environment.
        log: where its output goes, appended.
        hangs: asked at each look, with the number of its process; where it answers with words, the process is killed
            with its whole group: one that hangs may hold its own interpreter, so that nothing inside could end it.
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    hangs: Callable[[int], str] = _never


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what.

    Attributes:
        first_s, longest_s: pause before the first restart, doubled each time up to the longest; half of it is jitter.
        healthy_s: a process that lived this long starts again at `first_s`.
        grace_s: from SIGTERM to SIGKILL.
    """

    first_s: float = 1.0
    longest_s: float = 30.0
    healthy_s: float = 60.0
    grace_s: float = 10.0


@dataclass(slots=True)
class Shown:
    """What the status file says of a child.

    Attributes:
        last_exit: negative for a signal, as in `subprocess`.
        last_words: the last line of its log when it ended by itself, for the owner of the folder.
    """

    pid: int | None = None
    state: Literal["running", "waiting", "stopped"] = "waiting"
    restarts: int = 0
    last_exit: int | None = None
    since: float = 0.0
    last_words: str = ""


@dataclass(slots=True)
class _Watched:
    child: Child
    shown: Shown = field(default_factory=Shown)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    failures: int = 0
    next_start: float = 0.0
    hung: str = ""  # why it was killed


def supervise(
    children: Sequence[Child],
    stop: threading.Event,
    folder: Path,
    patience: Patience = Patience(),
    on_change: Callable[[Mapping[str, Shown]], None] | None = None,
) -> None:
    """Keeps `children` running until `stop` is set, then ends them; writes folder/status.json at each change.

    The caller holds the folder (`only_one`).
    """
    watched = [_Watched(child) for child in children]
    try:
        while not stop.is_set():
            if any([_attend(one, patience) for one in watched]):
                _show(watched, folder, on_change)
            stop.wait(POLL_S)
    finally:
        _end(watched, patience.grace_s)
        _show(watched, folder, on_change)


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM, SIGINT and SIGHUP set; for the main thread of a command."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _attend(one: _Watched, patience: Patience) -> bool:
    """Starts or buries one child where that is due; True when there is news."""
    now = time.monotonic()
    if one.process is None:
        if now < one.next_start:
            return False
        try:
            one.process, one.began = spawn(one.child), now
        except OSError as error:  # of its log: the disk is full
            one.failures += 1
            one.next_start = now + patience.longest_s
            one.shown = Shown(None, "waiting", one.shown.restarts + 1, None, time.time(), str(error))
            return True
        one.shown.pid, one.shown.state, one.shown.since = one.process.pid, "running", time.time()
        return True
    rotate(one.child.log)
    code = reap(one.process)
    if code is None:
        one.hung = one.hung or one.child.hangs(one.process.pid)
        if one.hung:  # waited for at the next looks: a driver may hold a process for a while after SIGKILL
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(one.process.pid, signal.SIGKILL)
        return False
    one.failures = 1 if now - one.began >= patience.healthy_s else one.failures + 1
    doubled = patience.first_s * 2.0 ** min(one.failures - 1, 30)  # after a night of failures 2 ** n is no float
    pause_s = min(patience.longest_s, doubled) * random.uniform(0.75, 1.25)
    one.process, one.next_start = None, now + pause_s
    words, one.hung = one.hung or (_last_line(one.child.log) if code > 0 else ""), ""
    one.shown = Shown(None, "waiting", one.shown.restarts + 1, code, time.time(), words)
    return True


def _last_line(log: Path, most_bytes: int = 2000) -> str:
    """Of a log, without what a terminal would obey; "" where there is none."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
        lines = file.read().decode(errors="replace").strip().splitlines()
        last = parsed(log.stem, lines[-1]) if lines else None
        return "" if last is None else "".join(c for c in last.words[-500:] if c.isprintable())
    return ""


def spawn(child: Child, stdin: int | None = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Starts a process in a group of its own that ends when the calling thread does."""
    child.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = os.open(child.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    try:
        return subprocess.Popen(
            list(child.command),
            env={**os.environ, **child.env},
            stdin=stdin,
            stdout=log,
            stderr=log,
            process_group=0,
            preexec_fn=_tie_to(os.getpid()),
        )
    except OSError as error:
        raise ProcessFailed(
            f"{child.name}: {child.command[0]} could not be started ({error.strerror}). Install the package again."
        ) from error
    finally:
        os.close(log)


def _tie_to(parent: int) -> Callable[[], None] | None:
    """What a child does before exec; only calls that are safe after a fork, the library is loaded before it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return tie


def reap(process: subprocess.Popen[bytes]) -> int | None:
    """Exit status of an ended child, or None; the rest of its group is killed while its number is still taken."""
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def end(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """SIGTERM to the process, after `grace_s` SIGKILL to its group; returns the exit status."""
    os.kill(process.pid, signal.SIGTERM)  # not send_signal, which would reap it unseen
    return _await_end(process, time.monotonic() + grace_s)


def _await_end(process: subprocess.Popen[bytes], until: float) -> int:
    """Waits for a process that was told to end; no second SIGTERM, which kills a Python that is just finishing."""
    while (code := reap(process)) is None:
        if time.monotonic() > until:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return code


def _end(watched: Sequence[_Watched], grace_s: float) -> None:
    living = [one for one in watched if one.process is not None]
    for one in living:
        if one.process is not None:
            os.kill(one.process.pid, signal.SIGTERM)
    until = time.monotonic() + grace_s
    for one in living:
        if one.process is not None:
            one.shown.last_exit = _await_end(one.process, until)
            one.process = None
    for one in watched:
        one.shown.pid, one.shown.state, one.shown.since = None, "stopped", time.time()


def rotate(log: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Copies a full log aside and cuts it; its writer holds it open to append and goes on at the start."""
    with suppress(FileNotFoundError):
        if log.stat().st_size > limit_bytes:
            aside = log.with_name(f"{log.name}.1")
            try:
                shutil.copyfile(log, aside)
                aside.chmod(0o600)
            except OSError:  # a full disk: what is old makes room
                aside.unlink(missing_ok=True)
            os.truncate(log, 0)


@contextmanager
def only_one(folder: Path, mend: str = "Stop that one first; `status` shows its processes.") -> Iterator[None]:
    """Holds the folder for this process.

    Raises:
        ProcessFailed: another one holds it.
    """
    private_folder(folder)
    lock = os.open(folder / "supervisor.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if not _lock(lock):
            raise ProcessFailed(
                f"{folder}: is in use already by process {os.pread(lock, 20, 0).decode() or 'unknown'}. {mend}"
            )
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def _lock(handle: int, tries: int = 5) -> bool:
    """Takes the lock; more than one try, because `read_status` holds it for an instant to see whether it is free."""
    for _ in range(tries):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.02)
    return False


def troubles(status: Mapping[str, Any]) -> list[str]:
    """A sentence for each process of a served folder (`read_status`) that has ended lately and was not told to."""
    if status.get("supervisor") is None:
        return []
    return [
        _trouble(name, Shown(**child))
        for name, child in status["children"].items()
        if child["restarts"] and (child["state"] == "waiting" or time.time() - child["since"] < LATELY_S)
    ]


def tell_deaths(say: Callable[[str], None]) -> Callable[[Mapping[str, Shown]], None]:
    """For `supervise`: says a sentence for each process that has ended and was not told to."""
    told: dict[str, int] = {}

    def on_change(shown: Mapping[str, Shown]) -> None:
        for name, one in shown.items():
            if one.restarts > told.get(name, 0):
                told[name] = one.restarts
                say(_trouble(name, one))

    return on_change


def _trouble(name: str, one: Shown) -> str:
    how = "" if one.last_exit is None else f" by signal {-one.last_exit}" if one.last_exit < 0 else ""
    times = "once" if one.restarts == 1 else f"{one.restarts} times"
    return f"{name} has ended{how} and is started again, so far {times}; see logs/{name}.log. {one.last_words}".strip()


def read_status(folder: Path) -> dict[str, Any]:
    """What status.json says, with `supervisor` None when nobody holds the folder: then the rest is history."""
    path = folder / "status.json"
    if not path.exists():
        return {"supervisor": None, "children": {}}
    status: dict[str, Any] = read_json(path)
    return status if _is_held(folder) else {**status, "supervisor": None}


def _is_held(folder: Path) -> bool:
    try:
        lock = os.open(folder / "supervisor.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _show(watched: Sequence[_Watched], folder: Path, on_change: Callable[[Mapping[str, Shown]], None] | None) -> None:
    shown = {one.child.name: one.shown for one in watched}
    children = {name: asdict(one) for name, one in shown.items()}
    with suppress(OSError):  # a full disk is no reason to end processes that live
        write_json(folder / "status.json", {"supervisor": os.getpid(), "children": children})
    if on_change is not None:
        on_change(shown)


def kept_port(path: Path) -> int:
    """A free port on loopback, the same as last time where that one is still free."""
    wanted = int(json.loads(path.read_bytes())) if path.exists() else 0
    port = _free(wanted) or _free(0)
    write_json(path, port)
    return port


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
        return int(probe.getsockname()[1])


def kept_secret(path: Path) -> bytes:
    """32 random bytes in a file of the owner alone, made when they are first asked for; or StateInvalid if exposed."""
    if not path.exists():
        write_atomic(path, secrets.token_bytes(32))
    return load_secret(path)


def kept_token(path: Path) -> str:
    """What lets a browser in, in a file of the owner alone, made when it is first asked for.

    Raises:
        StateInvalid: a file that holds none, or that others may read.
    """
    if not path.exists():
        write_atomic(path, secrets.token_urlsafe(32).encode())
    token = load_secret(path).decode("ascii", "replace").strip()
    if len(token) < 32:
        raise StateInvalid(f"{path}: holds no token of 32 letters or more. Delete it; a new one is made.")
    return token


def read_port(path: Path) -> int:
    """The port that a process of this folder listens on."""
    if not path.exists():
        raise ProcessFailed(f"{path}: is not there, so nothing was ever served from this folder. Start it first.")
    return int(json.loads(path.read_bytes()))
