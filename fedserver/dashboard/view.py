"""What the dashboard shows, as plain values for its templates: from what `fedserver status` and a report tell."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from fedserver import plots
from fedserver.checkpoint import RunFolder, schema_on_disk
from fedserver.comparison import ALL
from fedserver.dashboard.book import Book
from fedserver.report import curves, drawn, updates_told
from fedserver.show import PHASES, QUIET_S, UNDER_WAY, WAITED_FOR, progress_of, state_of, turn, why_not_online
from shared_models.errors import FederationError
from shared_models.figure_text import value_text
from shared_models.scores import value_in
from shared_models.weights import size_bytes

MOST_POINTS, MOST_ROWS = 500, 60  # rounds that a chart and its table show, the latest
HEATS = 20
SEATS = {  # state of a seat -> how it is marked; the word itself is always there
    "counted": "good", "asked": "work", "away": "look", "lost": "look", "pending": "look", "late": "look",
    "refused": "bad", "rejected": "bad", "failed": "bad", "revoked": "bad",
}  # fmt: skip
RUNS = {"queued": "quiet", "running": "work", "paused": "look", "stopped": "look", "failed": "bad", "finished": "good"}
STAGES = {"candidate": "look", "approved": "good", "retired": "quiet"}
FIRST = {"work": 0, "look": 1, "bad": 2, "good": 3}  # in the table of a round: whom it waits for comes first
Steady = dict[tuple[str, str], float]  # moments that were told: they do not waver by what their files round off


def summary(facts: Mapping[str, Any], book: Book, releases: int) -> dict[str, Any]:
    """The figures at the top."""
    joined = [site for site in facts["sites"] if site["state"] == "active"]
    running = [run for run in facts["runs"] if run["state"] == "running"]
    return {
        "served": facts["served"],
        "online": sum(site["online"] for site in joined),
        "joined": len(joined),
        "running": [run["id"] for run in running],
        "waiting": sum(run["queue"] is not None for run in facts["runs"]),
        "resting": sum(run["state"] in ("paused", "stopped", "failed") for run in facts["runs"]),
        "chain": chain(book),
        "releases": releases,
    }


def chain(book: Book) -> dict[str, Any]:
    """How the audit log stands, in words."""
    found = book.chain
    if found.bad is not None:
        return {"mark": "bad", "short": f"line {found.bad[0]} is bad", "words": f"Line {found.bad[0]} {found.bad[1]}."}
    if found.lines < found.known:
        return {
            "mark": "work",
            "short": "being verified",
            "words": f"{found.lines:,} of {found.known:,} lines are verified so far, none of them is bad.",
        }
    words = f"All {found.known:,} lines are whole, in order and signed." if found.known else "Nothing is written yet."
    return {"mark": "good", "short": f"{found.known:,} lines whole", "words": words}


def round_now(run: Mapping[str, Any], found: Mapping[str, Any] | None, steady: Steady, now_s: float) -> dict[str, Any]:
    """The round of a run that is under way: its phase, whom it waits for, since when and till when."""
    progress = progress_of(run)
    phase, number, rounds = progress.get("phase"), progress.get("round"), run["rounds"]
    latest = last_scores(found) if found is not None else {}
    seats = [_seat(site, seat, latest.get(site, "")) for site, seat in sorted(progress.get("sites", {}).items())]
    seats = seats if phase != "finished" else []
    waits = [seat for seat in seats if seat["waited"]]
    updated = progress.get("updated_at")
    words = PHASES.get(str(phase), str(phase)) if phase else "is about to begin"
    until = None
    if updated is not None and phase in (*UNDER_WAY, "evaluate", "statistics") and progress.get("deadline_in_s"):
        where = f"{phase}/{number}"
        until = _steadied(steady, (run["id"], where), updated + progress["deadline_in_s"])
    return {
        "id": run["id"],
        "study": run["study"],
        "phase": words,
        "paused": phase == "paused",
        "round": number,
        "rounds": rounds,
        "done": rounds if phase in ("evaluate", "finished") else run["finished_rounds"] or 0,
        "quorum": progress.get("quorum"),
        "answered": sum(seat["state"] == "counted" for seat in seats),
        "until": until,
        "ends": _end_of(run, progress, steady),
        "quiet": updated if updated is not None and now_s - updated > QUIET_S else None,
        "seats": sorted(seats, key=lambda seat: (FIRST[seat["mark"]], seat["site"])),
        "waits": waits,
        "more": turn(run, {"runs": []}),
        "sentence": _sentence(run["id"], number, rounds, words, waits),
    }


def _seat(site: str, seat: Mapping[str, Any], score: str) -> dict[str, Any]:
    return {
        "site": site,
        "state": seat["state"],
        "words": state_of(seat),
        "mark": SEATS.get(seat["state"], "look"),
        "why": seat["reason"] if seat["state"] != "counted" else "",
        "since": seat.get("since"),
        "attempt": seat["attempt"],
        "waited": seat["state"] in WAITED_FOR,
        "score": score,
    }


def _sentence(run: str, number: int | None, rounds: int | None, words: str, waits: Sequence[Mapping[str, Any]]) -> str:
    """What is said aloud when it changes."""
    where = f"{run}: round {number} of {rounds}, {words}" if number is not None else f"{run}: {words}"
    return where + (f"; waits for {', '.join(seat['site'] for seat in waits)}." if waits else ".")


def _end_of(run: Mapping[str, Any], progress: Mapping[str, Any], steady: Steady) -> float | None:
    """When the run is done, as its rounds have gone so far; told once a round."""
    if progress.get("left_s") is None or progress.get("phase") not in UNDER_WAY:
        return None
    key = (run["id"], f"left/{progress['round']}")
    return steady.setdefault(key, progress["updated_at"] + progress["left_s"])


def _steadied(steady: Steady, key: tuple[str, str], at: float) -> float:
    if abs(steady.get(key, 0.0) - at) > 2.0:
        steady[key] = at
    return steady[key]


def runs(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All runs: those under way, then the queue in its order, then those at rest, then the ended, the newest first."""
    order = {"running": 0, "queued": 1, "paused": 2, "stopped": 2, "failed": 2, "finished": 3}
    newest = {run["id"]: -place for place, run in enumerate(facts["runs"])}
    listed = sorted(facts["runs"], key=lambda run: (order[run["state"]], run["queue"] or 0, newest[run["id"]]))
    return [
        {
            "id": run["id"],
            "study": run["study"],
            "state": run["state"],
            "mark": RUNS[run["state"]],
            "done": run["finished_rounds"],
            "rounds": run["rounds"],
            "place": run["queue"],
            "words": [*turn(run, facts)],
        }
        for run in listed
    ]


def sites(facts: Mapping[str, Any], book: Book) -> list[dict[str, Any]]:
    """Every site with its state, whether it is heard, and the last word of its work."""
    listed = []
    for site in facts["sites"]:
        active = site["state"] == "active"
        words = ("online" if site["online"] else "away") if active else site["state"]
        mark = {"online": "good", "away": "look", "invited": "quiet", "revoked": "bad"}[words]
        why = "" if site["online"] or (active and site["seen_at"] is not None) else why_not_online(site)
        listed.append(
            {
                "name": site["name"],
                "words": words,
                "mark": mark,
                "why": why,
                "seen": site["seen_at"],
                "last": book.last_words.get(site["name"]),
                "ends": site["certificate_expires_at"] if active else None,
            }
        )
    return listed


def last_scores(found: Mapping[str, Any]) -> dict[str, str]:
    """Each site's latest validation score of the first label, in words."""
    label, latest = found["labels"][0], dict[str, str]()
    for site, update in updates_told(found["rounds"]):
        if label in update["validation"]:
            latest[site] = value_text(value_in(update["validation"][label]))
    return latest


def charts(found: Mapping[str, Any], style_of: Mapping[str, plots.Style]) -> list[dict[str, Any]]:
    """Loss, validation scores and seconds by round: what is drawn, and the same as a table."""
    loss, scores = curves(found)
    measure = found["measure"]["name"]
    made = [_chart("Training loss", "mean loss of the round", loss, style_of, zero=True)]
    made += [_chart(f"Validation {measure}: {label}", measure, of, style_of) for label, of in scores.items()]
    return [chart for chart in made if chart["rounds"]]


def seconds_chart(found: Mapping[str, Any], style_of: Mapping[str, plots.Style]) -> dict[str, Any]:
    """Seconds of training at each site, by round."""
    by_site: dict[str, list[tuple[int, float | None]]] = {}
    for site, update in updates_told(found["rounds"]):
        by_site.setdefault(site, []).append((update["round"], update["seconds"]))
    return _chart("Seconds of training", "seconds", by_site, style_of, digits=1, zero=True)


def _chart(
    title: str,
    unit: str,
    series: plots.Series,
    style_of: Mapping[str, plots.Style],
    digits: int = 3,
    zero: bool = False,
) -> dict[str, Any]:
    """`zero`: the axis begins there."""
    rounds = sorted({number for points in series.values() for number, _ in points})[-MOST_POINTS:]
    values = {site: dict(points) for site, points in series.items()}
    lines: list[dict[str, Any]] = [
        {
            "site": site,
            "colour": style_of[site].colour,
            "dash": [int(n) for n in style_of[site].dash.split()],
            "values": [values[site].get(number) for number in rounds],
        }
        for site in sorted(values)
    ]
    last = {line["site"]: next((v for v in reversed(line["values"]) if v is not None), None) for line in lines}
    told = ", ".join(f"{site} {_figure(value, digits)}" for site, value in last.items())
    return {
        "title": title,
        "unit": unit,
        "digits": digits,
        "zero": zero,
        "rounds": rounds,
        "lines": lines,
        "rows": [
            (number, [_figure(values[line["site"]].get(number), digits) for line in lines])
            for number in reversed(rounds[-MOST_ROWS:])
        ],
        "cut": len(rounds) > MOST_ROWS,
        "said": f"Line chart by round. Latest: {told}.",
    }


def _figure(value: float | None, digits: int) -> str:
    return value_text(value) if value is None or digits == 3 else f"{value:,.{digits}f}"


def matrices(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sites x models on test patients, a table for each label; none before the final test."""
    measure, made = found["measure"]["name"], []
    if found["comparison"]:
        rows = {row["model"]: {s: d["mean"] for s, d in row["values"].items()} for row in found["comparison"]["matrix"]}
        return [_matrix(f"Test {measure}: {found['labels'][0]}", rows)]
    away = {
        site: f"{state_of(seat)}: {seat['reason']}".removesuffix(": ") for site, seat in found["not_tested"].items()
    }
    for label, test in found["test"].items():
        models = {"federated": {site: row["value"] for site, row in test["sites"].items()}}
        if test["personalised"]:
            models["each site's own"] = {site: row["value"] for site, row in test["personalised"].items()}
        if found["secure"] and test["all_cases"]:
            models["federated"] = {ALL: test["all_cases"]["value"]}
        cases = {site: row["cases"] for site, row in test["sites"].items()}
        if any(value is not None for value in models["federated"].values()):
            made.append(_matrix(f"Test {measure}: {label}", models, cases, away, test["worst"]))
    return made


def _matrix(
    title: str,
    models: Mapping[str, Mapping[str, float | None]],
    cases: Mapping[str, int] | None = None,
    away: Mapping[str, str] | None = None,
    worst: str | None = None,
) -> dict[str, Any]:
    """`away`: sites that were not tested, and why."""
    cases, away = cases or {}, away or {}
    names = sorted({*away, *(site for values in models.values() for site in values)})
    low, high = plots.bounds([[nan if v is None else v for v in values.values()] for values in models.values()])

    def cell(value: float | None) -> dict[str, Any]:
        place = None if value is None else round(HEATS * (value - low) / (high - low)) if high > low else HEATS
        return {"value": value_text(value), "heat": place}

    return {
        "title": title,
        "models": list(models),
        "rows": [
            {
                "site": site,
                "cases": cases.get(site),
                "worst": site == worst and len(names) > 1,
                "note": away.get(site, ""),
                "cells": [cell(values.get(site)) for values in models.values()],
            }
            for site in names
        ],
        "low": value_text(low),
        "high": value_text(high),
    }


def cost(run: RunFolder, found: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes and seconds, by round and by site; a site's bytes are the tensors of its counted updates and their models.

    Every update of a run weighs the same, as does every model.
    """
    rounds, by_site = found["rounds"], dict[str, dict[str, float]]()
    down = _model_bytes(run, found)
    for line in rounds:
        counted = [(site, update) for site, part in line["sites"].items() for update in part["updates"]]
        for site, update in counted:
            row = by_site.setdefault(site, {"rounds": 0, "up": 0, "down": 0, "seconds": 0, "timed": 0, "last": 0})
            row["rounds"] += 1
            row["up"] += line["bytes_up"] / len(counted)
            row["down"] += down
            if "seconds" in update:
                row["seconds"] += update["seconds"]
                row["timed"] += 1
                row["last"] = update["seconds"]
    shown = rounds[-MOST_ROWS:][::-1]
    names = [site for site in sorted(by_site) if by_site[site]["timed"]]
    return {
        "sites": [
            {
                "site": site,
                "rounds": row["rounds"],
                "mean": row["seconds"] / row["timed"] if row["timed"] else None,
                "last": row["last"] if row["timed"] else None,
                "up": row["up"],
                "down": row["down"],
            }
            for site, row in sorted(by_site.items())
        ],
        "names": names,
        "rounds": [
            {
                "round": line["round"],
                "seconds": line["seconds"],
                "down": line["bytes_down"],
                "up": line["bytes_up"],
                "sites": [_seconds(line, site) for site in names],
            }
            for line in shown
        ],
        "cut": len(rounds) > MOST_ROWS,
        "totals": found["totals"],
    }


def _model_bytes(run: RunFolder, found: Mapping[str, Any]) -> int:
    try:
        return size_bytes(schema_on_disk(run, found["rounds_done"])) if found["rounds"] else 0
    except (FederationError, OSError):
        return 0


def _seconds(line: Mapping[str, Any], site: str) -> float | None:
    updates = line["sites"].get(site, {"updates": []})["updates"]
    return sum(update.get("seconds", 0.0) for update in updates) if updates else None


def styles_of(found: Mapping[str, Any]) -> dict[str, plots.Style]:
    """One style for a site in all charts of a run, as in its report."""
    return plots.styles(drawn(found))
