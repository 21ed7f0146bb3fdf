"""Seconds of a round in a real deployment, training left out: processes, mutual TLS, SQLite files.

    python -m simulations.bench.deployed_round [CASE ...]

Coordinator and nodes run in processes of their own, started by the commands that people type; a node's executor is
given an app that does everything but train (simulations/bench/bench_app.py). Each case has a federation of its own, so
that a peak of memory (the kernel's VmHWM) is that case's. A round lasts from one checkpoint on disk to the next: the
`seconds` of metrics.jsonl leave out the step and the checkpoint.
"""

import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from fedserver.checkpoint import RunFolder, create_run
from fedserver.enrol import Federation, open_federation
from fedserver.state import Run, add_run, find_run
from shared_models.errors import FederationError, ProcessFailed
from shared_models.files import read_lines
from shared_models.study import Evaluate, Rounds, Study, sha256
from shared_models.supervise import read_status
from shared_models.weights import Arrays, open_tensors
from simulations.bench.faults.fleet import START
from simulations.bench.server_memory import MIB, model
from simulations.demo import ONE_THREAD, await_port, background, command, free_port

APP = "simulations.bench.bench_app:app"
ONE_TENSOR: Arrays = {"w": np.random.default_rng(0).standard_normal(100, dtype=np.float32)}
MOST_LINK_SPREAD = 0.15
MOST_DATABASE_MIB = 8.0
SLICE_BYTES = 64
SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """One federation and one run.

    Attributes:
        most_s: longest median round that is good enough; None where only memory is looked at.
    """

    big: bool
    nodes: int
    rounds: int
    most_s: float | None


CASES = {
    "tensor-2": Case(big=False, nodes=2, rounds=10, most_s=4.0),
    "31m-1": Case(big=True, nodes=1, rounds=10, most_s=6.0),
    "31m-2": Case(big=True, nodes=2, rounds=4, most_s=None),
    "31m-8": Case(big=True, nodes=8, rounds=10, most_s=20.0),
}


@dataclass(slots=True)
class Watch:
    """CPU seconds and peak memory of each process, by its kind; what a process had when it was last seen counts."""

    began: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    peak_mib: dict[int, float] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)

    def look(self, kinds: Mapping[int, str]) -> None:
        for pid, kind in kinds.items():
            with suppress(psutil.Error, OSError, StopIteration):
                times = psutil.Process(pid).cpu_times()
                status = Path(f"/proc/{pid}/status").read_text().splitlines()
                peak = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
                used = times.user + times.system
                self.began.setdefault(pid, 0.0 if kind == "ServerApp" else used)
                self.cpu[pid], self.peak_mib[pid], self.kinds[pid] = used, peak, kind

    def cpu_s(self, kind: str) -> float:
        """Of all processes of a kind together, since they were first looked at (a ServerApp: since its start)."""
        return sum(self.cpu[pid] - self.began[pid] for pid, k in self.kinds.items() if k == kind)

    def most_mib(self, kind: str) -> float:
        return max(peak for pid, peak in self.peak_mib.items() if self.kinds[pid] == kind)


@dataclass(frozen=True, slots=True)
class Found:
    """What one case came to; `wrong` says in words what no figure may make up for."""

    seconds: tuple[float, ...]
    watch: Watch
    database_mib: float
    others_cores: float
    wrong: tuple[str, ...]


def measure(case: Case, out: Path) -> Found:
    """Builds the federation in `out`, carries the run out, and takes everything down again."""
    out.mkdir(parents=True)
    (out / "images").mkdir()
    folder, address = out / "federation", f"127.0.0.1:{free_port()}"
    sites = [f"s{i}" for i in range(1, case.nodes + 1)]
    command(out, ["fedserver", "init", "--name", "bench", "--address", address, "--federation", str(folder)])
    with ExitStack() as running:
        serve = ["fedserver", "serve", "--host", "127.0.0.1", "--federation", str(folder)]
        running.enter_context(background(out / "serve.log", serve))
        await_port(address)
        for site in sites:
            invite = command(out, ["fedserver", "invite", site, "--federation", str(folder)]).strip()
            joining = [
                "fedclient",
                "join",
                invite,
                "--data",
                str(out / "images"),
                "--approve",
                "inside-policy",
                "--site",
                str(out / site),
            ]
            command(out, joining)
            settings = out / site / "site.toml"  # one node is measured by itself too
            settings.write_text(settings.read_text().replace("least_cohort = 2", "least_cohort = 1"))
        running.enter_context(nodes(out, sites))
        until_ready(out, sites)
        federation = open_federation(folder)
        rounds = Rounds(case.rounds, quorum=case.nodes, deadline_s=300)
        study = Study("bench", rounds=rounds, evaluate=Evaluate(every=0))
        run = create_run(federation.runs, "bench", study, model() if case.big else ONE_TENSOR)
        now, busy, wall = time.time(), _busy_s(), time.monotonic()
        with watched(out, sites) as watch:
            add_run(federation.state, Run("bench", study.name, sha256(study), "queued", None, now, now, ""))
            await_end(federation, "bench", 60 + 60 * case.rounds)
        ours = sum(watch.cpu_s(kind) for kind in set(watch.kinds.values()))
        others = max(0.0, (_busy_s() - busy - ours) / (time.monotonic() - wall))
        restarts = [f"{where.name}: {name} was restarted" for where in [folder, *(out / s for s in sites)]
                    for name, child in read_status(where)["children"].items() if child["restarts"]]  # fmt: skip
        database, tensors = folder / "superlink", [run.path, *(out / site / "runs/bench" for site in sites)]
        size = sum(path.stat().st_size for path in database.rglob("*") if path.is_file())
        held = holding(database, [path for where in tensors for path in where.glob("*.safetensors")])
        errors = errors_in(out)  # before everything is taken down: who dies in the middle of a request leaves a line
    wrong = [*left_out(run), *restarts, *errors, *held]
    return Found(tuple(round_seconds(run, case.rounds)), watch, size / MIB, others, tuple(wrong))


@contextmanager
def nodes(out: Path, sites: Sequence[str]) -> Iterator[None]:
    """The hospitals' nodes, until the block ends."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for site in sites:
            with (out / f"{site}.log").open("wb") as log:
                words = [sys.executable, "-c", START, str(out / site), APP]
                env = {**os.environ, **ONE_THREAD}
                started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(60)


def until_ready(out: Path, sites: Sequence[str], timeout_s: float = 180.0) -> None:
    """Waits until every executor has loaded its app: that start belongs to no round."""
    end = time.monotonic() + timeout_s
    waiting = set(sites)
    while waiting:
        for site in sorted(waiting):
            log = out / site / "logs/executor.log"
            if log.exists() and "ready; app" in log.read_text():
                waiting.discard(site)
        if time.monotonic() > end:
            raise ProcessFailed(f"{sorted(waiting)}: not ready after {timeout_s:.0f} s. See the logs in {out}.")
        time.sleep(0.2)


def await_end(federation: Federation, run_id: str, timeout_s: float) -> None:
    """Returns when the run is finished."""
    end = time.monotonic() + timeout_s
    while (run := find_run(federation.state, run_id)) is None or run.state in ("queued", "running"):
        if time.monotonic() > end:
            raise ProcessFailed(f"run {run_id}: not finished after {timeout_s:.0f} s. See {federation.logs}.")
        time.sleep(0.2)
    if run.state != "finished":
        raise ProcessFailed(f"run {run_id}: is {run.state}: {run.message} See {federation.logs}.")


@contextmanager
def watched(out: Path, sites: Sequence[str]) -> Iterator[Watch]:
    """Looks at all processes of the federation, in a thread, until the block ends."""
    watch, ended = Watch(), threading.Event()

    def look() -> None:
        while True:
            watch.look(processes(out, sites))
            if ended.wait(SAMPLE_S):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def processes(out: Path, sites: Sequence[str]) -> dict[int, str]:
    """Number and kind of every process that lives now."""
    names = {"link": "SuperLink", "gateway": "gateway", "dispatch": "dispatcher"}
    found = {child["pid"]: names.get(name, name) for where in [out / "federation", *(out / s for s in sites)]
             for name, child in read_status(where)["children"].items() if child["pid"]}  # fmt: skip
    for pid in [pid for pid, kind in found.items() if kind == "dispatcher"]:
        with suppress(psutil.Error):
            found |= {child.pid: "ServerApp" for child in psutil.Process(pid).children()}
    return found


def round_seconds(run: RunFolder, rounds: int) -> list[float]:
    """From checkpoint to checkpoint; the first round, which has none before it, as its line says."""
    first = float(read_lines(run.metrics)[0]["seconds"])
    written = [run.weights(number).stat().st_mtime for number in range(1, rounds + 1)]
    return [first, *(after - before for before, after in pairwise(written))]


def left_out(run: RunFolder) -> list[str]:
    """Sites that were left out of a round, or had to be asked again."""
    lines = read_lines(run.metrics)
    out = [(n["round"], s, f"{a['state']}, {a['reason']}") for n in lines for s, a in n["left_out"].items()]
    again = [(n["round"], s, f"asked {a['attempt']} times") for n in lines for s, a in n["sites"].items()
             if a["attempt"] > 1]  # fmt: skip
    return [f"round {number}: {site}: {words}" for number, site, words in [*out, *again]]


def errors_in(out: Path) -> list[str]:
    """Lines of the processes' logs that tell of an error."""
    lines = [(log, line) for log in sorted(out.rglob("*.log")) for line in log.read_text(errors="replace").splitlines()]
    odd = re.compile(r"Traceback|ERROR|is locked|HTTP 5\d\d")
    return [f"{log.relative_to(out)}: {line.strip()[:160]}" for log, line in lines if odd.search(line)]


def holding(database: Path, tensors: Sequence[Path]) -> list[str]:
    """Files of Flower's database folder that hold a piece of any of these weights and updates."""
    pieces = set()
    for path in tensors:
        with path.open("rb") as file:
            for offset in open_tensors(path, path.name).offsets.values():
                file.seek(offset)
                pieces.add(file.read(SLICE_BYTES))
    found = []
    for path in (p for p in sorted(database.rglob("*")) if p.is_file() and p.stat().st_size):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if any(content.find(piece) >= 0 for piece in pieces):
                found.append(f"{path.name}: holds bytes of weights")
    return found


def log_ends(out: Path, most_lines: int = 8) -> str:
    """The last lines of every log."""
    logs = {log: log.read_text(errors="replace").splitlines() for log in sorted(out.rglob("*.log"))}
    return "\n".join("\n".join([f"--- {log.relative_to(out)}", *lines[-most_lines:]]) for log, lines in logs.items())


def _busy_s() -> float:
    """CPU seconds that this machine has worked, all cores and all programs."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def tell(name: str, case: Case, found: Found) -> list[str]:
    """Prints one case; returns what falls short."""
    short = [f"{name}: {words}" for words in found.wrong[:20]]
    middle, worst = median(found.seconds), max(found.seconds)
    if case.most_s is not None and middle > case.most_s:
        short.append(f"{name}: a round takes {middle:.1f} s, at most {case.most_s:g} are allowed")
    if found.database_mib > MOST_DATABASE_MIB:
        short.append(f"{name}: the database folder has {found.database_mib:.1f} MiB, at most {MOST_DATABASE_MIB:g}")
    target = f" (at most {case.most_s:g})" if case.most_s is not None else ""
    print(f"\n{name}: {case.nodes} nodes, {case.rounds} rounds: median {middle:.2f} s{target}, longest {worst:.2f} s")
    print(f"  rounds {' '.join(f'{s:.1f}' for s in found.seconds)}; database folder {found.database_mib:.1f} MiB; "
          f"everything else on this machine used {found.others_cores:.1f} of {os.cpu_count()} cores")  # fmt: skip
    for kind in ("SuperLink", "gateway", "ServerApp", "dispatcher", "node", "executor"):
        a_round = found.watch.cpu_s(kind) / case.rounds
        each = f" for each of {case.nodes}" if kind in ("node", "executor") else ""
        a_round /= case.nodes if each else 1
        print(f"  {kind:10} peak {found.watch.most_mib(kind):5.0f} MiB, {a_round:5.2f} CPU s a round{each}")
    return short


def main() -> None:
    chosen = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen if name not in CASES]:
        sys.exit(f"{unknown[0]!r} is no case. There are: {', '.join(CASES)}.")
    results: dict[str, Found] = {}
    short: list[str] = []
    with tempfile.TemporaryDirectory(prefix="deployed-") as folder:
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                results[name] = measure(CASES[name], Path(folder) / name)
            except FederationError as error:
                print(log_ends(Path(folder) / name), file=sys.stderr, flush=True)
                short.append(f"{name}: {error}")
    for name, found in results.items():
        short += tell(name, CASES[name], found)
    if {"31m-2", "31m-8"} <= results.keys():
        two, eight = (results[name].watch.most_mib("SuperLink") for name in ("31m-2", "31m-8"))
        spread = abs(eight / two - 1)
        print(f"\nSuperLink: {two:.0f} MiB with 2 nodes, {eight:.0f} with 8: {100 * spread:.1f} % (at most 15 %)")
        if spread > MOST_LINK_SPREAD:
            short.append(f"SuperLink: {two:.0f} MiB with 2 nodes and {eight:.0f} with 8")
    if short:
        sys.exit("falls short of its target:\n  " + "\n  ".join(short))


if __name__ == "__main__":
    main()
