"""How long an order may take, and who ends one that hangs: the supervisor, from outside, as SIGKILL.

Work that lives looks at the limit between its steps and refuses to go on. A call that never returns (a data loader, a
driver) looks at nothing, and may hold the interpreter, so that no thread beside it runs; the supervisor then reads in
the note of the task under way that its time is long over, and kills the process with all that it has started.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedclient.limits import Limits
from fedclient.site import Site, read_site_file
from shared_models.errors import FederationError, OrderRefused
from shared_models.files import read_json

TRAIN_TIMEOUT = "TRAIN_TIMEOUT"
GRACE_S = 20.0  # from the limit to the kill: the longest step of work that lives, and a little more


ANSWER_S = (
    60.0  # before the order's message dies: grace, kill, a new process, and its answer, which must still be taken
)
LONGEST_S = 60 * 86400.0  # twice the longest deadline that a study may give


def longest_s(limits: Limits, waited_for_s: float) -> float:
    """Seconds that an order may take, where its coordinator says that it waits `waited_for_s` for the answer."""
    return min(LONGEST_S, max(1.0, waited_for_s - ANSWER_S)) if limits.order_s is None else limits.order_s


def longest_at(folder: Path, waited_for_s: float) -> float:
    """The same, by the site.toml of a folder; one that cannot be used is told when the order is read."""
    try:
        return longest_s(read_site_file(folder).limits, waited_for_s)
    except FederationError:
        return longest_s(Limits(), waited_for_s)


def limited(site: Site, waited_for_s: float, clock: Callable[[], float] = time.monotonic) -> Site:
    """The site as it may work on an order that arrives now: its `go_on` raises OrderRefused once the time is over."""
    longest = longest_s(site.limits, waited_for_s)
    until, before = clock() + longest, site.go_on

    def go_on() -> None:
        if clock() > until:
            raise OrderRefused(
                TRAIN_TIMEOUT,
                f"the order has taken more than {longest:.0f} s. Set `order_s` under [limits] of site.toml, make the "
                "site faster, or ask the coordinator for fewer steps or a longer `rounds.deadline_s`.",
            )
        before()

    return replace(site, go_on=go_on)


def is_over(task: Mapping[str, Any]) -> bool:
    """Whether the order of a noted task has had all its time, and the grace after it."""
    return "until" in task and time.monotonic() > float(task["until"]) + GRACE_S


def hanging(task: Path, pid: int) -> str:
    """Why the executor `pid` is to be killed, by the note of the task under way; "" where it is not.

    A note that a full disk did not take leaves such a process to the coordinator's deadline alone.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        noted = read_json(task)
        if noted["pid"] == pid and is_over(noted):
            return f"It hung and was ended: its order is answered as {TRAIN_TIMEOUT}."
    return ""
