"""Cases looked at in processes of their own, so that a file that hangs or kills its reader costs one case.

`ProcessPoolExecutor` ends as a whole when one worker dies, and cannot end a task that hangs.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedclient.data.cases import Case, files_of
from fedclient.data.findings import finding
from fedclient.gate.facts import Looked, Needs
from fedclient.gate.inspect import look_at
from shared_models.errors import ProcessFailed

PATIENCE_S = 120.0  # for one case, and a second more for each megabyte of it
SLOWEST_BYTES_S = 1 << 20
ASKED_S = 1.0  # between two questions whether the work may go on: one case may take longer than an order has left


@dataclass(frozen=True, slots=True)
class Setting:
    """What every look shares: the data folder, what the study needs, and the site's secret."""

    root: Path
    needs: Needs
    secret: str


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    case: Case | None = None
    until: float = 0.0


def looks(
    cases: Sequence[Case],
    setting: Setting,
    processes: int,
    go_on: Callable[[], None],
    patience_s: float = PATIENCE_S,
) -> Iterator[tuple[Case, Looked]]:
    """Each case and what was seen in it, in the order in which they are done.

    Args:
        processes: 0 looks in this process, where nothing ends a file that hangs.
        go_on: `Site.go_on`; called before each case, and while cases are waited for.

    Raises:
        ProcessFailed: a process could not be started.
        OrderRefused: of `go_on`.
    """
    if processes == 0:
        for case in cases:
            go_on()
            yield case, look_at(case, setting.root, setting.needs, setting.secret)
        return
    waiting = list(reversed(cases))
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.case for worker in workers):
            go_on()
            while waiting and len(workers) < processes:
                workers.append(_started(setting))
            for worker in workers:
                if worker.case is None and waiting:
                    _hand(worker, waiting.pop(), patience_s)
            busy = [worker for worker in workers if worker.case is not None]
            first = min(worker.until for worker in busy)
            ready = connection.wait([worker.pipe for worker in busy], min(ASKED_S, max(0.0, first - time.monotonic())))
            for worker in busy:
                done = _answer(worker, worker.pipe in ready)
                if done is None:
                    continue
                case, looked, alive = done
                worker.case = None
                if not alive:
                    workers.remove(worker)
                    _end(worker)
                yield case, looked
    finally:
        for worker in workers:
            _end(worker)


def _started(setting: Setting) -> _Worker:
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(there, setting), daemon=True)
    process.start()
    there.close()
    worker = _Worker(process, here)
    try:
        here.recv()  # it is there: whatever ends it from now on is a case's doing
    except EOFError:
        _end(worker)
        raise ProcessFailed(
            "the check cannot start a process of its own: too little memory, or a main module that cannot be imported. "
            "Free some memory, or close other programs."
        ) from None
    return worker


def _hand(worker: _Worker, case: Case, patience_s: float) -> None:
    worker.case, worker.until = case, time.monotonic() + patience_s + _size(case) / SLOWEST_BYTES_S
    with suppress(OSError):  # it is dead already, and its pipe will say so
        worker.pipe.send(case)


def _size(case: Case) -> int:
    total = 0
    for path in files_of(case):
        with suppress(OSError):
            total += sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]))
    return total


def _answer(worker: _Worker, ready: bool) -> tuple[Case, Looked, bool] | None:
    """The case of a worker, what was seen, and whether the worker goes on; None while it works."""
    case = worker.case
    assert case is not None
    if ready:
        try:
            return case, worker.pipe.recv(), True
        except (EOFError, OSError):
            what = "reading it ended the process that read it: a broken codec stream, or too little memory."
            return case, _lost(case, "IMAGE_UNREADABLE", what), False
    if time.monotonic() >= worker.until:
        what = "it was not read in the time that its size allows: a disk that stalls, or a file without an end."
        return case, _lost(case, "IO_TIMEOUT", what), False
    return None


def _lost(case: Case, code: str, what: str) -> Looked:
    return Looked("", None, (finding(code, what, case=case.key, row=case.row),))


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join(5)


def _serve(pipe: Connection, setting: Setting) -> None:
    """A worker: quiet, because codecs write to standard error what they like, file names too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(look_at(case, setting.root, setting.needs, setting.secret))
