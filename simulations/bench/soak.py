"""A long run of short rounds while processes are killed, stopped and cut off at random: does anything hang or grow?

    python -m simulations.bench.soak [--sites 8] [--rounds 200] [--seed 0] [--every 30] [--patience 1]

Real processes over mutual TLS; the sites do not train (simulations/bench/faults/app.py). What is disturbed, for how
long and when follows from the seed; how far the rounds have come by then is the machine's. Exits non-zero when a round
outlives its deadline, an update is counted twice or wrongly, a log does not verify, or memory or files grow too much.
"""

import argparse
import heapq
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import median

import psutil

from fedserver.checkpoint import RunFolder
from fedserver.enrol import signer
from shared_models.errors import FederationError
from shared_models.evidence import verdict_of
from shared_models.identity import identity_public_key, load_secret
from shared_models.supervise import LOG_LIMIT_BYTES, read_status
from simulations.bench.faults.fleet import COORDINATOR, FellShort, Fleet, fleet, round_of, study, told, with_pid
from simulations.bench.faults.ledger import miscounted, updates_of

MIB = 1 << 20
DEADLINE_S = 20.0  # of a round
SLACK_S = 20.0  # from the deadline to the next checkpoint, on a machine that others use too
OUTAGE_S = (
    75.0  # more, for each time in a round that the coordinator or its run was killed, or too few sites were there
)
WARM_ROUNDS = 15  # before anybody's memory is looked at
LEAST_ROUNDS = 10  # between what is compared: in fewer, a line that comes back is all the growth that there is
MOST_GROWTH_MIB = 24.0  # of a process's memory in 100 rounds, and once besides
MOST_FOLDER_KIB = 96.0  # a round, of the coordinator's folder and of a site's, logs left out
MOST_FILES = 8.0  # more open files of a process at the end than at the beginning
SAMPLE_S = 2.0
UNMEASURED = "lived long enough to be measured. Take more rounds, or disturb less (--every)."
RUN = "soak"


@dataclass(slots=True)
class Sampled:
    """One process as it was seen: rounds finished, bytes of memory, open files."""

    name: str
    rounds: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Soak:
    """What goes on, and what was seen of it.

    Attributes:
        patience: how many times longer a round may outlive its deadline: of a machine that is busy with other things.
        struck: the rounds in which the coordinator or its run was disturbed, and how.
    """

    here: Fleet
    run: RunFolder
    rng: random.Random
    due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    number: Iterator[int] = field(default_factory=count)
    busy: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    patience: float = 1.0
    struck: list[tuple[int, str]] = field(default_factory=list)
    processes: dict[int, Sampled] = field(default_factory=dict)
    folders: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    ended: bool = False

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.due, (time.monotonic() + delay_s, next(self.number), act))

    def act(self) -> None:
        """Does what is due."""
        while self.due and self.due[0][0] <= time.monotonic():
            heapq.heappop(self.due)[2]()

    # ---- disturbances: each ends by itself ----

    def disturb(self) -> None:
        """One, chosen by chance; none where its target is not to be disturbed now."""
        site = self.rng.choice(self.here.sites)
        restart, serve = (lambda: self.here.start(site)), self.here.serve
        choices: list[tuple[str, str, Callable[[], None]]] = [
            *2 * [(site, "kill executor", lambda: self._kill(site, "executor"))],
            *2 * [(site, "kill node", lambda: self._kill(site, "node"))],
            (site, "power cut of a site", lambda: self._power_cut(site, restart, 1, 10)),
            *2 * [(site, "silent line", lambda: self._line(site, silent=True))],
            (site, "cut line", lambda: self._line(site, silent=False)),
            (site, "stopped node", lambda: self._freeze(site)),
            (COORDINATOR, "kill gateway", lambda: self._kill(COORDINATOR, "gateway")),
            (COORDINATOR, "kill SuperLink", lambda: self._kill(COORDINATOR, "link")),
            (COORDINATOR, "kill dispatcher", lambda: self._kill(COORDINATOR, "dispatch")),
            (COORDINATOR, "kill run", lambda: self._kill(COORDINATOR, "run")),
            (COORDINATOR, "power cut of the coordinator", lambda: self._power_cut(COORDINATOR, serve, 0.5, 5)),
        ]
        whom, what, act = self.rng.choice(choices)
        finished = round_of(self.run)
        if whom in self.busy or (whom == COORDINATOR and self.struck and self.struck[-1][0] > finished):
            return  # the coordinator is left alone until a round was finished: else it might never come up
        with suppress(FellShort, psutil.Error):  # it is down already, by another disturbance
            act()
            self.done[what] += 1
            if whom == COORDINATOR:
                self.struck.append((finished + 1, what))

    def _hold(self, whom: str, seconds: float, release: Callable[[], None]) -> None:
        """Nobody else disturbs `whom` until `release`, in `seconds`, and a while after."""
        self.busy.add(whom)

        def ended() -> None:
            release()
            self.at(5.0, lambda: self.busy.discard(whom))

        self.at(seconds, ended)

    def _kill(self, whom: str, child: str) -> None:
        self.here.killed(whom, child)
        self._hold(whom, 3.0, lambda: None)

    def _power_cut(self, whom: str, start: Callable[[], None], least_s: float, most_s: float) -> None:
        self.here.kill(whom)
        self._hold(whom, self.rng.uniform(least_s, most_s), start)

    def _line(self, site: str, silent: bool) -> None:
        held, line = ExitStack(), self.here.lines[site]
        held.enter_context(line.silent() if silent else line.cut())
        self._hold(site, self.rng.uniform(2.0, 25.0), held.close)

    def _freeze(self, site: str) -> None:
        pid = self.here.pid(site, "node")
        if pid is not None:
            with_pid(pid, signal.SIGSTOP)
            self._hold(site, self.rng.uniform(2.0, 15.0), lambda: with_pid(pid, signal.SIGCONT))

    # ---- what is looked at ----

    def sample(self) -> None:
        finished = round_of(self.run)
        for who in (COORDINATOR, *self.here.sites):
            for name, child in read_status(self.here.folder(who))["children"].items():
                self._look(f"{who} {name}" if who == COORDINATOR else f"site {name}", child["pid"], finished)
            if who in self.here.running:
                kind = "coordinator's supervisor" if who == COORDINATOR else "site's supervisor"
                self._look(kind, self.here.running[who].pid, finished)
            self.folders.setdefault(who, []).append((finished, size_of(self.here.folder(who))))
        self._look("coordinator run", self._run_pid(), finished)

    def _run_pid(self) -> int | None:
        try:
            return self.here.run_pid()
        except psutil.Error:
            return None

    def _look(self, name: str, pid: int | None, finished: int) -> None:
        if pid is None:
            return
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            rss, files = process.memory_info().rss, process.num_fds()
            seen = self.processes.setdefault(pid, Sampled(name))
            seen.rounds.append(finished)
            seen.rss.append(rss)
            seen.files.append(files)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, logs left out: their bound is their own."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and path.parent.name != "logs":
                total += path.stat().st_size
    return total


def soak(here: Fleet, rounds: int, seed: int, every_s: float, patience: float) -> Soak:
    """Carries the rounds out under disturbances, `every_s` on average; then everything is left alone, and the run ends.

    Raises:
        FellShort: no round was finished for far longer than one may take.
    """
    quorum = max(1, len(here.sites) // 3)
    made = study(RUN, rounds, quorum=quorum, deadline_s=DEADLINE_S, gather_s=2.0, pause_s=600.0, late="next")
    here.honest(0.2)
    going = Soak(here, here.begin(RUN, made), random.Random(seed), patience=patience)
    sampled_at, moved_at, last = 0.0, time.monotonic(), 0
    going.at(5.0, lambda: _again(going, every_s))
    while here.run(RUN).state in ("queued", "running"):
        going.act()
        now = time.monotonic()
        if now - sampled_at > SAMPLE_S:
            going.sample()
            sampled_at = now
            if round_of(going.run) > last:
                before, last, moved_at = last, round_of(going.run), now
                if last // 10 > before // 10:
                    print(f"  round {last}, {sum(going.done.values())} disturbances", file=sys.stderr, flush=True)
            if now - moved_at > 3 * (DEADLINE_S + patience * (SLACK_S + OUTAGE_S)):
                raise FellShort(f"round {last + 1} has not ended for {now - moved_at:.0f} s: it hangs")
        time.sleep(0.1)
    going.ended = True
    while going.due:  # what is held is let go at once
        heapq.heappop(going.due)[2]()
    return going


def _again(going: Soak, every_s: float) -> None:
    """One disturbance now, the next after a while that has no memory."""
    if going.ended:
        return
    going.disturb()
    going.at(min(6 * every_s, going.rng.expovariate(1 / every_s)), lambda: _again(going, every_s))


def overdue_rounds(going: Soak) -> list[str]:
    """Rounds that took longer from checkpoint to checkpoint than they may."""
    done = round_of(going.run)
    at = [going.run.weights(number).stat().st_mtime for number in range(done + 1)]
    struck = Counter(number for number, _ in going.struck)
    late = []
    for number, (before, after) in enumerate(pairwise(at), start=1):
        most = DEADLINE_S + going.patience * (SLACK_S + OUTAGE_S * (struck[number] + struck[number - 1]))
        if after - before > most:
            late.append(f"round {number} took {after - before:.0f} s, at most {most:.0f} s are allowed")
    return late


def growth(rounds: list[int], values: list[int]) -> tuple[float, int] | None:
    """How much a value grew from its first quarter to its last, after the first rounds, and in how many rounds.

    None of a life too short to tell.
    """
    kept = [(n, v) for n, v in zip(rounds, values, strict=True) if n >= rounds[0] + WARM_ROUNDS]
    if len(kept) < 8:
        return None
    quarter = max(1, len(kept) // 4)
    first, last = kept[:quarter], kept[-quarter:]
    over = round(median(n for n, _ in last) - median(n for n, _ in first))
    if over < LEAST_ROUNDS:
        return None
    return median(v for _, v in last) - median(v for _, v in first), over


def judged(going: Soak) -> list[str]:
    """Prints what was measured; returns what falls short."""
    short = overdue_rounds(going) + miscounted(going.run)
    done = round_of(going.run)
    lines = [told(going.run, n) for n in range(1, done + 1)]
    counted = [update for line in lines for update in updates_of(line)]
    asked = done * len(going.here.sites)
    at = [going.run.weights(n).stat().st_mtime for n in range(done + 1)]
    took = [after - before for before, after in pairwise(at)]
    print(f"{done} rounds of {len(going.here.sites)} sites, median {median(took):.1f} s, longest {max(took):.1f} s "
          f"(deadline {DEADLINE_S:g} s)")  # fmt: skip
    late = sum(n != line["round"] for line in lines for _, n in updates_of(line))
    print(f"{len(counted)} of {asked} updates counted, {late} of them late")
    print(f"disturbances: {', '.join(f'{n} x {what}' for what, n in sorted(going.done.items()))}")
    short += processes(going)
    short += folders(going)
    short += logs_that_fail(going.here)
    return short


def processes(going: Soak) -> list[str]:
    """Kinds of processes whose memory or open files grow, or of which none could be measured."""
    short = []
    for kind in sorted({seen.name for seen in going.processes.values()}):
        lived = [seen for seen in going.processes.values() if seen.name == kind]
        memory = [grown for seen in lived if (grown := growth(seen.rounds, seen.rss))]
        if not memory:
            short.append(f"{kind}: none of {len(lived)} processes {UNMEASURED}")
            continue
        most, over = max(memory)
        files = max(grown[0] for seen in lived if (grown := growth(seen.rounds, seen.files)))
        longest = max(seen.rounds[-1] - seen.rounds[0] for seen in lived)
        peak = max(max(seen.rss) for seen in lived) / MIB
        allowed = MOST_GROWTH_MIB * (1 + over / 100)
        print(
            f"  {kind:26} {len(lived):3} processes, {len(memory)} measured, the longest over {longest} rounds; peak "
            f"{peak:.0f} MiB; grew by at most {most / MIB:.1f} MiB in {over} rounds (allowed {allowed:.0f}), open "
            f"files by {files:+.0f}"
        )
        if most / MIB > allowed:
            short.append(f"{kind}: memory grew by {most / MIB:.1f} MiB in {over} rounds")
        if files > MOST_FILES:
            short.append(f"{kind}: {files:.0f} more open files")
    return short


def folders(going: Soak) -> list[str]:
    short = []
    for who, sizes in going.folders.items():
        measured = growth([n for n, _ in sizes], [size for _, size in sizes])
        if measured is None:
            short.append(f"{who}: its folder was not there long enough to be measured. Take more rounds.")
        else:
            grown, over = measured
            each = grown / 1024 / max(1, over)
            size = sizes[-1][1] / MIB
            print(f"  {who:26} folder {size:.1f} MiB, {each:.1f} KiB a round (at most {MOST_FOLDER_KIB:g})")
            if each > MOST_FOLDER_KIB:
                short.append(f"{who}: its folder grows by {each:.0f} KiB a round")
        logs = [path for path in (going.here.folder(who) / "logs").glob("*") if path.is_file()]
        short += [f"{who}: {p.name} has {p.stat().st_size / MIB:.0f} MiB" for p in logs
                  if p.stat().st_size > 1.2 * LOG_LIMIT_BYTES]  # fmt: skip
    left = sum(1 for path in (going.here.federation.blobs / "in").glob("*/*"))
    print(f"  {left} uploads are left at the coordinator")
    if left > 4 * len(going.here.sites):
        short.append(f"{left} uploads are left at the coordinator")
    return short


def logs_that_fail(here: Fleet) -> list[str]:
    """Audit logs, of both ends, that do not verify after all the kills."""
    keys = {COORDINATOR: identity_public_key(signer(here.federation).key)}
    keys |= {s: identity_public_key(load_secret(here.folder(s) / "keys/identity.key")) for s in here.sites}
    verdicts = {who: verdict_of(here.folder(who), key) for who, key in keys.items()}
    print(f"  audit logs of both ends: {sum(v.bad is None for v in verdicts.values())} of {len(verdicts)} verify")
    return [f"{who}: its audit log: {v.bad}" for who, v in verdicts.items() if v.bad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--sites", type=int, default=8, help="at most 16")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of what is disturbed, for how long, and when")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two disturbances, on average")
    parser.add_argument("--patience", type=float, default=1.0, help="slack of rounds, in multiples: of a busy machine")
    parser.add_argument("--out", type=Path, help="keep all folders and logs here")
    arguments = parser.parse_args()
    out = (arguments.out or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    began, short = time.monotonic(), list[str]()
    try:
        with fleet(out, arguments.sites) as here:
            going = soak(here, arguments.rounds, arguments.seed, arguments.every, arguments.patience)
            if here.run(RUN).state != "finished":
                short.append(f"the run is {here.run(RUN).state}: {here.run(RUN).message}")
        short += judged(going)
    except (FellShort, FederationError) as error:
        short.append(str(error))
    print(f"{(time.monotonic() - began) / 60:.1f} min")
    for words in short:
        print(f"falls short: {words}")
    if short or arguments.out:
        print(f"logs: {out}")
    else:
        shutil.rmtree(out, ignore_errors=True)
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
