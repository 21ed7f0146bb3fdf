"""Times as people read them: in UTC and saying so, as the parties to a federation sit in more zones than one."""

import time

DAY_S = 86400.0


def day(at_s: float) -> str:
    """`2026-11-26`, from seconds since the epoch."""
    return time.strftime("%Y-%m-%d", time.gmtime(at_s))


def date_text(at_s: float) -> str:
    """`2026-11-26 02:40 UTC`"""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at_s))


def span_text(seconds: float) -> str:
    """`29 days`, `23 hours`, `5 minutes`, rounded down."""
    for size_s, name in ((DAY_S, "day"), (3600.0, "hour"), (60.0, "minute"), (1.0, "second")):
        if seconds >= size_s:
            count = int(seconds // size_s)
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "less than a second"
