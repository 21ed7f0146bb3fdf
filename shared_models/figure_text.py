"""Figures as people read them: scores, sizes, lengths of time; a dash for what is not known."""

from math import isfinite

MINUS, DASH = "\u2212", "\u2013"


def value_text(value: float | None) -> str:
    """Three decimals, which a score over tens of cases can bear; a dash for no value."""
    return DASH if value is None or not isfinite(value) else f"{value:.3f}"


def size_text(size_bytes: float) -> str:
    """Three digits of a size, in powers of a thousand."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 99.5 else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def duration_text(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
