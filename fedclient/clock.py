"""This machine's clock beside the coordinator's: Flower signs the time of each call and refuses one that is off."""

import http.client
import logging
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedclient.welcome import note_refusal, standing
from shared_models.errors import FederationError
from shared_models.transfer import connect

MOST_AHEAD_S, MOST_BEHIND_S = 4.0, 300.0  # Flower 1.41 refuses 5 s ahead and 305 s behind, with a bare 401
TIMEOUT_S = 10.0
POLL_S, SAY_S = 5.0, 60.0  # between two looks, and between two lines in the log, while the clock is off

log = logging.getLogger(__name__)


def await_clock(
    site: Path,
    address: str,
    context: ssl.SSLContext,
    found_off: Callable[[], object],
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
) -> None:
    """Returns when this clock is near the coordinator's, or the coordinator cannot be asked, which is no matter of
    clocks; until then it says so, once a minute in the log and in `fedclient status`.

    Args:
        found_off: called once, if it has to wait.
    """
    waited_s, noted = 0.0, False
    while (words := clock_words(address, context, now)) is not None:
        if waited_s % SAY_S == 0:
            note_refusal(site, words)
            if not noted:
                found_off()
            log.error("%s", words)
            noted = True
        sleep(POLL_S)
        waited_s += POLL_S
    if noted:
        standing(site).unlink(missing_ok=True)


def clock_words(address: str, context: ssl.SSLContext, now: Callable[[], float] = time.time) -> str | None:
    """What to say of this clock where it is surely too far from the coordinator's; None where it is not."""
    gap = clock_gap(address, context, now)
    if gap is None or not too_far(gap):
        return None
    return (
        f"this machine's clock: is {gap_words(gap)} the coordinator's at {address}, and every call would be "
        "refused. Set both by NTP (`timedatectl set-ntp true`)."
    )


def clock_gap(
    address: str, context: ssl.SSLContext, now: Callable[[], float] = time.time
) -> tuple[float, float] | None:
    """Seconds by which this clock is surely (ahead, behind) of the coordinator's, whose `date` is in whole seconds.

    None where the coordinator cannot be asked.
    """
    before = now()
    try:
        with closing(connect(address, context, TIMEOUT_S)) as connection:
            connection.request("GET", "/health")
            date = connection.getresponse().headers["date"]
        after, there = now(), parsedate_to_datetime(date).timestamp()
    except (OSError, http.client.HTTPException, FederationError, TypeError, ValueError):
        return None
    return before - (there + 1), there - after


def too_far(gap: tuple[float, float]) -> bool:
    """Whether Flower would refuse every call."""
    return gap[0] > MOST_AHEAD_S or gap[1] > MOST_BEHIND_S


def gap_words(gap: tuple[float, float]) -> str:
    """`12 s ahead of`"""
    ahead, behind = gap
    return f"{ahead:.0f} s ahead of" if ahead > behind else f"{behind:.0f} s behind"
