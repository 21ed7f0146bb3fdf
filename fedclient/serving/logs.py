"""What the service logs: its own lines and nobody else's, because libraries quote headers in theirs."""

import logging
import os
import sys
import threading
import traceback
import warnings

OWN = "fedclient"

log = logging.getLogger("fedclient.serving")


def own_lines_only(silent: bool = False) -> None:
    """Sends lines of this package to standard error and drops all others, warnings too.

    Args:
        silent: so is all that native code writes to standard error from now on.
    """
    stream = sys.stderr
    if silent:
        stream = os.fdopen(os.dup(2), "w", buffering=1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    own = logging.getLogger(OWN)
    own.handlers[:] = [handler]
    own.setLevel(logging.INFO)
    own.propagate = False
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    warnings.simplefilter("ignore")
    threading.excepthook = _of_a_thread


def where(error: BaseException | None) -> str:
    """Kind and place of an error, and nothing of its words."""
    found = traceback.extract_tb(error.__traceback__) if error is not None else []
    place = f" at {os.path.basename(found[-1].filename)}:{found[-1].lineno}" if found else ""  # noqa: PTH119
    return f"{type(error).__name__}{place}"


def _of_a_thread(arguments: threading.ExceptHookArgs) -> None:
    log.error("a thread ended: %s", where(arguments.exc_value))
