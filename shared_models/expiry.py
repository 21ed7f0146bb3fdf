"""When a certificate is renewed, and what is said before it ends."""

from shared_models.dates import DAY_S, date_text, span_text
from shared_models.identity import CLOCK_SKEW, Certificate

RENEWED_SHARE = 1 / 3  # renewed when less than this of its life is left: 30 of 90 days
WARNED_S = (30 * DAY_S, 7 * DAY_S, 1 * DAY_S)


def life_s(certificate: Certificate) -> float:
    """From the moment when it was signed, which is a little after the one that it begins with, to its end."""
    return certificate.expires_at_s - certificate.since_s - CLOCK_SKEW.total_seconds()


def due(certificate: Certificate, now_s: float) -> bool:
    """Whether it is time to renew it."""
    return certificate.expires_at_s - now_s < RENEWED_SHARE * life_s(certificate)


def early(certificate: Certificate, now_s: float) -> bool:
    """Whether it counts only later: a clock was ahead when it was signed, or is behind now."""
    return certificate.since_s > now_s


def stage(certificate: Certificate, now_s: float) -> int:
    """0 while all is well, 1, 2, 3 below 30, 7 and 1 days, 4 when it has expired.

    One that lives shorter than three months is first warned of when it should have been renewed.
    """
    left_s = certificate.expires_at_s - now_s
    if left_s <= 0:
        return 4
    return sum(left_s < min(warned_s, RENEWED_SHARE * life_s(certificate)) for warned_s in WARNED_S)


def warning(whose: str, certificate: Certificate, now_s: float, mend: str) -> str | None:
    """A sentence on a certificate that ends soon, has ended or counts only later, with `mend` as its remedy; None while
    all is well.
    """
    if early(certificate, now_s):
        when = date_text(certificate.since_s)
        return (
            f"{whose} certificate begins only on {when}: a clock was ahead when it was signed, or this one is behind. "
            f"If this clock is right: {mend}"
        )
    found = stage(certificate, now_s)
    if found == 0:
        return None
    if found == 4:
        return f"{whose} certificate has expired on {date_text(certificate.expires_at_s)}. {mend}"
    return f"{whose} certificate ends in {span_text(certificate.expires_at_s - now_s)}. {mend}"
