"""Whether the coordinator lets this site in, asked before anything is started; and what a site does that is not let in.

A site whose certificate was revoked or has expired says so once a minute, in its log and in `fedclient status`, and is
let in at once when it has joined again.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from fedclient.ask import TurnedAway, ask
from shared_models.errors import EnrolmentFailed, ProcessFailed
from shared_models.files import read_json, write_json
from shared_models.transfer import site_context

HOLD_S = 60.0  # at least, between two questions of a site that is not let in
POLL_S = 1.0

log = logging.getLogger(__name__)


def await_welcome(site: Path, address: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """Returns when the coordinator lets the site in or cannot be asked; holds it back otherwise.

    Raises:
        ProcessFailed: after `HOLD_S`, or at once when the site got other keys: start again then.
    """
    why = shut_out(site, address)
    if why is not None:
        hold(site, why, sleep)
    standing(site).unlink(missing_ok=True)


def shut_out(site: Path, address: str) -> str | None:
    """Why the coordinator does not let the site in, in its own words; None when it does, or cannot be asked."""
    try:
        context = site_context(site / "keys")
    except EnrolmentFailed as expired:
        return str(expired)
    try:
        ask(address, context, "GET", "/health")
    except TurnedAway as refused:
        return refused.words if refused.status == 403 else None
    except EnrolmentFailed:
        return None  # it is away, which Flower's own loop waits for
    return None


def hold(site: Path, why: str, sleep: Callable[[float], None] = time.sleep) -> NoReturn:
    """Notes why the site is not let in, waits, and raises ProcessFailed with it."""
    log.error("%s", why)
    note_refusal(site, why)
    before, until = _keys_changed_at(site), time.monotonic() + HOLD_S
    while time.monotonic() < until and _keys_changed_at(site) == before:
        sleep(POLL_S)
    raise ProcessFailed(why)


def note_refusal(site: Path, why: str) -> None:
    """Keeps the coordinator's words for `fedclient status`."""
    with suppress(OSError):
        write_json(standing(site), {"refused": why, "at": time.time()})


def standing(site: Path) -> Path:
    """What the coordinator last said to a site that it did not let in."""
    return site / "node/refused.json"


def refused_words(site: Path) -> str | None:
    """Why the coordinator does not let this site in; None when it does, as far as is known."""
    with suppress(FileNotFoundError):
        return str(read_json(standing(site))["refused"])
    return None


def _keys_changed_at(site: Path) -> int:
    try:
        return (site / "keys/tls.pem").stat().st_mtime_ns
    except FileNotFoundError:
        return 0
