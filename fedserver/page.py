"""`report.html` from the facts of a report: one page without scripts or links, the charts drawn inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log2, nan
from statistics import fmean
from typing import Any

from fedserver import plots
from fedserver.comparison import ALL, points_text, spread_of, spread_text
from shared_models.detection_counts import RATES
from shared_models.figure_text import DASH, duration_text, size_text, value_text

PARTS = {  # a seat's last state -> words, and how high its cell stands (colour alone would not do for everyone)
    "counted": ("counted", 20),
    "late": ("late", 13),
    "refused": ("refused", 8),
    "rejected": ("answer not accepted", 8),
    "failed": ("failed", 8),
    "lost": ("lost", 4),
    "away": ("away", 4),
    "not asked": ("not asked", 1),
}
LONGEST_REASON = 240
COLUMNS = {  # headline measure -> figures beside it in the table of the final test, where the sites tell them
    "dice": {"deviation": "deviation", "nsd": "surface agreement", "hd95_mm": "95 % distance, mm",
             "volume_error": "volume error", "lesion_f1": "lesion F1"},
    "auroc": {"auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity",
              "balanced_accuracy": "balanced accuracy", "brier": "Brier", "ece": "calibration error"},
    "c_index": {"brier": "Brier", "events": "events"},
    "cpm": {"at_1": "at 1 false a scan", "sensitivity": "of all marks", "false_per_scan": "false a scan",
            "off_mm": "diameter off, mm", "lesions": "lesions"},
    "restored": {"error": "error left"},
}  # fmt: skip
TOLD = {
    "auroc": "AUROC is the share of pairs of a case that shows the class and one that does not which the score orders "
    "rightly: 1 is perfect, 0.5 is chance. Sensitivity and specificity are at the study's threshold; Brier and "
    "calibration error (15 cells) are better the smaller they are.",
    "c_index": "The C-index is the share of comparable pairs of patients of one site of whom the one with the earlier "
    "event was given the higher risk: 1 is perfect, 0.5 is chance. The Brier score is the mean over the intervals, "
    "weighted for censoring, and better the smaller it is.",
    "cpm": "CPM is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks a scan by LUNA16's rules: a mark "
    "within a lesion's radius finds it, further marks in it and those in irrelevant findings count nothing, and scans "
    "without lesions count in the false marks.",
    "restored": "The share restored says how much less the hidden parts of images are off than if the mean of what is "
    "seen were filled in: 1 is perfect, 0 is no better than that.",
}
MOST_SPANS = 6  # kinds of absence that are spelt out for one site


@dataclass(frozen=True, slots=True)
class Cell:
    """Rounds in a row with the same part: `at` and `wide` count rounds."""

    at: int
    wide: int
    part: str
    high: int
    words: str


@dataclass(frozen=True, slots=True)
class Bar:
    at: int
    high: float
    words: str


def render(found: Mapping[str, Any], loss: plots.Series, scores: Mapping[str, plots.Series]) -> str:
    """The page; every value that comes from a study or a site is escaped, and nothing in it is ever run or fetched."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedserver"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "value": value_text,
        "duration": duration_text,
        "figure": lambda value: str(value) if isinstance(value, int) else value_text(value),
        "points": lambda figures: points_text(spread_of(figures)),
        "size": size_text,
        "spread": lambda figures: spread_text(spread_of(figures)),
    }
    together = [ALL] if found["secure"] else []
    style_of = plots.styles([*found["sites"], *together, *{s for series in (loss, *scores.values()) for s in series}])
    measure = found["measure"]["name"]
    charts = [plots.line_chart("Training loss", "mean loss of the round", loss, style_of, (0.0, 0.0))]
    for label, series in scores.items():
        title, unit = f"Validation {measure}: {label}", f"mean {measure}" if measure == "Dice" else measure
        charts.append(plots.line_chart(title, unit, series, style_of, (0.9, 1.0)))
    return environment.get_template("report.html").render(
        found=found,
        style_of=style_of,
        shapes=plots.SHAPES,
        light=plots.LIGHT,
        dark=plots.DARK,
        charts=[chart for chart in charts if chart.lines],
        part_of={site: parts_in_words(found["rounds"], site) for site in found["sites"]},
        cells_of={site: cells(found["rounds"], site) for site in found["sites"]},
        work_of={site: work(found["rounds"], site) for site in found["sites"]},
        parts=PARTS,
        parts_seen=[
            p for p in PARTS if any(_part(line, s)[0] == p for line in found["rounds"] for s in found["sites"])
        ],
        bars_of={label: histograms(test["sites"]) for label, test in found["test"].items()},
        measure=measure,
        told=TOLD.get(found["measure"]["key"], ""),
        shown_of={label: final_charts(label, _charted(test), style_of) for label, test in found["test"].items()},
        columns_of={label: _columns(found["measure"]["key"], test) for label, test in found["test"].items()},
        heat=heat_map(found["comparison"]["matrix"] if found["comparison"] else []),
    )


def final_charts(
    label: str, rows: Mapping[str, Mapping[str, Any]], style_of: Mapping[str, plots.Style]
) -> list[tuple[plots.Chart, str]]:
    """What the final test of a label draws, each with the words of its lower axis: FROC curves of a detection,
    reliability curves of a classification; none where all sites withhold them."""
    froc = {
        site: [(log2(rate), found, f"{site}, {rate:g} false a scan: {found:.3f}") for rate, found in row["froc"]]
        for site, row in rows.items()
        if row.get("froc")
    }
    told = {
        site: [
            (cell["score"], cell["positives"] / cell["cases"], f"{site}: {cell['positives']} of {cell['cases']} cases")
            for cell in row["reliability"]
            if cell is not None
        ]
        for site, row in rows.items()
        if any(row.get("reliability") or ())
    }
    charts: list[tuple[plots.Chart, str]] = []
    if froc:
        ticks = [(log2(rate), words) for rate, words in zip(RATES, ("1/8", "1/4", "1/2", *"1248"), strict=True)]
        drawn = plots.xy_chart(f"FROC: {label}", "sensitivity", froc, style_of, ticks)
        charts.append((drawn, "false marks a scan"))
    if told:
        shares = [(share, f"{share:g}") for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
        drawn = plots.xy_chart(f"Reliability: {label}", "share of cases that show it", told, style_of, shares)
        charts.append((drawn, "mean score of the cell"))
    return charts


def _charted(test: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Whose curves there are: the sites', or of a run through secure sums those of all cases together."""
    return test["sites"] or ({ALL: test["all_cases"]} if test["all_cases"] else {})


def _columns(measure: str, test: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [*test["sites"].values(), *filter(None, [test["all_cases"]])]
    return [(key, title) for key, title in COLUMNS[measure].items() if all(key in row for row in rows)]


def _part(line: Mapping[str, Any], site: str) -> tuple[str, str]:
    """A site's part in a round, and the reason for it."""
    found = line["sites"].get(site)
    return (found["part"], found["reason"]) if found else ("not asked", "")


def cells(rounds: Sequence[Mapping[str, Any]], site: str) -> list[Cell]:
    """The strip of a site: neighbouring rounds of one part are one cell, so that a thousand rounds stay a few cells."""
    strip: list[Cell] = []
    for part, together in groupby(enumerate(rounds), key=lambda pair: _part(pair[1], site)[0]):
        lines = list(together)
        words, high = PARTS.get(part, (part, 4))
        numbers = ranges([line["round"] for _, line in lines])
        strip.append(Cell(lines[0][0], len(lines), part, high, f"{words}: {numbers}"))
    return strip


def parts_in_words(rounds: Sequence[Mapping[str, Any]], site: str) -> list[str]:
    """How often a site was counted, and for each kind of absence in which rounds and why (the latest reason)."""
    counted, absent, asked = 0, dict[tuple[str, str], tuple[list[int], str]](), 0
    late: list[int] = []
    for line in rounds:
        part, reason = _part(line, site)
        asked += part != "not asked"
        counted += part == "counted"
        if part not in ("counted", "not asked"):
            kind = (part, reason.split(": ", 1)[0] if part == "rejected" else reason)
            absent[kind] = ([*absent.get(kind, ([], ""))[0], line["round"]], reason)
        updates = line["sites"][site]["updates"] if site in line["sites"] else []
        late += [u["round"] for u in updates if u["round"] != line["round"]]
    said = [f"counted in {counted} of {asked} rounds"] if asked else ["was not asked in any round"]
    for (part, _), (numbers, reason) in list(absent.items())[:MOST_SPANS]:
        why = f" ({reason[:LONGEST_REASON]})" if reason else ""
        said.append(f"{PARTS.get(part, (part, 0))[0]} in {ranges(numbers)}{why}")
    if len(absent) > MOST_SPANS:
        said.append(f"and {len(absent) - MOST_SPANS} more kinds of absence, see report.json")
    return said + ([f"its late work of {ranges(late)} was counted afterwards"] if late else [])


def work(rounds: Sequence[Mapping[str, Any]], site: str) -> dict[str, Any] | None:
    """What a site did for its updates: examples and device of the last one, mean seconds."""
    updates = [u for line in rounds if site in line["sites"] for u in line["sites"][site]["updates"]]
    if not updates or updates[-1].get("summed"):  # of which nothing is known but that it is in a sum
        return None
    return {**updates[-1], "seconds": fmean(u["seconds"] for u in updates)}


def histograms(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Bar]]:
    """Site -> bars of its histogram of Dice, high as shares of its cases on one scale; none where it is withheld."""
    shares = {s: [n / row["cases"] for n in row.get("histogram", ())] for s, row in rows.items() if row["cases"]}
    most = max((share for line in shares.values() for share in line), default=1.0)
    bars = {}
    for site, line in shares.items():
        wide, counts = 1 / max(len(line), 1), rows[site].get("histogram", ())
        bars[site] = [
            Bar(
                i,
                round(50 * share / most, 1),
                f"Dice {i * wide:.2f} to {(i + 1) * wide:.2f}: {counts[i]} of {rows[site]['cases']} cases",
            )
            for i, share in enumerate(line)
            if share
        ]
    return bars


def heat_map(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The matrix with background and ink of each cell, and the ends of the scale."""
    values = [[nan if d["mean"] is None else d["mean"] for d in row["values"].values()] for row in rows]
    low, high = plots.bounds(values)

    def cell(row: Mapping[str, Any], site: str, value: float) -> dict[str, Any]:
        background, ink = plots.heat(value, low, high)
        return {"value": value, "background": background, "ink": ink, "own": row["trained"] == site}

    drawn = [
        {"model": row["model"], "cells": [cell(row, s, v) for s, v in zip(row["values"], line, strict=True)]}
        for row, line in zip(rows, values, strict=True)
    ]
    return {"rows": drawn, "low": low, "high": high}


def ranges(numbers: Sequence[int]) -> str:
    """'round 3' or 'rounds 3, 5-7'."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    words = ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in spans)
    return f"round{'s' if len(numbers) > 1 else ''} {words}"
