"""The fault table against the real system: what was done, what has to come of it, and what was seen.

    python -m simulations.bench.faults [--only F1,F8] [--without-tests] [--out DIR]

A coordinator and three hospitals run as processes on this machine, over mutual TLS; a fault is done to them while a run
goes on, and its weights are looked at afterwards. The unit tests that try the same fault are run too, and those of
processes where a fault has no scenario. Exits non-zero when anything that ran falls short.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedserver.state import change_run, list_runs
from simulations.bench.faults import kills, machine, sent, sums, told
from simulations.bench.faults.fleet import COORDINATOR, ROOT, FellShort, Fleet, fleet
from simulations.bench.faults.machine import NotHere, small_disk
from simulations.bench.faults.table import FAULTS, Fault
from simulations.demo import ONE_THREAD

SCENARIOS: Mapping[str, Callable[[Fleet], str]] = kills.SCENARIOS | sent.SCENARIOS | machine.SCENARIOS | sums.SCENARIOS
SITES = 3


@dataclass(slots=True)
class Seen:
    """What came of one fault: words for each part, and which parts failed or could not be tried."""

    outcome: str = ""
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    ran: bool = False
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "FAIL" if self.failed else "pass" if self.ran else "not run"


class Stage:
    """A fleet for one scenario after the other, made anew after one that fell short."""

    def __init__(self, out: Path) -> None:
        self.out, self.number = out, 0
        self.held = ExitStack()
        self.here: Fleet | None = None

    def fleet(self) -> Fleet:
        if self.here is None:
            self.number += 1
            out = self.out / f"fleet-{self.number}"
            with suppress(NotHere):
                self.held.enter_context(small_disk(out / "disk"))
            self.here = self.held.enter_context(fleet(out, SITES, folder=out / "disk/federation"))
        return self.here

    def strike(self) -> None:
        """Takes the fleet down."""
        self.here = None
        self.held.close()
        self.held = ExitStack()

    def tidy(self) -> None:
        """Ends what a scenario has left; a fleet that lacks a process is taken down."""
        if self.here is None:
            return
        state = self.here.federation.state
        left = [run.id for run in list_runs(state) if run.state in ("queued", "running", "paused")]
        for run in left:
            change_run(state, run, time.time(), "stopped")
        alive = {who for who, process in self.here.running.items() if process.poll() is None}
        if left or not {COORDINATOR, *self.here.sites} <= alive:
            self.strike()


def tried(stage: Stage, fault: Fault, scenario: Callable[[Fleet], str], seen: Seen) -> None:
    """Does the fault to the fleet."""
    try:
        here = stage.fleet()
        seen.outcome, seen.ran = scenario(here), True
    except NotHere as why:
        seen.not_run.append(str(why))
    except Exception as error:  # of the system or of the scenario: told, and the next fault is tried
        seen.ran = True
        seen.failed.append(str(error) if isinstance(error, FellShort) else f"{type(error).__name__}: {error}")
        stage.strike()
    stage.tidy()


def named_tests(faults: Sequence[Fault], done: Mapping[str, Seen]) -> list[str]:
    """Those that are to be run: of processes only where a fault was not tried by a scenario."""
    wanted = [t for f in faults for t in f.tests if "/processes/" not in t or not done[f.id].ran]
    return list(dict.fromkeys(wanted))


Ended = dict[str, list[dict[str, str]]]  # lines of `told`, by node id without parameters


def run_tests(tests: Sequence[str], out: Path) -> Ended | None:
    """How each test ended, with all its parameters; None where the tests are not at hand.

    A pytest that ends otherwise than with all its tests run tells of none: some parameters might never have had a turn.
    """
    if not (ROOT / "tests").is_dir():
        return None
    into = out / "tests.jsonl"
    words = [sys.executable, "-m", "pytest", "-q", "-p", told.__name__, *tests]
    env = {**os.environ, **ONE_THREAD, told.INTO: str(into), "PYTHONPATH": str(ROOT)}
    with (out / "tests.log").open("wb") as log:
        code = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log, env=env, check=False).returncode
    ended: Ended = {}
    if code not in (0, 1):  # of pytest: all passed; all were run and some failed
        print(f"pytest ended with {code}: see {log.name}", file=sys.stderr, flush=True)
        return ended
    for line in map(json.loads, into.read_text().splitlines() if into.exists() else ()):
        ended.setdefault(line["test"].partition("[")[0], []).append(line)
    return ended


def add_tests(fault: Fault, ended: Ended | None, chosen: Sequence[str], seen: Seen) -> None:
    """What the tests of a fault came to; one that was to run and tells nothing has failed."""
    passed = 0
    for test in (t for t in fault.tests if t in chosen):
        if ended is None:
            seen.not_run.append(f"{test}: is not at hand")
            continue
        lines = ended.get(test, [])
        if not lines:
            seen.failed.append(f"{test}: gave no result")
        for line in lines:
            if line["outcome"] == "failed":
                seen.failed.append(f"{line['test']} failed")
            elif line["outcome"] == "skipped":
                seen.not_run.append(f"{line['test']}: {line['why']}")
            else:
                passed += 1
    seen.ran |= bool(passed)
    if passed:
        seen.outcome = "; ".join(filter(None, (seen.outcome, f"{passed} tests passed")))


def tell(fault: Fault, seen: Seen) -> None:
    print(f"\n{fault.id:4} {seen.verdict:8} {fault.what}  ({seen.seconds:.0f} s)")
    print(f"     required  {fault.required}")
    print(f"     seen      {'; '.join(filter(None, (seen.outcome, *seen.failed))) or 'nothing'}")
    for why in seen.not_run:
        print(f"     not run   {why}")
    print(end="", flush=True)


def chosen_faults(only: str | None) -> list[Fault]:
    wanted = [word.strip().upper().replace("B", "b") for word in (only or "").split(",") if word.strip()]
    if unknown := [word for word in wanted if word not in {f.id for f in FAULTS}]:
        sys.exit(f"{unknown[0]!r} is no fault. There are: {', '.join(f.id for f in FAULTS)}.")
    return [fault for fault in FAULTS if not wanted or fault.id in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="F1,F8", help="these faults alone")
    parser.add_argument("--without-tests", action="store_true", help="scenarios alone")
    parser.add_argument("--out", type=Path, help="keep all folders and logs here")
    arguments = parser.parse_args()
    faults, began = chosen_faults(arguments.only), time.monotonic()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    done = {fault.id: Seen() for fault in faults}
    stage = Stage(out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # processes and mounts are taken down
    try:
        for fault in faults:
            if fault.id in SCENARIOS:
                print(f"{fault.id} ...", file=sys.stderr, flush=True)
                since = time.monotonic()
                tried(stage, fault, SCENARIOS[fault.id], done[fault.id])
                done[fault.id].seconds = time.monotonic() - since
                tell(fault, done[fault.id])
    finally:
        stage.strike()
    tests = [] if arguments.without_tests else named_tests(faults, done)
    if tests:
        print(f"{len(tests)} tests ...", file=sys.stderr, flush=True)
        ended = run_tests(tests, out)
        for fault in faults:
            add_tests(fault, ended, tests, done[fault.id])
        print("\n" + "-" * 100)
        for fault in faults:
            tell(fault, done[fault.id])
    short = [fault.id for fault in faults if done[fault.id].failed]
    ran = sum(seen.verdict != "not run" for seen in done.values())
    print(f"\n{ran - len(short)} of {ran} faults came to what they have to, {len(faults) - ran} could not be tried; "
          f"{(time.monotonic() - began) / 60:.1f} min")  # fmt: skip
    if short or arguments.out:
        print(f"logs: {out}")
    else:
        shutil.rmtree(out, ignore_errors=True)
    sys.exit(f"short: {', '.join(short)}" if short else 0)


if __name__ == "__main__":
    main()
