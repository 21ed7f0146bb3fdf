"""The GPUs of this machine as NVIDIA's own tool tells of them: whether each is busy, how full, how warm; no PyTorch."""

import csv
import subprocess
from dataclasses import dataclass

TIMEOUT_S = 10.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; what the tool does not know of it is None.

    Attributes:
        used_bytes, size_bytes: of its memory, by whatever process.
        busy: share of the last moments in which it has computed, 0 to 1.
    """

    name: str
    driver: str
    used_bytes: int | None
    size_bytes: int | None
    busy: float | None
    celsius: float | None


def gpus() -> list[Gpu]:
    """All that the tool sees; none where there is no such tool, or it does not answer."""
    fields = ("name", "driver_version", "memory.used", "memory.total", "utilization.gpu", "temperature.gpu")
    found = []
    for name, driver, *figures in asked(*fields):
        used, size, busy, celsius = (_number(text) for text in figures)
        found.append(Gpu(name, driver, _bytes(used), _bytes(size), None if busy is None else busy / 100, celsius))
    return found


def asked(*fields: str) -> list[list[str]]:
    """What the tool says of each GPU, by its names of things; memory in MiB, shares in percent."""
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = ([cell.strip() for cell in row] for row in csv.reader(told.splitlines()))
    return [row for row in rows if len(row) == len(fields)]


def _number(text: str) -> float | None:
    """Of `[N/A]` and its like there is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _bytes(mib: float | None) -> int | None:
    return None if mib is None else int(mib * MIB)
