"""Faults of processes and of the network: what is killed, cut off or slow, and what becomes of the round."""

import time
from collections.abc import Callable

from fedserver.checkpoint import RunFolder, read_progress
from simulations.bench.faults.fleet import (
    COORDINATOR,
    FellShort,
    Fleet,
    await_that,
    round_of,
    seat,
    study,
    told,
)
from simulations.bench.faults.ledger import miscounted

WORK_S = 2.5  # of a site on an order, so that there is time to be killed


def check(holds: bool, seen: str) -> None:
    """Raises FellShort with what was seen instead."""
    if not holds:
        raise FellShort(seen)


def sound(run: RunFolder) -> None:
    """Raises FellShort unless every update of the run was counted exactly once."""
    check(not (wrong := miscounted(run)), "; ".join(wrong[:5]))


def in_work(here: Fleet, run: RunFolder, site: str, number: int, timeout_s: float = 120.0) -> None:
    """Waits until a site works on a round."""
    await_that(
        f"{site} works on round {number}",
        lambda: read_progress(run).get("round") == number and here.works(site),
        timeout_s,
    )


def everybody(here: Fleet, run: RunFolder, number: int) -> None:
    """Raises FellShort unless all sites were counted in a round."""
    sites = set(told(run, number)["sites"])
    check(sites == set(here.sites), f"round {number} counted {sorted(sites)} of {list(here.sites)}")


def killed_executor(here: Fleet) -> str:
    here.honest(WORK_S)
    run = here.begin("f1", study("f1", 2))
    in_work(here, run, "s1", 1)
    node = here.pid("s1", "node")
    here.killed("s1", "executor")
    began = time.monotonic()
    await_that("round 1 is finished", lambda: round_of(run) >= 1, 70)
    took = time.monotonic() - began
    here.finish("f1")
    everybody(here, run, 1)
    everybody(here, run, 2)
    sound(run)
    check(here.pid("s1", "node") == node, "its node was restarted")
    return f"asked again, counted once in the same round, {took:.0f} s after the kill; its node lived on"


def killed_node(here: Fleet) -> str:
    here.honest(WORK_S)
    run = here.begin("f2", study("f2", 2))
    in_work(here, run, "s2", 1)
    here.killed("s2", "node")
    began = time.monotonic()
    await_that("round 1 is finished", lambda: round_of(run) >= 1, 90)
    took = time.monotonic() - began
    check("carrying on the session" in here.log("s2", "node"), "Flower's lock-out of 60 s was waited for")
    here.finish("f2")
    everybody(here, run, 1)
    sound(run)
    return f"back in its old session without the lock-out; the round ended {took:.0f} s after the kill, counted once"


def killed_while_cut_off(here: Fleet) -> str:
    here.honest(1.0)
    run = here.begin("f2b", study("f2b", 30, deadline_s=20.0, gather_s=0.0))
    in_work(here, run, "s3", 1)
    with here.lines["s3"].cut():
        here.kill("s3")
        here.start("s3")
        time.sleep(8)
        check("s3" in here.running and here.running["s3"].poll() is None, "its supervisor has given up")
    began, at = time.monotonic(), round_of(run)
    counted = await_that("s3 is counted again", lambda: counted_after(run, "s3", at), 180)
    took = time.monotonic() - began
    here.cease("f2b")
    sound(run)
    return f"counted again in round {counted}, {took:.0f} s after the line was whole; the others' rounds went on"


def counted_after(run: RunFolder, site: str, number: int) -> int | None:
    """The first finished round after `number` in which a site was counted."""
    later = range(number + 1, round_of(run) + 1)
    return next((n for n in later if site in told(run, n)["sites"]), None)


def killed_coordinator(here: Fleet) -> str:
    here.honest(WORK_S)
    run = here.begin("f3", study("f3", 3))
    await_that("round 1 is finished", lambda: round_of(run) >= 1)
    in_work(here, run, "s1", 2)
    here.kill(COORDINATOR)
    here.serve()
    began = time.monotonic()
    await_that("round 2 is finished", lambda: round_of(run) >= 2, 90)
    took = time.monotonic() - began
    here.finish("f3")
    sound(run)
    return f"all its processes killed in round 2: went on from round 1 by itself, round 2 ended {took:.0f} s later"


def killed_superlink(here: Fleet) -> str:
    here.honest(WORK_S)
    run = here.begin("f4", study("f4", 2))
    in_work(here, run, "s1", 1)
    child = here.run_pid()
    here.killed(COORDINATOR, "link")
    began = time.monotonic()
    await_that("round 1 is finished", lambda: round_of(run) >= 1, 90)
    took = time.monotonic() - began
    check(here.run_pid() == child, "the run's process was lost with it")
    here.finish("f4")
    everybody(here, run, 1)
    sound(run)
    return f"the run's process lived on; the round ended {took:.0f} s after the kill, each update counted once"


def killed_server_app(here: Fleet) -> str:
    here.honest(1.0)
    here.begin("f5-whole", study("f5", 3))
    whole = here.finish("f5-whole")
    cut = here.begin("f5-cut", study("f5", 3))
    for number in (1, 2, 3):
        in_work(here, cut, "s1", number, 90)
        here.killed(COORDINATOR, "run")
    here.finish("f5-cut", 180)
    for number in (1, 2, 3):
        everybody(here, cut, number)
        same = cut.weights(number).read_bytes() == whole.weights(number).read_bytes()
        check(same, f"the weights of round {number} differ from those of the undisturbed run")
    sound(cut)
    return "killed in each of three rounds: all weights bit for bit those of an undisturbed run"


def killed_dispatcher(here: Fleet) -> str:
    here.honest(WORK_S)
    run = here.begin("f6", study("f6", 2))
    in_work(here, run, "s1", 1)
    before = here.restarts(COORDINATOR, "dispatch")
    here.killed(COORDINATOR, "dispatch")
    here.finish("f6")
    sound(run)
    after = here.restarts(COORDINATOR, "dispatch")
    check(after == before + 1, f"status tells {after - before} restarts")
    return "restarted by the supervisor, told by `fedserver status`; the run went on"


def state_on_disk(here: Fleet) -> str:
    here.honest()
    database = here.federation.superlink / "state.db"
    check(database.is_file(), f"{database.name} is not there")
    nodes = {site: here.pid(site, "node") for site in here.sites}
    here.killed(COORDINATOR, "link")
    here.begin("f7", study("f7", 1))
    here.finish("f7")
    check(nodes == {site: here.pid(site, "node") for site in here.sites}, "a node was turned away and restarted")
    return "its state is a file, and one in memory is refused at start; after a kill all nodes went on as they were"


def short_silence(here: Fleet) -> None:
    run = here.begin("f8-short", study("f8-short", 2, deadline_s=50.0))
    here.honest(WORK_S)
    in_work(here, run, "s1", 1)
    with here.lines["s1"].silent():
        time.sleep(12)
    here.finish("f8-short")
    everybody(here, run, 1)
    everybody(here, run, 2)
    sound(run)


def long_silence(here: Fleet) -> str:
    here.honest(1.0)
    run = here.begin("f8-long", study("f8-long", 200, deadline_s=10.0, gather_s=0.0, pause_s=60.0))
    in_work(here, run, "s1", 1)
    with here.lines["s1"].silent():
        began, before = time.monotonic(), round_of(run)
        while time.monotonic() - began < 75:
            time.sleep(1)
        without = round_of(run) - before
        check(without >= 3, f"{without} rounds were finished without it in 75 s")
        check(seat(run, "s1") in ("away", "asked", "lost", "late"), f"its seat says {seat(run, 's1')!r}")
    began, at = time.monotonic(), round_of(run)
    counted = await_that("s1 is counted again", lambda: counted_after(run, "s1", at), 180)
    took = time.monotonic() - began
    here.cease("f8-long")
    sound(run)
    return f"{without} rounds closed without it, each in time; counted again in round {counted}, {took:.0f} s after"


def partition(here: Fleet) -> str:
    short_silence(here)
    return f"12 s: no effect, counted in the same round. 75 s: {long_silence(here)}"


def slow_site(here: Fleet) -> str:
    seconds = {}
    for late in ("drop", "next"):
        here.honest(2.5)
        here.script("s3", seconds=9.0, rounds=[1])
        run = here.begin(f"f9-{late}", study(f"f9-{late}", 4, deadline_s=6.0, late=late))
        here.finish(run.id)
        line = told(run, 1)
        check(line["left_out"].get("s3", {}).get("state") == "late", f"s3 in round 1: {line['left_out'].get('s3')}")
        seconds[late] = line["seconds"]
        check(seconds[late] <= 6.0 + 2.0, f"round 1 took {seconds[late]:.1f} s, its deadline is 6 s")
        counted = [n for n in (2, 3, 4) if "s3 (round 1)" in told(run, n)["sites"]]
        check(len(counted) == (late == "next"), f"late = {late!r}: its update was counted in rounds {counted}")
        sound(run)
    return (
        f"the rounds closed after {seconds['drop']:.1f} and {seconds['next']:.1f} s (deadline 6 s) and named it late; "
        "its update was dropped, or counted once at half its weight, as the study says"
    )


def too_few(here: Fleet) -> str:
    here.honest()
    here.stop("s2")
    here.stop("s3")
    run = here.begin("f23", study("f23", 2, deadline_s=6.0, gather_s=1.0))
    await_that("the run is shown as paused", lambda: read_progress(run).get("phase") == "paused")
    time.sleep(5)
    check(round_of(run) == 0, "a round was made of one site")
    here.start("s2")
    here.ready("s2")
    here.finish("f23")
    sound(run)
    counted = sorted(told(run, 1)["sites"])
    check(counted == ["s1", "s2"], f"round 1 counted {counted}")
    here.start("s3")
    here.ready("s3")
    return "one of three sites: paused, no round made; went on by itself when the second came back"


SCENARIOS: dict[str, Callable[[Fleet], str]] = {
    "F1": killed_executor,
    "F2": killed_node,
    "F2b": killed_while_cut_off,
    "F3": killed_coordinator,
    "F4": killed_superlink,
    "F5": killed_server_app,
    "F6": killed_dispatcher,
    "F7": state_on_disk,
    "F8": partition,
    "F9": slow_site,
    "F23": too_few,
}
