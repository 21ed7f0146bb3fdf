"""A process that is killed at any line of the code under test: what it had told before is told, and nothing after.

`killed_at` kills one at one line. `left_by_kills` goes through all lines in one run: a killed process leaves its files
as they are at that line, so at each line another process looks at them and keeps a copy of what it has not seen yet.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

Tell = Callable[[str], None]
WRITES = ("shared_models/database.py", "shared_models/files.py")  # which all that is kept goes through
LINE, WORD, ERROR = b"l", b"w", b"e"


@dataclass(frozen=True)
class Left:
    """What a process leaves that is killed at the `line`th line and at later ones, until something changes."""

    line: int
    words: tuple[str, ...]
    folder: Path
    ended: bool = False  # it was not killed


def left_by_kills(folder: Path, act: Callable[[Tell], None], watched: tuple[str, ...], kept: Path) -> list[Left]:
    """Runs `act`, which works in `folder`, once; copies of all that a kill leaves at some line of the files `watched`.

    They come in order, in folders of `kept`; the last is of a process that came to its end.
    """
    asking, told = os.pipe()
    answered, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(asking)
        os.close(go_on)

        def reached() -> None:
            os.write(told, LINE)
            os.read(answered, 1)

        def tell(word: str) -> None:
            os.write(told, WORD + word.encode() + b"\n")

        try:
            _traced(act, watched, reached, tell)
        except BaseException as error:
            os.write(told, ERROR + f"{error!r}\n".encode())
            os._exit(2)
        os._exit(0)
    os.close(told)
    os.close(answered)
    found, words, number, last = list[Left](), tuple[str, ...](), 0, None

    def look(ended: bool) -> None:
        nonlocal last
        now = (words, ended, digest(folder))
        if now != last:
            last, copy = now, kept / str(len(found))
            shutil.copytree(folder, copy)
            found.append(Left(number, words, copy, ended))

    with os.fdopen(asking, "rb") as pipe:
        while kind := pipe.read(1):
            if kind == LINE:
                number += 1
                look(ended=False)
                os.write(go_on, b"\n")
            else:
                word = pipe.readline().decode().rstrip()
                assert kind == WORD, word
                words += (word,)
    os.close(go_on)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    number += 1
    look(ended=True)
    return found


def digest(folder: Path) -> bytes:
    """Of all files below a folder; of SQLite's index of its log nothing, whoever opens it next makes it anew."""
    whole = sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith("-shm"):
            content = path.read_bytes()
            whole.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return whole.digest()


def killed_at(line: int, act: Callable[[Tell], None], watched: tuple[str, ...]) -> tuple[list[str], bool]:
    """Runs `act` in a forked process killed as it comes to the `line`th line (from 1) of the files `watched`.

    Returns the words that it has told, and whether it came to its end instead.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        left = line

        def reached() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def tell(word: str) -> None:
            os.write(writing, f"{word}\n".encode())

        try:
            _traced(act, watched, reached, tell)
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


def _traced(act: Callable[[Tell], None], watched: tuple[str, ...], reached: Callable[[], None], tell: Tell) -> None:
    """Carries `act` out; `reached` is called before each line of the files `watched`."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "call":
            return trace if frame.f_code.co_filename.endswith(watched) else None
        if event == "line":
            reached()
        return trace

    sys.settrace(trace)
    act(tell)
    sys.settrace(None)


def fresh(folder: Path, number: int) -> Path:
    """A new folder for one more try."""
    made = folder / str(number)
    made.mkdir()
    return made
