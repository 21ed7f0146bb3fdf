"""The demo: a coordinator and three hospitals as separate processes on this machine, over mutual TLS.

Every step is a command that its user would type; the demo only types them. The same phantom sites are then trained
alone, through the simulation engine, so that the table can say what joining was worth.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedserver.checkpoint import RunFolder
from fedserver.comparison import Comparison
from fedserver.report import write_report
from shared_models.errors import ProcessFailed, StateInvalid
from shared_models.files import read_lines, write_json
from shared_models.study import load_study
from simulations.phantoms import phantom
from simulations.run import Job, Machine, as_numbers, jobs, node_configs, phantom_plan, score, side_by_side
from simulations.show import score_table, watching

STUDY = "lung-ct-quick"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # three hospitals share the cores of this machine


def demonstrate(out: Path, console: Console) -> dict[str, Any]:
    """Runs the whole demo in `out` and returns what it printed; a finished demo in the folder is begun anew.

    Raises:
        ProcessFailed: a command of the demo failed; its words are in the message, the logs in `out`.
    """
    study, began = load_study(STUDY), time.monotonic()
    if out.exists():
        if not (out / "demo").exists():
            raise StateInvalid(f"{out}: is there and is no demo of ours. Move it away, or choose another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / "demo").touch()

    def say(news: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s[/]  {news}", highlight=False)

    say("making the images of three phantom hospitals")
    data = phantom(out / "images", phantom_plan(study))
    machine = Machine("local", workers=len(os.sched_getaffinity(0)), threads=1, device="cpu")
    nodes = node_configs(out / "alone", [data], machine, None)
    with ExitStack() as running:
        federation = out / "federation"
        address = f"127.0.0.1:{free_port()}"
        command(out, ["fedserver", "init", "--name", "demo", "--address", address, "--federation", str(federation)])
        running.enter_context(
            background(
                out / "serve.log", ["fedserver", "serve", "--host", "127.0.0.1", "--federation", str(federation)]
            )
        )
        await_port(address)
        say(f"coordinator is up at {address}")
        for site in nodes:
            invite = command(out, ["fedserver", "invite", site, "--federation", str(federation)]).strip()
            folder = str(out / "sites" / site)
            join = [
                "fedclient",
                "join",
                invite,
                "--data",
                str(data),
                "--approve",
                "inside-policy",
                "--manifest-site",
                site,
                "--site",
                folder,
            ]
            command(out, join)
            running.enter_context(background(out / f"{site}.log", ["fedclient", "start", "--site", folder]))
            say(f"{site} has joined and is starting")
        say(f"training {study.name}: {study.rounds.count} rounds on mutual TLS")
        show = ["fedserver", "run", STUDY, "--federation", str(federation)]
        if subprocess.run(python(show), env={**os.environ, **ONE_THREAD}, check=False).returncode:
            raise ProcessFailed(f"`{' '.join(show)}` failed; see {federation / 'logs'} and {out}.")
    run = RunFolder(next((federation / "runs").iterdir()))
    say("federated training is done; now each hospital alone, for comparison")
    alone = [job for job in jobs(study, nodes, compare=True) if job.name.startswith("local-")]
    with watching(console, out / "alone", study.rounds.count):
        comparison = compare(alone, run, out / "alone", machine, nodes)
    report = write_report(run, [comparison])
    results = as_numbers(comparison) | {
        "report": str(report),
        "weights": str(run.weights(study.rounds.count)),
        "seconds": round(time.monotonic() - began, 1),
        "rounds": [line["seconds"] for line in read_lines(run.metrics) if "seconds" in line],
    }
    write_json(out / "results.json", results)
    models = {f"only {site}": results["local"][site] for site in sorted(nodes)} | {"federated": results["federated"]}
    console.print(score_table(models, sorted(nodes), "Dice on each hospital's test patients"))
    worst = min(score for score in results["federated"].values() if score is not None)
    cell = min(score for r in results["local"].values() for score in r.values() if score is not None)
    console.print(f"Worst site, federated: {worst:.3f}. Worst cell of the models trained alone: {cell:.3f}.")
    console.print(f"report   {report}\nweights  {results['weights']}", highlight=False, soft_wrap=True)
    return results


def compare(alone: Sequence[Job], run: RunFolder, folder: Path, machine: Machine, nodes: Any) -> Comparison:
    """Each site alone, side by side, and every model on every site."""
    study = load_study(STUDY)
    seed = folder / f"seed-{study.seed}"
    runs = side_by_side(alone, seed, machine, lambda _: None)
    local = {name.removeprefix("local-"): score(r, nodes) for name, r in runs.items()}
    return Comparison(local=local, pooled={}, federated=score(run, nodes))


def python(words: Sequence[str]) -> list[str]:
    """The command as it is installed beside this Python."""
    module = {"fedserver": "fedserver.cli", "fedclient": "fedclient.cli"}[words[0]]
    return [sys.executable, "-m", module, *words[1:]]


def command(out: Path, words: Sequence[str]) -> str:
    done = subprocess.run(python(words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailed(f"`{words[0]} {words[1]}` failed: {done.stderr.strip()} Logs are in {out}.")
    return done.stdout


@contextmanager
def background(log: Path, words: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs until the block ends; its output is in `log`."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            python(words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **ONE_THREAD}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_port(address: str, timeout_s: float = 60.0) -> None:
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise ProcessFailed(f"{address}: nothing listens after {timeout_s:.0f} s. See serve.log.") from None
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
