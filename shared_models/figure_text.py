"""Figures as people read them: three decimals, a dash for what is not known."""

from math import isfinite

MINUS, DASH = "\u2212", "\u2013"


def value_text(value: float | None) -> str:
    """Three decimals, which a score over tens of cases can bear; a dash for no value."""
    return DASH if value is None or not isfinite(value) else f"{value:.3f}"
