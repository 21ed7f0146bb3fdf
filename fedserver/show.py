"""What the command line shows of runs: a live view while one goes on, and tables of how they stand and end.

Everything is drawn from a run folder's files or from values that are handed in; text of sites is never read as markup,
nor its control characters sent to a terminal.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedserver.checkpoint import RunFolder, read_progress
from fedserver.comparison import ALL, points_text, spread_of, spread_text
from shared_models.dates import date_text
from shared_models.figure_text import duration_text, value_text
from shared_models.parse import printable
from shared_models.scores import NAMES, value_in

PHASES = {
    "gathering": "waiting for sites",
    "statistics": "counting for the plan",
    "train": "training",
    "evaluate": "final test",
    "paused": "paused, too few sites have answered",
    "finished": "finished",
}
SUM_PHASES = {
    "advertise": "secure sum: keys",
    "share": "secure sum: shares of keys",
    "mask": "secure sum: masked updates",
    "confirm": "secure sum: who is in it",
    "unmask": "secure sum: the masks come off",
}
PHASES |= SUM_PHASES
STATES = {"asked": "working", "pending": "not now", "rejected": "answer not accepted"}  # others are words already
COLOURS = {
    "counted": "green",
    "working": "cyan",
    "late": "yellow",
    "lost": "yellow",
    "away": "yellow",
    "not now": "yellow",
}
UNDER_WAY = ("gathering", "train", "paused", *SUM_PHASES)
WAITED_FOR = ("asked", "away", "lost", "pending")
LEFT_OUT = ("refused", "rejected", "failed", "late", "revoked")
STALE_S = 5.0  # progress.json older than this, as one begins to follow, is of a process that has gone
QUIET_S = 30.0  # without a change of progress.json, before the live view says so


@dataclass(frozen=True, slots=True)
class View:
    """A look at a run: its progress, the lines of rounds that were finished since the last look, and scores by site."""

    progress: Mapping[str, Any]
    finished: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, str] = field(default_factory=dict)
    left_s: float | None = None
    ended: str | None = None


Tell = Callable[[View], None]


def follow(
    run: RunFolder,
    ended: Callable[[], str | None],
    json_lines: bool,
    console: Console | None = None,
    poll_s: float = 0.25,
) -> str:
    """Shows a run until `ended` returns a word (finished, paused, failed, stopped), which is returned.

    On a terminal a bar and a row per site; elsewhere a plain line per change; with `json_lines` a JSON object per
    change. A folder that is not there yet is waited for.
    """
    console = console or Console()
    if json_lines:
        teller: AbstractContextManager[Tell] = nullcontext(_json_lines(run.id, console))
    else:
        teller = _live(console) if console.is_terminal else nullcontext(_plain_lines(console))
    looks = watch(run, ended, poll_s)
    with teller as tell:
        while True:
            view = next(looks)
            tell(view)
            if view.ended is not None:
                return view.ended


def watch(run: RunFolder, ended: Callable[[], str | None], poll_s: float) -> Iterator[View]:
    """A look every `poll_s`; one that says how the run ended was taken after that."""
    tail, scores = Tail(run.metrics), dict[str, str]()
    number, since, opened_at = None, time.monotonic(), time.time()
    while True:
        word = ended()
        progress = read_progress(run)
        if word is None and progress.get("updated_at", 0.0) < opened_at - STALE_S:
            progress = {}
        lines = tail.read()
        for line in lines:
            if not line.get("final"):
                scores |= {_site_of(key): _score_words(part["scores"]) for key, part in _scored(line).items()}
        if progress.get("round") != number:
            number, since = progress.get("round"), time.monotonic()
        left_s = progress.get("left_s") if progress.get("phase") in UNDER_WAY else None
        left_s = None if left_s is None else max(0.0, left_s - (time.monotonic() - since))
        yield View(progress, lines, dict(scores), left_s, word)
        time.sleep(poll_s)


@dataclass(slots=True)
class Tail:
    """The lines that a growing metrics.jsonl has gained; one that was replaced (a resumed run) is read anew."""

    path: Path
    offset: int = 0
    inode: int = 0
    seen: set[int] = field(default_factory=set)  # hashes of lines

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            self.offset, self.inode = (self.offset if inode == self.inode else 0), inode
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        fresh = [line for line in whole.splitlines() if hash(line) not in self.seen]
        self.seen |= {hash(line) for line in fresh}
        return [json.loads(line) for line in fresh]


def _site_of(key: str) -> str:
    """A late update stands in metrics.jsonl as `SITE (round N)`."""
    return key.split(" (", 1)[0]


def _scored(line: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    parts = {ALL: line["together"]} if "together" in line else line["sites"]
    return {key: part for key, part in parts.items() if part["scores"]}


def _score_words(scores: Mapping[str, Mapping[str, Any]]) -> str:
    if len(scores) == 1:
        return value_text(value_in(next(iter(scores.values()))))
    return ", ".join(f"{label} {value_text(value_in(row))}" for label, row in scores.items())


def _measure_of(line: Mapping[str, Any]) -> str:
    """The headline measure of a line that holds scores."""
    rows = [row for part in _scored(line).values() for row in part["scores"].values()]
    return NAMES[rows[0].get("measure", "dice")] if rows else "score"


def state_of(seat: Mapping[str, Any]) -> str:
    return STATES.get(seat["state"], str(seat["state"]))


def waits_for(progress: Mapping[str, Any]) -> dict[str, str]:
    """The sites that a run waits for, and why."""
    sites = progress.get("sites", {}) if progress.get("phase") != "finished" else {}
    return {site: seat["reason"] for site, seat in sorted(sites.items()) if seat["state"] in WAITED_FOR}


def left_out(progress: Mapping[str, Any]) -> dict[str, str]:
    """The sites that the phase under way has done without, and why."""
    seats = progress.get("sites", {}) if progress.get("phase") != "finished" else {}
    return {s: f"{state_of(seat)}{_why(seat)}" for s, seat in sorted(seats.items()) if seat["state"] in LEFT_OUT}


def _json_lines(run: str, console: Console) -> Tell:
    """One JSON object per change: `round` and `test` as in metrics.jsonl, `progress`, and at last `ended`."""
    before: Any = None

    def put(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, "run": run, **more}), file=console.file, flush=True)

    def tell(view: View) -> None:
        nonlocal before
        for line in view.finished:
            kept = ("round", "seconds", "scored_round", "sites", "together", "federation", "left_out")
            put("test" if line.get("final") else "round", **{key: line[key] for key in kept if key in line})
        now = {key: view.progress.get(key) for key in ("phase", "round", "rounds", "quorum", "sites")}
        if view.progress and now != before:
            put("progress", **now, left_s=view.left_s, waits_for=waits_for(view.progress))
            before = now
        if view.ended is not None:
            put("ended", state=view.ended, waits_for=waits_for(view.progress))

    return tell


def _plain_lines(console: Console) -> Tell:
    """One line per change."""
    before: dict[str, str] = {}
    standing: tuple[Any, Any] = (None, None)

    def say(words: str) -> None:
        console.print(Text(printable(words)), soft_wrap=True)

    def tell(view: View) -> None:
        nonlocal before, standing
        progress = view.progress
        where = f"round {progress.get('round')} of {progress.get('rounds')}"
        for line in view.finished:
            say(_finished_words(line))
        if progress and (progress["round"], progress["phase"]) != standing:
            before = before if progress["round"] == standing[0] else {}
            standing = (progress["round"], progress["phase"])
            left = f", about {duration_text(view.left_s)} left" if view.left_s else ""
            say(f"{where}: {PHASES.get(progress['phase'], progress['phase'])}{left}")
        now = {site: f"{state_of(seat)}{_why(seat)}" for site, seat in sorted(progress.get("sites", {}).items())}
        for site, words in now.items():
            if before.get(site) != words:
                say(f"{where}: {site} {words}")
        before = before | now
        if view.ended is not None:
            waits = "; ".join(f"{site} ({why})" for site, why in waits_for(progress).items())
            say(view.ended + (f", waits for {waits}" if waits and view.ended != "finished" else ""))

    return tell


def _why(seat: Mapping[str, Any]) -> str:
    """The reason of a state that does not speak for itself, in brackets."""
    return f" ({seat['reason']})" if seat["reason"] and seat["state"] not in ("counted", "asked") else ""


def _finished_words(line: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{key} {_score_words(part['scores'])}" for key, part in sorted(_scored(line).items()))
    if line.get("final"):
        return f"test {_measure_of(line)}: {scores or 'none'}"
    together = line.get("together")
    count = len(line["sites"] if together is None else together["sites"])
    updates = f"{count} update{'s' if count != 1 else ''} {'counted' if together is None else 'in a secure sum'}"
    words = f"round {line['round']}: done in {duration_text(line['seconds'])}, {updates}"
    return words + (f"; validation {_measure_of(line)} {scores}" if scores else "")


@contextmanager
def _live(console: Console) -> Iterator[Tell]:
    changed, stamp = time.monotonic(), None

    def tell(view: View) -> None:
        nonlocal changed, stamp
        if view.progress.get("updated_at") != stamp:
            changed, stamp = time.monotonic(), view.progress.get("updated_at")
        live.update(frame(view, time.monotonic() - changed), refresh=view.ended is not None)

    with Live(console=console, refresh_per_second=4) as live:
        yield tell


def frame(view: View, quiet_s: float = 0.0) -> RenderableType:
    """The live view: one bar over rounds, and a row per site with its state, reason and last validation score."""
    progress = view.progress
    if not progress:
        return Text(printable(view.ended or "waiting for the run to begin"))
    rounds, number = int(progress["rounds"]), int(progress["round"])
    phase = progress["phase"]
    done = rounds if phase in ("evaluate", "finished") else number - 1
    head = Table.grid(padding=(0, 2))
    words = PHASES.get(phase, phase) if view.ended is None else view.ended
    left = f"about {duration_text(view.left_s)} left" if view.left_s else ""
    if view.left_s is None and view.ended is None and phase in UNDER_WAY:
        left = "time left is known after the first round"
    if quiet_s > QUIET_S and view.ended is None:
        left += f", no news for {duration_text(quiet_s)}"
    bar = ProgressBar(total=rounds, completed=done, width=30)
    head.add_row(Text(f"round {number} of {rounds}"), bar, Text(printable(words)), Text(left, style="dim"))
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("site", "state", "why", "validation"):
        table.add_column(column, overflow="fold")
    for site, seat in sorted(progress["sites"].items()):
        state = Text(printable(state_of(seat)), style=COLOURS.get(state_of(seat), "red"))
        row = [Text(printable(words)) for words in (site, _why(seat)[2:-1], view.scores.get(site, ""))]
        table.add_row(row[0], state, row[1], row[2])
    return Group(head, table)


# Tables


def run_table(found: Mapping[str, Any]) -> Table:
    """The outcome of a run from what its report.json holds: each site's test score, alone and pooled beside it.

    Alone is a site's own model on its own patients, and its mean over the other sites; the worst site is marked.
    """
    label, compared = found["labels"][0], found["comparison"]
    table = Table(
        box=SIMPLE,
        title=Text(printable(f"Test {found['measure']['name']}: {label}")),
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("site")
    if compared:
        _fill_compared(table, compared)
        return table
    for column in ("federated", "deviation", "cases"):
        table.add_column(column, justify="right")
    test = found["test"].get(label, {"sites": {}, "worst": None, "mean_over_sites": None})
    for site, row in test["sites"].items():
        deviation = value_text(row.get("deviation") if row["cases"] > 1 else None)
        mark = site == test["worst"] and len(test["sites"]) > 1
        table.add_row(_site(site, mark), value_text(row["value"]), deviation, str(row["cases"]))
    for site, seat in sorted(found["not_tested"].items()):
        table.add_row(
            _site(site, False), value_text(None), Text(printable(f"{seat['state']} {seat['reason']}".strip())), ""
        )
    table.add_section()
    if found.get("secure") and (whole := test.get("all_cases")):
        deviation = value_text(whole.get("deviation") if whole["cases"] > 1 else None)
        table.add_row(ALL, value_text(whole["value"]), deviation, str(whole["cases"]))
    else:
        table.add_row("mean over sites", value_text(test["mean_over_sites"]), "", "")
    return table


def _fill_compared(table: Table, compared: Mapping[str, Any]) -> None:
    columns = {"own": "alone", "elsewhere": "alone, at others", "pooled": "pooled", "federated": "federated"}
    columns |= {"gain_points": "gain, points"}
    if not compared["has_local"]:
        columns = {k: v for k, v in columns.items() if k in ("pooled", "federated")}
    if not compared["has_pooled"]:
        columns.pop("pooled")
    for title in columns.values():
        table.add_column(title, justify="right")

    def cells(row: Mapping[str, Any]) -> list[str]:
        spreads = {key: spread_of(row[key]) for key in columns}
        return [points_text(s) if key == "gain_points" else spread_text(s) for key, s in spreads.items()]

    worst = (compared["worst_federated"] or {}).get("site")
    for site, row in compared["sites"].items():
        table.add_row(_site(site, site == worst and len(compared["sites"]) > 1), *cells(row))
    table.add_section()
    table.add_row("mean over sites", *cells(compared["mean"]))


def _site(name: str, worst: bool) -> Text:
    return Text.assemble(printable(name), ("  worst", "bold red") if worst else "")


def status_table(facts: Mapping[str, Any]) -> RenderableType:
    """How a federation stands, from the facts that `fedserver status --json` prints.

    Each run has its round, whom it waits for and why; each site whether it is online, or why not, as far as the facts
    say (`online` and `reason` of a site).
    """
    runs = Table(box=SIMPLE, title=Text("Runs"), title_justify="left", pad_edge=False)
    for column in ("run", "study", "state", "round", "waits for"):
        runs.add_column(column, overflow="fold")
    for run in facts["runs"]:
        progress, waits = progress_of(run), standing(run, facts)
        state = "paused" if progress.get("phase") == "paused" else run["state"]
        where = "?" if run["rounds"] is None else f"{progress.get('round', run['finished_rounds'])} of {run['rounds']}"
        row = [
            *(printable(words) for words in (run["id"], run["study"], state, where)),
            "\n".join(map(printable, waits)),
        ]
        runs.add_row(*map(Text, row))
    sites = Table(box=SIMPLE, title=Text("Sites"), title_justify="left", pad_edge=False)
    for column in ("site", "state", "online", "certificate ends", "why"):
        sites.add_column(column, overflow="fold")
    for site in facts["sites"]:
        online = site.get("online")
        here = "" if online is None else "yes" if online else "no"
        why = why_not_online(site)
        ends = site.get("certificate_expires_at")
        until = "" if ends is None or site["state"] != "active" else date_text(ends)
        row = [printable(words) for words in (site["name"], site["state"], here, until, "" if online else why)]
        sites.add_row(*map(Text, row))
    troubles = [*facts.get("alarms", []), *facts.get("troubles", [])]
    if last := facts.get("last_refused"):
        where = f"{last['site']}, run {last['run']} round {last['round']}, {date_text(last['time'])}"
        troubles.append(f"Last refused or left out: {where}: {last['why']}")
    if facts.get("served") is False and (facts["runs"] or facts["sites"]):
        troubles.append("Nothing serves this federation: start `fedserver serve`, and runs go on by themselves.")
    return Group(
        *(Text(printable(words), style="yellow") for words in troubles),
        runs if facts["runs"] else Text("No run yet: `fedserver run STUDY` starts one.\n"),
        sites if facts["sites"] else Text("No site yet: `fedserver invite SITE` invites one."),
    )


def progress_of(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The round of a run that is under way; {} of one that waits for its turn or has ended."""
    return run["progress"] if run["state"] in ("running", "paused") else {}


def standing(run: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Whom a run waits for and goes without, and why it is not running, in words; `facts` as of `status_table`."""
    progress = progress_of(run)
    words = [f"{site}: {why}" for site, why in waits_for(progress).items()]
    words += [f"without {site}: {why}" for site, why in left_out(progress).items()]
    return words + turn(run, facts)


def turn(run: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Why a run is not running, or soon will not be."""
    words = [run["message"]] if run["message"] else []
    if run.get("queue"):
        words.append(f"waits for its turn, {run['queue']}. in the queue" if _is_busy(facts) else "begins soon")
    if run.get("pausing") is not None:
        words.append(f"will pause after round {run['pausing']}" if run["pausing"] else "is about to pause")
    return words


def why_not_online(site: Mapping[str, Any]) -> str:
    return "was invited and has not joined" if site["state"] == "invited" else site.get("reason") or ""


def _is_busy(facts: Mapping[str, Any]) -> bool:
    return any(run["state"] == "running" for run in facts["runs"])
