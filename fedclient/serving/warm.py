"""The process that predicts, kept warm: what it is given may end it, and then another one takes its place.

One line of JSON in, one out. It is killed when a case takes too long, and replaced when it has grown or lost its GPU.
"""

import json
import logging
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_models.errors import ProcessFailed

START_S = 180.0  # a release of some gigabytes is read whole, and its digests compared
MOST_LINE = 4 << 20
GROWN_BYTES = 2 << 30  # above what it had after its first case

log = logging.getLogger("fedclient.serving")


class Warm:
    """A child process `command`, started when it is needed.

    Attributes:
        model: what the child said of the model as it started.
        restarts: how often another child took the place of one that died, hung, had grown or lost its GPU.
    """

    def __init__(self, command: Sequence[str], time_limit_s: float) -> None:
        self.command, self.time_limit_s = command, time_limit_s
        self.model: Mapping[str, Any] = {}
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._first_bytes: int | None = None

    def start(self) -> Mapping[str, Any]:
        """Starts the child and hears what model it has.

        Raises:
            ProcessFailed: with the child's own words, where it has any.
        """
        self._process = subprocess.Popen(
            list(self.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._rest, self._first_bytes = b"", None
        said = self._line(START_S, "did not start")
        if "error" in said:
            self.stop()
            raise ProcessFailed(said["error"])
        self.model = said["model"]
        return self.model

    def ask(self, folder: Path, view: bool, count: bool = True) -> Mapping[str, Any]:
        """What comes of the files in `folder`.

        Raises:
            ProcessFailed: the child died of them, or took too long; the next one begins with another child.
        """
        if self._process is None or self._process.poll() is not None:
            again = bool(self.model)
            self.start()
            self.restarts += again
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({"folder": str(folder), "view": view, "count": count}).encode() + b"\n"
            )
            self._process.stdin.flush()
        except OSError:
            self.stop()
            raise ProcessFailed("the predicting process has died. Send the case again.") from None
        said = self._line(self.time_limit_s, "took too long over this case and was stopped")
        now = int(said.get("rss_bytes", 0))
        self._first_bytes = self._first_bytes or now
        if now > self._first_bytes + GROWN_BYTES:
            log.info("the predicting process has grown to %d MiB and is replaced", now >> 20)
            self.stop()
        if said.get("ends"):  # it is not waited for: the next case might still be written to it
            self.stop()
        return said

    def stop(self) -> None:
        """Ends the child; waits for it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self, limit_s: float, words: str) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        until = time.monotonic() + limit_s
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = until - time.monotonic()
                if left <= 0 or not ready.select(left):
                    self.stop()
                    raise ProcessFailed(f"the predicting process {words} ({limit_s:.0f} s).")
                block = os.read(process.stdout.fileno(), 1 << 16)
                if not block or len(self._rest) > MOST_LINE:
                    self.stop()
                    raise ProcessFailed("the predicting process ended over this case.")
                self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said


def python(module: str, *arguments: str) -> list[str]:
    """The command of a module of this package, with this Python."""
    return [sys.executable, "-m", module, *arguments]
