"""Faults of machines: full disks, damaged databases, clocks that are off, other versions, certificates that end."""

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from fedclient.enrol import rejoin
from fedclient.overview import overview
from fedserver.checkpoint import RunFolder
from fedserver.enrol import invite
from fedserver.lifecycle import revoke
from fedserver.queue import resume
from shared_models.files import write_atomic
from shared_models.supervise import read_status
from simulations.bench.faults.fleet import COORDINATOR, Fleet, await_that, round_of, seat, study, told
from simulations.bench.faults.kills import check, counted_after, everybody, in_work, sound
from simulations.bench.faults.sent import LIAR, left_out

MIB = 1 << 20
BLOCK_BYTES = 1 << 12
DISK_MIB = 512  # the gateway takes no upload that would leave less than 256 MiB
OTHER_VERSION = "9.9.9"


class NotHere(Exception):
    """What cannot be tried on this machine; the message says why."""


def needs_disks() -> None:
    """Raises NotHere unless small disks can be mounted."""
    if os.geteuid() != 0:
        raise NotHere("mounting a small tmpfs needs root")


@contextmanager
def small_disk(folder: Path, size_mib: int = DISK_MIB) -> Iterator[None]:
    """A disk of its own behind a folder, until the block ends.

    Raises:
        NotHere: where it cannot be mounted.
    """
    needs_disks()
    folder.mkdir(parents=True, exist_ok=True)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode:
        raise NotHere("a tmpfs cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@contextmanager
def ballast(folder: Path, size_bytes: int) -> Iterator[None]:
    """So many bytes less are left on the disk of a folder, or none, until the block ends."""
    path = folder / "ballast"
    try:
        with suppress(OSError), path.open("wb", buffering=0) as file:
            for _ in range(size_bytes // BLOCK_BYTES):
                file.write(bytes(BLOCK_BYTES))
        yield
    finally:
        path.unlink(missing_ok=True)


def full(folder: Path) -> AbstractContextManager[None]:
    """No block is left on the disk of a folder, until the block ends."""
    return ballast(folder, 1 << 40)


def full_coordinator(here: Fleet) -> str:
    """The federation lies on a small disk, which is filled in the middle of a round."""
    if not os.path.ismount(here.federation.folder.parent):
        raise NotHere("mounting a small tmpfs needs root")
    here.honest(1.0)
    run = here.begin("f10", study("f10", 4, deadline_s=20.0))
    await_that("round 1 is finished", lambda: round_of(run) >= 1)
    in_work(here, run, "s1", 2)
    pids = {child: here.pid(COORDINATOR, child) for child in ("link", "gateway", "dispatch")}
    with full(here.federation.folder.parent):
        time.sleep(15)
        at, kept = round_of(run), run.weights(round_of(run)).read_bytes()
        time.sleep(5)
        check(round_of(run) == at, "rounds were finished on a full disk")
        lived = sum(here.pid(COORDINATOR, child) == pid for child, pid in pids.items())
        check(here.running[COORDINATOR].poll() is None, "the supervisor has ended")
    check(run.weights(at).read_bytes() == kept, "the last checkpoint has changed")
    state = here.run("f10").state
    if state != "running":
        resume(here.federation, "f10")
    here.finish("f10", 180)
    sound(run)
    words = "went on by itself" if state == "running" else f"was {state} and went on when it was resumed"
    return (
        f"no round on a full disk, last checkpoint intact, {lived} of 3 processes lived on; with room again it {words}"
        f". {_nearly_full(here)}"
    )


def _nearly_full(here: Fleet) -> str:
    """A run that begins while less is left than a round wants."""
    disk = here.federation.folder.parent
    with ballast(disk, shutil.disk_usage(disk).free - 200 * MIB):
        run = here.begin("f10-room", study("f10-room", 1))
        await_that("the run pauses", lambda: here.run("f10-room").state == "paused")
        check("MiB are free on the coordinator's disk" in here.run("f10-room").message, here.run("f10-room").message)
    resume(here.federation, "f10-room")
    here.finish("f10-room")
    sound(run)
    return "With too little left for a round: paused before anybody was asked, saying how much is wanted"


def full_site(here: Fleet) -> str:
    """The folder of a fourth site lies on a small disk, which is filled in the middle of a run."""
    with small_disk(here.folder("s4"), 48):
        here.honest(0.5)
        here.join("s4")
        here.start("s4")
        try:
            here.ready("s4")
            run = here.begin("f11", study("f11", 400, deadline_s=30.0))
            await_that("s4 was counted", lambda: round_of(run) and "s4" in told(run, round_of(run))["sites"])
            with full(here.folder("s4")):
                at = round_of(run) + 1
                reason = await_that("s4 is left out", lambda: _reason_after(run, at, "s4"))
                await_that("rounds go on", lambda: round_of(run) >= at + 2)
            at = round_of(run) + 1
            await_that("s4 is counted again", lambda: _counted(run, at, "s4"), 90)
            here.cease("f11")
            sound(run)
            check(here.restarts("s4", "node") == 0, f"its node was restarted {here.restarts('s4', 'node')} times")
        finally:
            here.kill("s4")
            revoke(here.federation, "s4", "its disk is gone")
    return f"left out as {reason!r}, the others' rounds went on; with room again it was counted, no process restarted"


def _reason_after(run: RunFolder, number: int, site: str) -> str:
    later = range(number, round_of(run) + 1)
    return next((left_out(run, n, site) for n in later if site in told(run, n)["left_out"]), "")


def _counted(run: RunFolder, number: int, site: str) -> bool:
    return any(site in told(run, n)["sites"] for n in range(number, round_of(run) + 1))


def damaged_database(here: Fleet) -> str:
    """Flower's database and ours, overwritten and cut while the coordinator is down."""
    here.honest()
    here.stop(COORDINATOR)
    seen = []
    for path, child in ((here.federation.superlink / "state.db", "link"), (here.federation.state, "dispatch")):
        saved = path.with_name(f"saved-{path.name}")
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copyfile(path, saved)
        for spoil in (_overwritten, _cut, _no_database):
            shutil.copyfile(saved, path)
            spoil(path)
            words = _refusal(here, child)
            check(str(path) in words and ("backup" in words or "Restore" in words), f"{path.name}: {words!r}")
        shutil.copyfile(saved, path)
        saved.unlink()
        seen.append(path.name if child == "dispatch" else "Flower's")
    here.serve()
    run = here.begin("f12", study("f12", 1))
    here.finish("f12")
    everybody(here, run, 1)
    which = " and ".join(seen)
    return f"{which}; overwritten, cut, no database: refused with the file and the way back. A copy put back: went on"


def _refusal(here: Fleet, child: str) -> str:
    """What the supervisor says of a process that cannot start."""
    here.serve(awaited=False)
    try:
        return str(await_that(f"{child} says why", lambda: _last_words(here, child)))
    finally:
        here.stop(COORDINATOR)


def _last_words(here: Fleet, child: str) -> str:
    """Of a process that this supervisor has seen end, not an earlier one."""
    status = read_status(here.federation.folder)
    shown = status["children"].get(child, {}) if status["supervisor"] == here.running[COORDINATOR].pid else {}
    return str(shown.get("last_words", "")) if shown.get("restarts") else ""


def _overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(3 * 4096))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def _no_database(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


CLOCK = """
import datetime, os, time
from pathlib import Path

set_to, right = Path(os.environ["FAULTS_CLOCK"]), time.time


def off():
    return float(set_to.read_text())


class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=off())


time.time = lambda: right() + off()
datetime.datetime = Moved
"""


def set_clock(folder: Path, off_s: float) -> dict[str, str]:
    """Moves the clock of the Python processes that run in the environment that is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(CLOCK)
    write_atomic(folder / "off", str(off_s).encode())
    return {"PYTHONPATH": str(folder), "FAULTS_CLOCK": str(folder / "off")}


def clock_off(here: Fleet) -> str:
    """The clock of a site jumps ten minutes ahead in the middle of a run, then behind, then it is right again."""
    clock, restarted, away = here.out / "clock", 0, 0
    here.honest(1.0)
    here.stop(LIAR)
    here.start(LIAR, env=set_clock(clock, 0.0))
    here.ready(LIAR)
    run = here.begin("f18", study("f18", 500, deadline_s=40.0, gather_s=0.0))
    await_that("s3 is counted", lambda: _counted(run, 1, LIAR))
    for off_s, words in ((600.0, "s ahead of the coordinator's"), (-600.0, "s behind the coordinator's")):
        mark, at = len(here.log(LIAR, "node")), round_of(run)
        set_clock(clock, off_s)
        await_that(f"its log says {words!r}", partial(_said, here, mark, words), 90)
        warned = " ".join(overview(here.folder(LIAR))["warnings"])
        check("timedatectl" in warned, f"`fedclient status` does not say it: {warned}")
        before = here.restarts(LIAR, "node")
        await_that("rounds go on without it", partial(_rounds_since, run, at + 2), 90)
        restarted = max(restarted, here.restarts(LIAR, "node") - before)
        away += round_of(run) - at
    check(restarted == 0, f"its node was started {restarted} times more while the clock was off")
    set_clock(clock, 0.0)
    at, before = round_of(run), here.restarts(LIAR, "node")
    await_that("s3 is counted again", lambda: counted_after(run, LIAR, at), 180)
    check(here.restarts(LIAR, "node") == before, "its node was started once more when the clock was right")
    here.cease("f18")
    sound(run)
    here.stop(LIAR)
    here.start(LIAR)
    here.ready(LIAR)
    return (
        f"told by log and status with its size and remedy; {away} rounds went on; no crash loop; right again, counted"
    )


def _said(here: Fleet, mark: int, words: str) -> bool:
    """Whether its node has said so since its log had `mark` characters."""
    return words in here.log(LIAR, "node")[mark:]


def _rounds_since(run: RunFolder, number: int) -> bool:
    return round_of(run) >= number


def revoked_in_the_round(here: Fleet) -> str:
    """A site is shut out while it works, and comes back with a new invite."""
    here.honest(6.0)
    run = here.begin("f19", study("f19", 2, deadline_s=60.0))
    in_work(here, run, LIAR, 1)
    revoke(here.federation, LIAR, "a fault that is tried")
    began = time.monotonic()
    await_that("the round does without it", lambda: seat(run, LIAR) == "revoked", 30)
    took = time.monotonic() - began
    here.finish("f19")
    sound(run)
    check(all(LIAR not in told(run, n)["sites"] for n in (1, 2)), "its update was counted")
    here.honest()
    await_that("it hears why", lambda: "was revoked on" in here.log(LIAR, "node"))
    rejoin(invite(here.federation, LIAR), here.folder(LIAR), LIAR, here.federation.address)
    back = here.begin("f19-back", study("f19-back", 1, quorum=3, deadline_s=120.0))
    here.finish("f19-back", 180)
    everybody(here, back, 1)
    return f"out of the round {took:.0f} s after `revoke`, nothing of it counted; back with a new invite, no restart"


def other_release(folder: Path) -> dict[str, str]:
    """Environment of a process that takes itself for another release: its metadata come first on the path."""
    facts = folder / f"fedimaging-{OTHER_VERSION}.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fedimaging\nVersion: {OTHER_VERSION}\n")
    return {"PYTHONPATH": str(folder)}


def other_app(here: Fleet) -> str:
    """A site of another release."""
    here.honest()
    here.stop(LIAR)
    here.start(LIAR, env=other_release(here.out / "other"))
    here.ready(LIAR)
    try:
        run = here.begin("f21", study("f21", 1, gather_s=60.0))
        here.finish("f21")
    finally:
        here.stop(LIAR)
        here.start(LIAR)
    found = left_out(run, 1, LIAR)
    check(found == "failed APP_NOT_APPROVED", f"{LIAR}: {found}")
    sound(run)
    here.ready(LIAR)
    return f"{found} before anything was trained; the others' round was made"


def upgraded_coordinator(here: Fleet) -> str:
    """The coordinator is upgraded in the middle of a run, then put back; and a site speaks another protocol."""
    here.honest(1.0)
    run = here.begin("f20", study("f20", 4, deadline_s=20.0, pause_s=10.0))
    await_that("round 1 is finished", lambda: round_of(run) >= 1)
    here.stop(COORDINATOR)
    at = round_of(run)
    here.serve(env=other_release(here.out / "other"))
    await_that("the run pauses", lambda: here.run("f20").state == "paused", 90)
    words = here.run("f20").message
    check("APP_NOT_APPROVED" in words, f"the run says: {words}")
    check(round_of(run) == at, "a round was made across two releases")
    here.stop(COORDINATOR)
    here.serve()
    resume(here.federation, "f20")
    here.finish("f20")
    sound(run)
    here.script(LIAR, do="other-version", rounds=[1])
    spoke = here.begin("f20-protocol", study("f20-protocol", 1))
    here.finish("f20-protocol")
    found = left_out(spoke, 1, LIAR)
    check(found.startswith("rejected MESSAGE_INVALID") and "Install one version on both" in found, found)
    here.honest()
    return f"every site refused it as APP_NOT_APPROVED, paused after round {at}, nothing counted; put back, it went on"


SCENARIOS: dict[str, Callable[[Fleet], str]] = {
    "F10": full_coordinator,
    "F11": full_site,
    "F12": damaged_database,
    "F18": clock_off,
    "F19": revoked_in_the_round,
    "F20": upgraded_coordinator,
    "F21": other_app,
}
