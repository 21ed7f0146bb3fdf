"""This machine's clock beside the coordinator's: Flower signs the time of each call and refuses one that is off."""

import http.client
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from email.utils import parsedate_to_datetime

from shared_models.errors import FederationError, ProcessFailed
from shared_models.transfer import connect

MOST_AHEAD_S, MOST_BEHIND_S = 4.0, 300.0  # Flower 1.41 refuses 5 s ahead and 305 s behind, with a bare 401
TIMEOUT_S = 10.0


def check_clock(address: str, context: ssl.SSLContext, now: Callable[[], float] = time.time) -> None:
    """Compares this clock with the `date` of the coordinator's answer, which is in whole seconds.

    A coordinator that cannot be asked is no matter of clocks: nothing is raised then.

    Raises:
        ProcessFailed: the clocks are surely too far apart.
    """
    before = now()
    try:
        with closing(connect(address, context, TIMEOUT_S)) as connection:
            connection.request("GET", "/health")
            date = connection.getresponse().headers["date"]
        after, there = now(), parsedate_to_datetime(date).timestamp()
    except (OSError, http.client.HTTPException, FederationError, TypeError, ValueError):
        return
    ahead, behind = before - (there + 1), there - after
    if ahead > MOST_AHEAD_S or behind > MOST_BEHIND_S:
        by = f"{ahead:.0f} s ahead of" if ahead > 0 else f"{behind:.0f} s behind"
        raise ProcessFailed(
            f"this machine's clock: is {by} the coordinator's at {address}, and every call would be refused. "
            "Set both by NTP (`timedatectl set-ntp true`)."
        )
