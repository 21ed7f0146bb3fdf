"""A process that is killed at any line of the code under test: what it had told before is told, and nothing after."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

Tell = Callable[[str], None]


def killed_at(line: int, act: Callable[[Tell], None], watched: tuple[str, ...]) -> tuple[list[str], bool]:
    """Runs `act` in a forked process killed as it comes to the `line`th line (from 1) of the files `watched`.

    Returns the words that it has told, and whether it came to its end instead.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _traced(line, act, watched, writing)
        except BaseException as error:
            os.write(writing, f"raised {error!r}\n".encode())
            os._exit(2)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        words = pipe.read().decode().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), words
    return words, status == 0


def _traced(line: int, act: Callable[[Tell], None], watched: tuple[str, ...], pipe: int) -> None:
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "call":
            return trace if frame.f_code.co_filename.endswith(watched) else None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def tell(word: str) -> None:
        os.write(pipe, f"{word}\n".encode())

    sys.settrace(trace)
    act(tell)
    sys.settrace(None)


def fresh(folder: Path, number: int) -> Path:
    """A new folder for one more try."""
    made = folder / str(number)
    made.mkdir()
    return made
