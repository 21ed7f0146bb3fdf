"""What the three commands have in common: one clear message and a non-zero exit on an error, JSON for machines."""

import errno
import functools
import json
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from shared_models.errors import FederationError
from shared_models.parse import printable

P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turns an error that a person can mend into its message on stderr and exit code 1 (130 after Ctrl-C)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except FederationError as e:
            _complain(str(e))
            raise typer.Exit(1) from None
        except OSError as e:
            if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise  # not about a file that somebody named, so the trace is wanted
            where = e.filename or "a disk that is written to"
            _complain(f"{where}: {e.strerror}. Check the path, its rights and the space on its disk.")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("stopped by hand", highlight=False)
            raise typer.Exit(130) from None

    return run


def _complain(message: str) -> None:
    shown = "\n".join(map(printable, message.split("\n")))  # some of it may be from a peer
    text = Text.assemble(("error:", "bold red"), " ", shown)  # not mark-up: brackets in it are only brackets
    Console(stderr=True, soft_wrap=True).print(text, highlight=False)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
