"""What a researcher sees: a bar for each run in progress, and the table at the end."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedserver.checkpoint import RunFolder, read_progress
from fedserver.comparison import PARTIAL
from shared_models.figure_text import value_text

Say = Callable[[str], None]
IN_USE = "Wait until that one has ended, or give another --out."  # a folder of results


@contextmanager
def watching(console: Console, out: Path, rounds: int) -> Iterator[Say]:
    """Shows the runs below `out` as they go, with the time left; yields a function for one-line news."""
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    ended = threading.Event()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[Path, TaskID] = {}

        def watch() -> None:
            while not ended.wait(0.5):
                for folder in sorted(p.parent for p in out.glob("seed-*/*/progress.json")):
                    _update(bars, tasks, folder, rounds)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield lambda news: console.print(news, highlight=False)
        finally:
            ended.set()
            watcher.join()


@contextmanager
def counting(console: Console) -> Iterator[tuple[Say, Callable[[int, int], None]]]:
    """One bar over the rounds of all runs, with the time left; yields functions for news, and for (done, in all)."""
    columns = (TextColumn("rounds of all runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        begun: list[int] = []

        def rounds(done: int, of: int) -> None:
            if not begun:  # what an earlier call did says nothing of the time left
                begun.append(done)
            bars.update(bar, completed=done - begun[0], total=of - begun[0])

        yield lambda news: console.print(news, highlight=False, markup=False), rounds


def _update(bars: Progress, tasks: dict[Path, TaskID], folder: Path, rounds: int) -> None:
    progress = read_progress(RunFolder(folder))
    finished = progress["phase"] == "finished"
    if folder not in tasks:
        if finished:
            return  # of an earlier call
        tasks[folder] = bars.add_task(f"{folder.parent.name} {folder.name}", total=rounds)
    done = rounds if finished else min(progress["round"], rounds) - (progress["phase"] == "train")
    bars.update(tasks[folder], completed=done, visible=not finished)


def results_table(results: Mapping[str, Any]) -> Table:
    """The test score of each model on each site, mean over the seeds; the worst site and the worst cell are marked."""
    seeds = results["seeds"]
    sites = sorted(seeds[0]["federated"])
    models: dict[str, dict[str, float | None]] = {}
    for trained in sorted(seeds[0]["local"]):
        models[f"only {trained}"] = {s: _mean([r["local"][trained][s] for r in seeds]) for s in sites}
    if seeds[0]["pooled"]:
        models["pooled"] = {s: _mean([r["pooled"][s] for r in seeds]) for s in sites}
    models["federated" + PARTIAL * bool(seeds[0].get("partial"))] = {
        s: _mean([r["federated"][s] for r in seeds]) for s in sites
    }
    for key, name in (("personalised", "each site's own"), ("left_out", "the others alone")):
        if seeds[0].get(key):
            models[name] = {s: _mean([r[key].get(s) for r in seeds]) for s in sites}  # one may have no own model
    return score_table(models, sites, f"Test {results['measure']}, {results['study']}, mean of {len(seeds)} seed(s)")


def score_table(models: Mapping[str, Mapping[str, float | None]], sites: list[str], title: str) -> Table:
    """A row for each model, a column for each site, then the mean and the worst site; a dash for no value."""
    table = Table(title=title)
    table.add_column("trained on")
    for site in sites:
        table.add_column(site, justify="right")
    table.add_column("mean", justify="right")
    table.add_column("worst", justify="right")
    for name, row in models.items():
        worst = min((v for v in row.values() if v is not None), default=None)
        told = {s: value_text(row[s]) for s in sites}
        cells = [f"[yellow]{told[s]}[/]" if worst is not None and row[s] == worst else told[s] for s in sites]
        mean = value_text(_mean(list(row.values())))
        table.add_row(name, *cells, mean, value_text(worst), end_section=name == "pooled")
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
