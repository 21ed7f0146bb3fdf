"""What a doctor finds: a line for each check, ok, warn or fail, each with its remedy; what both ends check alike."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, TypeAlias

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from shared_models.archive import PACKAGE, flower_module
from shared_models.cli import print_json
from shared_models.errors import FederationError
from shared_models.flower_names import NAMES
from shared_models.identity import load_secret
from shared_models.parse import read_toml

State: TypeAlias = Literal["ok", "warn", "fail"]
GIB = 2**30
MARKS: Mapping[State, tuple[str, str]] = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("fail", "red")}
SOURCE = Path(__file__).resolve().parents[1]
LEAST_FREE_BYTES = GIB
SCARCE_FREE_BYTES = 5 * GIB
SCARCE_MEMORY_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class Line:
    """One check.

    Attributes:
        check: what was looked at, in a word or two.
        words: what was found.
        mend: what to do about it; empty where all is well.
    """

    check: str
    state: State
    words: str
    mend: str = ""


def meaning(host: str, found: Sequence[str]) -> str:
    """What a host is, for the beginning of a sentence: its addresses, or that it is one."""
    return f"{host} is an address" if list(found) == [host] else f"{host} is {', '.join(found)}"


Check: TypeAlias = Callable[[], Iterable[Line]]


def examined(checks: Mapping[str, Check]) -> Iterator[Line]:
    """The lines of each check; one that cannot be carried out is a line that fails, and stops no other."""
    for name, check in checks.items():
        try:
            yield from check()
        except (FederationError, OSError, ValueError) as error:
            yield failed(name, error)


def failed(name: str, error: Exception) -> Line:
    """A line from an error whose message says what is wrong and, after its first sentence, how to mend it."""
    what, _, mend = str(error).partition(". ")
    return Line(name, "fail", f"{what.removesuffix('.')}.", mend or "See the message, and the log of the process.")


def worst(lines: Iterable[Line]) -> State:
    states = {line.state for line in lines}
    return "fail" if "fail" in states else "warn" if "warn" in states else "ok"


def tell(lines: Iterable[Line], console: Console, as_json: bool = False) -> State:
    """Prints each line as it is found, and the sum of all, or all as JSON at the end; returns the worst state."""
    if as_json:
        listed = list(lines)
        print_json({"state": worst(listed), "lines": [asdict(line) for line in listed]})
        return worst(listed)
    told: list[Line] = []
    for line in lines:
        told.append(line)
        mark, colour = MARKS[line.state]
        console.print(Text.assemble((mark, colour), f"  {line.check}: {line.words}"))
        if line.mend and line.state != "ok":
            console.print(Text(f"      {line.mend}"))
    count = {state: sum(line.state == state for line in told) for state in MARKS}
    console.print(Text(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} to mend."))
    return worst(told)


# Checks of both ends


def versions() -> Iterator[Line]:
    """Python and every installed dependency beside what this package asks for, and what is known to work together."""
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        yield Line("python", "fail", f"{sys.version.split()[0]} runs.", "Install Python 3.11 or 3.12.")
    wrong, missing = [], []
    for asked in _requirements():
        try:
            found = version(asked.name)
        except PackageNotFoundError:
            missing.append(asked.name)
            continue
        if not asked.specifier.contains(found, prereleases=True):
            wrong.append(f"{asked.name} {found} (asked for: {asked.specifier})")
    if missing or wrong:
        told = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"wrong: {', '.join(wrong)}"] * bool(wrong)
        yield Line("versions", "fail", f"{'; '.join(told)}.", f"Install the package again: pip install {PACKAGE}.")
        return
    others = list(_others(SOURCE / "constraints.txt"))
    if others:
        mend = "Nothing to do while all works; `pip install --constraint constraints.txt` gives the tried ones."
        yield Line("versions", "warn", f"others than were tried together: {', '.join(others)}.", mend)
    else:
        yield Line("versions", "ok", f"{PACKAGE} and its {len(_requirements())} dependencies are as asked for.")


def _requirements() -> list[Requirement]:
    """The dependencies of the installed package, or of the source tree that this file stands in; no extras."""
    try:
        listed = requires(PACKAGE) or []
    except PackageNotFoundError:
        listed = read_toml(SOURCE / "pyproject.toml")["project"]["dependencies"]
    parsed = [Requirement(words) for words in listed]
    return [asked for asked in parsed if asked.marker is None or asked.marker.evaluate({"extra": ""})]


def _others(constraints: Path) -> Iterator[str]:
    """Installed packages whose version is not the one of constraints.txt, where that file is."""
    if not constraints.exists():
        return
    for row in constraints.read_text().splitlines():
        name, is_pin, wanted = row.partition("==")
        if not is_pin or row.startswith("#"):
            continue
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:  # of an extra, or of the development tools
            continue
        if found != wanted.strip():
            yield f"{name} {found} (tried: {wanted.strip()})"


def flower_names() -> Iterator[Line]:
    """Private names of Flower that this package calls or replaces; nothing is started where one is missing."""
    missing = []
    for module, names in NAMES.items():
        try:
            loaded = flower_module(module)
        except FederationError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(loaded, name)]
    if missing:
        words = f"{len(missing)} names are not there: {', '.join(missing[:3])}."
        yield Line("flower", "fail", words, "Install the version that the package was made for: flwr==1.41.0.")
    else:
        yield Line("flower", "ok", f"flwr {version('flwr')} has all {sum(map(len, NAMES.values()))} names it needs.")


def secrets(paths: Iterable[Path]) -> Iterator[Line]:
    """Each key file is there, ours, and readable by nobody else."""
    sound = 0
    for path in paths:
        try:
            load_secret(path)
            sound += 1
        except FederationError as error:
            yield failed("keys", error)
    yield Line("keys", "ok", f"{sound} key files are ours alone.")


def disk(folder: Path, wanted_bytes: int, what: str) -> Line:
    """Room on the disk of `folder` beside what is wanted there; `what` says for what."""
    free = shutil.disk_usage(folder).free
    words = f"{gib(free)} GiB are free, {what} wants {gib(wanted_bytes)} GiB more."
    if free < LEAST_FREE_BYTES:
        return Line("disk", "fail", words, "Free some; below 1 GiB nothing is written safely.")
    if free < wanted_bytes:
        return Line("disk", "warn", words, "Free some, lower what is wanted, or move the folder to a larger disk.")
    if free < SCARCE_FREE_BYTES:
        return Line("disk", "warn", words, "Free some before it runs full.")
    return Line("disk", "ok", words)


def memory(limit_bytes: int | None = None) -> Line:
    """Main memory that is to be had now; Linux's own estimate, and the group's limit (a container's, systemd's)."""
    total, free = memory_bytes()
    words = f"{gib(free)} of {gib(total)} GiB of memory are to be had"
    if limit_bytes is not None:
        words += f", [limits] allows {gib(limit_bytes)} GiB a process"
        if limit_bytes > total:
            mend = "Lower memory_gib: it is more than the machine, or its container, has."
            return Line("memory", "warn", f"{words}.", mend)
    if free < SCARCE_MEMORY_BYTES:
        mend = "Training of images in three dimensions wants 4 GiB and more: end other programs."
        return Line("memory", "warn", f"{words}.", mend)
    return Line("memory", "ok", f"{words}.")


def memory_bytes(
    proc: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int, int]:
    """(all, available) bytes of this machine, or of the least of the control groups that this process is in, where that
    has less."""
    facts = dict(row.split(":", 1) for row in proc.read_text().splitlines() if ":" in row)
    total, free = (int(facts[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for group in _groups(groups, own):
        limit, used, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            most = int(limit.read_text())
            rows = dict(row.split() for row in stat.read_text().splitlines()) if stat.exists() else {}
            taken = int(used.read_text()) - int(rows.get("inactive_file", 0))  # files read: given up when one asks
            total, free = min(total, most), min(free, max(0, most - taken))
    return total, free


def _groups(groups: Path, own: Path) -> list[Path]:
    """The folder of this process's control group (version 2) and those above it; in a container its root alone, where
    `own` says nothing else or tells the path on the host."""
    told = [row[3:].strip("/") for row in own.read_text().splitlines() if row.startswith("0::")] if own.exists() else []
    inner = Path(told[0]) if told and ".." not in told[0].split("/") else Path()
    return [groups / inner, *(groups / above for above in inner.parents)]


def clock_moved_back(last_s: float, where: str, now_s: float | None = None) -> Line:
    """Whether this clock is behind the time of something that was written down already."""
    behind = last_s - (time.time() if now_s is None else now_s)
    if behind > 5.0:
        words = f"this machine's clock is {behind:.0f} s behind the last line of {where}."
        return Line("clock", "fail", words, "It was set back. Set it by NTP: `timedatectl set-ntp true`.")
    return Line("clock", "ok", f"goes on from the last line of {where}.")


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.3g}"
