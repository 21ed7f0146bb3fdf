"""The C heap of a process that predicts: what large arrays took goes back to the system as they are freed."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGE_BYTES, SPARE_BYTES = 1 << 19, 1 << 20


def give_back() -> bool:
    """Tells glibc to map arrays from 512 KiB on by themselves, for good; False where the C library is another.

    By itself glibc raises that bound to 32 MiB as arrays are freed. Planes then lie in one heap with the small things
    that are kept of each slice, and holes between those stay with the process: a series of 1,000 slices peaked 85 MiB
    above one of 100.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGE_BYTES) and mallopt(TRIM_THRESHOLD, SPARE_BYTES))
