"""Cases into the cache: here, or in several processes where there are many."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from fedclient.data.cache import open_case, write_case
from fedclient.data.cases import Case, state_of
from fedclient.data.quota import Room, make_room
from shared_models.errors import ImageUnreadable, OrderRefused, ProcessFailed, StateInvalid
from shared_models.study import Study

Maker = Callable[[Case, Path], None]  # writes the cache file of a case
FEWEST = 4  # cases for a process, whose start takes a second


class Failure(NamedTuple):
    """Why a case could not be made, in a form that crosses processes."""

    kind: Literal["image", "full", "disk"]
    code: str
    words: str


@contextmanager
def making(cases: Sequence[Case], study: Study, room: Room, processes: int) -> Iterator[Maker]:
    """What makes the cases that are not in the cache; they are begun at once where processes share the work.

    Raises:
        ProcessFailed: one of the processes died.
    """
    missing = _missing(cases, room) if processes > 1 else []
    processes = min(processes, len(missing) // FEWEST)
    if processes < 2:
        yield lambda case, path: _settled(attempt(path, case, study, room), room)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process would share PyTorch's threads
    pool = ProcessPoolExecutor(processes, spawn, initializer=_follow, initargs=(os.getpid(),))
    try:
        begun = {path: pool.submit(attempt, path, case, study, room) for case, path in missing}
        yield partial(_awaited, begun, study, room)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def attempt(path: Path, case: Case, study: Study, room: Room) -> Failure | None:
    """Writes the cache file of one case."""
    try:
        write_case(path, case, study, partial(make_room, room))
    except ImageUnreadable as e:
        return Failure("image", e.code, str(e))
    except OrderRefused as e:
        return Failure("full", e.code, str(e))
    except OSError as e:
        return Failure("disk", "", str(e.strerror))
    return None


def _awaited(begun: dict[Path, Future[Failure | None]], study: Study, room: Room, case: Case, path: Path) -> None:
    try:
        begun_before = begun.pop(path, None)  # once: asked again, it is gone again
        failure = begun_before.result() if begun_before else attempt(path, case, study, room)
    except BrokenProcessPool:
        raise ProcessFailed(
            "a process that prepares images ended early, most often for want of memory. What is done is kept: try "
            "again, with a smaller `[compute] processes` in site.toml."
        ) from None
    _settled(failure, room)


def _settled(failure: Failure | None, room: Room) -> None:
    if failure is None:
        return
    if failure.kind == "image":
        raise ImageUnreadable(failure.words, failure.code)
    if failure.kind == "full":
        raise OrderRefused(failure.code, failure.words)
    raise StateInvalid(f"{room.cache}: cannot be written ({failure.words}). Free some space, or move the cache.")


def _missing(cases: Sequence[Case], room: Room) -> list[tuple[Case, Path]]:
    found = []
    for case in cases:
        try:
            path = room.cache / room.plan / f"{case.key}-{state_of(case)}.safetensors"
        except ImageUnreadable:  # told in its turn
            continue
        if open_case(path, case.key) is None:
            found.append((case, path))
    return found


def _follow(parent: int) -> None:
    """Ctrl-C is the caller's; without him this process ends, even if he was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
