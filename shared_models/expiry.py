"""When a certificate is renewed, and what is said before it ends."""

from datetime import UTC, datetime

from shared_models.identity import CLOCK_SKEW, Certificate

RENEWED_SHARE = 1 / 3  # renewed when less than this of its life is left: 30 of 90 days
DAY_S = 86400.0
WARNED_S = (30 * DAY_S, 7 * DAY_S, 1 * DAY_S)


def life_s(certificate: Certificate) -> float:
    """From the moment when it was signed, which is a little after the one that it begins with, to its end."""
    return certificate.expires_at_s - certificate.since_s - CLOCK_SKEW.total_seconds()


def due(certificate: Certificate, now_s: float) -> bool:
    """Whether it is time to renew it."""
    return certificate.expires_at_s - now_s < RENEWED_SHARE * life_s(certificate)


def stage(certificate: Certificate, now_s: float) -> int:
    """0 while all is well, 1, 2, 3 below 30, 7 and 1 days, 4 when it has expired.

    One that lives shorter than three months is first warned of when it should have been renewed.
    """
    left_s = certificate.expires_at_s - now_s
    if left_s <= 0:
        return 4
    return sum(left_s < min(warned_s, RENEWED_SHARE * life_s(certificate)) for warned_s in WARNED_S)


def warning(whose: str, certificate: Certificate, now_s: float, mend: str) -> str | None:
    """A sentence on a certificate that ends soon or has ended, with `mend` as its remedy; None while all is well."""
    found = stage(certificate, now_s)
    if found == 0:
        return None
    if found == 4:
        return f"{whose} certificate has expired on {date_text(certificate.expires_at_s)}. {mend}"
    return f"{whose} certificate ends in {span_text(certificate.expires_at_s - now_s)}. {mend}"


def date_text(at_s: float) -> str:
    """`2026-11-26 02:40 UTC`"""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def span_text(seconds: float) -> str:
    """`29 days`, `23 hours`, `5 minutes`, rounded down."""
    for size_s, name in ((DAY_S, "day"), (3600.0, "hour"), (60.0, "minute"), (1.0, "second")):
        if seconds >= size_s:
            count = int(seconds // size_s)
            return f"{count} {name}{'s' if count > 1 else ''}"
    return "less than a second"
