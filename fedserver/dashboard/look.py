"""A look at a federation folder: the sections of the dashboard as HTML, each by its name.

Reads what `fedserver status` and the reports read, with connections that cannot write, and nothing else.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedserver import plots, registry, report
from fedserver.checkpoint import RunFolder
from fedserver.dashboard import view
from fedserver.dashboard.book import Book
from fedserver.enrol import Federation, open_federation, signer
from fedserver.overview import overview
from fedserver.state import find_run
from shared_models.dates import date_text
from shared_models.errors import FederationError, StateInvalid
from shared_models.files import read_json
from shared_models.identity import identity_public_key
from shared_models.live import pages

SECTIONS = ("alarms", "summary", "now", "run", "charts", "matrix", "cost", "studies", "sites", "audit", "releases")
KEPT_REPORTS = 32


def environment() -> Environment:
    made = pages.environment("fedserver.dashboard")
    made.globals |= {"shapes": plots.SHAPES}
    return made


def palette() -> str:
    """The colours of sites and of the matrix as CSS; the rest of it is a file."""
    light = "".join(f"--c{i}:{colour};" for i, colour in enumerate(plots.LIGHT))
    dark = "".join(f"--c{i}:{colour};" for i, colour in enumerate(plots.DARK))
    lines = [f":root{{{light}}}", f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"]
    lines += [f".c{i}{{color:var(--c{i})}}" for i in range(len(plots.LIGHT))]
    for place in range(view.HEATS + 1):
        background, ink = plots.heat(place / view.HEATS, 0.0, 1.0)
        lines.append(f".heat-{place}{{background:{background};color:{ink}}}")
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Looker:
    """Looks at one federation again and again; one look at a time."""

    federation: Federation
    book: Book
    pages: Environment = field(default_factory=environment)
    _steady: view.Steady = field(default_factory=dict)
    _reports: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = field(default_factory=dict)

    def sections(self, focus: str | None, now_s: float | None = None) -> dict[str, str]:
        """All sections; those of a run for `focus`, or for the run that a person most likely wants to see.

        Raises:
            FederationError: state that cannot be read.
        """
        now = time.time() if now_s is None else now_s
        facts = overview(self.federation)
        self.book.look()
        self._forget(facts)
        wanted = focus if focus is not None else likely(facts)
        run = next((run for run in facts["runs"] if run["id"] == wanted), None)
        releases, unreadable = self._releases()
        values: dict[str, Any] = {
            "facts": facts,
            "day": date_text,
            "summary": view.summary(facts, self.book, len(releases)),
            "now": [
                view.round_now(each, self._found(each["id"])[0], self._steady, now)
                for each in facts["runs"]
                if each["state"] == "running"
            ],
            "runs": view.runs(facts),
            "focus": wanted if run is not None else None,
            "sites": view.sites(facts, self.book),
            "chain": view.chain(self.book),
            "events": [*self.book.latest][::-1],
            "releases": releases,
            "releases_unreadable": unreadable,
            **self._of_run(run),
        }
        return {name: self.pages.get_template(f"{name}.html").render(values) for name in SECTIONS}

    def knows(self, run: str) -> bool:
        return find_run(self.federation.state, run) is not None

    def _of_run(self, run: Mapping[str, Any] | None) -> dict[str, Any]:
        empty: dict[str, Any] = {
            "run": run, "found": None, "trouble": "", "charts": [], "matrices": [], "cost": None, "style_of": {},
            "seconds": None, "mark": "quiet", "made_report": False,
        }  # fmt: skip
        if run is None:
            return empty
        found, trouble = self._found(run["id"])
        shown = empty | {"trouble": trouble, "mark": view.RUNS[run["state"]]}
        if found is None:
            return shown
        style_of, folder = view.styles_of(found), RunFolder(self.federation.runs / run["id"])
        return shown | {
            "found": found,
            "style_of": style_of,
            "charts": view.charts(found, style_of),
            "seconds": view.seconds_chart(found, style_of),
            "matrices": view.matrices(found),
            "cost": view.cost(folder, found),
            "made_report": (folder.path / "report.html").exists(),
        }

    def _found(self, run_id: str) -> tuple[dict[str, Any] | None, str]:
        """What a report of a run would tell, read anew where its files have changed; or why nobody can."""
        folder = RunFolder(self.federation.runs / run_id)
        stamp = _stamp(folder)
        kept = self._reports.get(run_id)
        if kept is not None and kept[0] == stamp:
            return kept[1], ""
        try:
            found = report.facts(folder)
            made = folder.path / "report.json"  # a comparison stands nowhere else
            found["comparison"] = read_json(made).get("comparison") if made.exists() else None
        except FederationError as error:
            return None, str(error)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return None, f"{folder.path}: what it says of its rounds cannot be read ({type(error).__name__})."
        while len(self._reports) >= KEPT_REPORTS:
            self._reports.pop(next(iter(self._reports)))
        self._reports.pop(run_id, None)
        self._reports[run_id] = stamp, found
        return found, ""

    def _releases(self) -> tuple[list[dict[str, Any]], str]:
        try:
            entries = registry.list_releases(self.federation)
        except (StateInvalid, OSError) as error:
            return [], str(error)
        return [
            {
                "label": entry.label,
                "digest": entry.digest[:16],
                "stage": entry.stage,
                "mark": view.STAGES[entry.stage],
                "run": entry.run,
                "round": entry.round,
                "sites": len(entry.sites),
                "at": entry.history[-1].at,
                "by": entry.history[-1].by,
                "words": entry.history[-1].words,
            }
            for entry in reversed(entries)
        ], ""

    def _forget(self, facts: Mapping[str, Any]) -> None:
        """Moments of rounds that are over."""
        at = {run["id"]: run["progress"].get("round") for run in facts["runs"] if run["state"] == "running"}
        self._steady = {k: v for k, v in self._steady.items() if k[1].rpartition("/")[2] == str(at.get(k[0]))}


def looker(folder: Path) -> Looker:
    """Opens a federation to look at.

    Raises:
        StateInvalid: no federation, or one that is damaged or exposed.
    """
    federation = open_federation(folder)
    return Looker(federation, Book(federation.folder, lambda: identity_public_key(signer(federation).key)))


def likely(facts: Mapping[str, Any]) -> str | None:
    """The run that a person most likely wants to see: the one that is carried out, else the newest that has begun."""
    running = [run["id"] for run in facts["runs"] if run["state"] == "running"]
    begun = [run["id"] for run in facts["runs"] if run["finished_rounds"]]
    newest = [run["id"] for run in facts["runs"]]
    return next(iter([*running[:1], *begun[-1:], *newest[-1:]]), None)


def _stamp(folder: RunFolder) -> tuple[int, ...]:
    """What changes when a run's files do."""
    made: list[int] = []
    for path in (folder.metrics, folder.path / "state.json", folder.path / "report.json", folder.plan):
        try:
            facts = path.stat()
        except OSError:
            made += [0, 0, 0]
        else:
            made += [facts.st_ino, facts.st_size, facts.st_mtime_ns]
    return tuple(made)
