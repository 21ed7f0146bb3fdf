"""What `fedsim compare` writes: one page for the researcher, one for each site, tables and figures."""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from fedclient.worth_page import CALIBRATION, Page, environment, texts, worth_page
from shared_models.figure_text import value_text
from shared_models.files import write_atomic, write_json
from shared_models.scores import NAMES
from simulations.compare import tidy
from simulations.compare_figures import figures_of
from simulations.compare_tables import (
    HEADINGS,
    UNSEEN,
    WORDS,
    Line,
    Summary,
    cells_of,
    is_partial,
    latex,
    markdown,
    repeats_text,
    summary,
    unseen,
    unseen_cells,
    unseen_words,
    verdict_of,
)

CAPTIONS = {
    "curves": "Validation score by round, mean over sites and seeds; the band is the range over seeds.",
    "matrix": "Test score of every model at every site, mean over seeds.",
    "sites": "Test scores by site; a dot is a seed, a box spans the quartiles of the seeds.",
    "cost": "Test score against bytes sent and received by all sites, and against their training time on this machine.",
}
MODELS = ("federated", "personalised")  # that may harm a site
FEWEST_SITES = 3  # with two, who knows the mean and oneself knows the other


def write_all(results: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Writes every file of a comparison; what each holds -> its path."""
    written = {"numbers": out / "results.json", "tidy": out / "results.csv"}
    write_json(written["numbers"], {**results, "summary": {n: numbers(s) for n, s in results["studies"].items()}})
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(tidy(results))
    write_atomic(written["tidy"], stream.getvalue().encode())
    pages = []
    for name, study in results["studies"].items():
        figures = figures_of(study)
        for kind, png in figures.items():
            write_atomic(out / name / f"{kind}.png", png)
        found = summary(study)
        pages.append(_study_page(name, study, found, figures))
        for site in study["sites"]:
            page = out / "sites" / name / f"{site}.html"
            write_atomic(page, site_page(site, study, found, results["seeds"], repeats_text(results)).encode())
    for kind, path, text in (
        ("table", out / "table.md", markdown(results)),
        ("latex", out / "table.tex", latex(results)),
        ("report", out / "report.html", _page(results, pages)),
    ):
        write_atomic(path, text.encode())
        written[kind] = path
    written["sites"] = out / "sites"
    return {kind: str(path) for kind, path in written.items()}


def numbers(study: Mapping[str, Any]) -> dict[str, Any]:
    """A study's summary for results.json; null for what is not known."""
    found = summary(study)

    def plain(line: Line) -> dict[str, Any]:
        spreads = {k: getattr(line, k) for k in ("validation", "test", "worst")}
        return {
            "kind": line.kind,
            "setting": line.setting,
            "partial": line.partial,
            **{k: {"mean": _finite(s.mean), "deviation": _finite(s.deviation)} for k, s in spreads.items()},
            **{k: _finite(getattr(line, k)) for k in ("margin", "error", "p", "p_holm")},
        }

    return {
        "lines": [plain(line) for line in found.lines],
        "reference": found.reference.name,
        "chosen": None if found.chosen is None else plain(found.chosen),
        "test": found.test,
        "unseen": [
            {"site": of.site, "setting": of.setting, "partial": of.partial,
             **{k: _finite(getattr(of, k).mean) for k in ("without", "others", "margin")}, "best": _finite(of.best)}
            for of in unseen(study)
        ],
        "harmed": harmed(study),
        "untold": untold(study),
    }  # fmt: skip


def harmed(study: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each (site, model) whose whole interval against the site's own model lies below 0."""
    return [
        {"site": site, "kind": line["kind"], "setting": line["setting"]}
        for site, lines in study["worth"].items()
        for line in lines
        if line.get("verdict") == "harmed" and _usable(study, line)
    ]


def untold(study: Mapping[str, Any]) -> list[str]:
    """Sites where nobody can tell whether some model harms them: too few test patients, or no model of its own."""
    return [
        site
        for site, lines in study["worth"].items()
        if any(line.get("verdict") in (None, "too few patients") and _usable(study, line) for line in lines)
    ]


def _usable(study: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether a line is of a model of the federation that a site could use."""
    return line["kind"] in MODELS and not is_partial(study, line["kind"], line["setting"])


def _page(results: Mapping[str, Any], pages: Sequence[Mapping[str, Any]]) -> str:
    changes = {name: json.dumps(of) if of else "none: as the study says" for name, of in results["settings"].items()}
    text: str = (
        environment("simulations")
        .get_template("compare.html")
        .render(
            studies=pages,
            settings=changes,
            repeats=repeats_text(results),
            headings=HEADINGS,
            unseen=UNSEEN,
            captions=CAPTIONS,
        )
    )
    return text


def _study_page(name: str, study: Mapping[str, Any], found: Summary, figures: Mapping[str, bytes]) -> dict[str, Any]:
    shown = found.chosen or found.reference
    return {
        "name": name,
        "title": study["title"],
        "verdict": verdict_of(found, NAMES[study["measure"]]),
        "lines": [cells_of(line) for line in found.lines],
        "test": found.test,
        "unseen": [unseen_cells(of) for of in unseen(study)],
        "unseen_words": unseen_words(study),
        "shown": shown.name,
        "worth": [
            {"site": site, **_row(study, site, shown.kind, shown.setting), "own": value_text(own_score(study, site)),
             "shown": value_text(mean_at(study, site, shown.kind, shown.setting)),
             "pooled": value_text(mean_at(study, site, "pooled", ""))}
            for site in study["sites"]
        ],
        "harmed": [f"{each['site']} by {WORDS[each['kind']].format(each['setting'])}" for each in harmed(study)],
        "untold": untold(study),
        "judged": sum(
            _usable(study, line) and line.get("verdict") not in (None, "too few patients")
            for lines in study["worth"].values()
            for line in lines
        ),
        "figures": {kind: base64.b64encode(png).decode() for kind, png in figures.items()},
    }  # fmt: skip


def site_page(site: str, study: Mapping[str, Any], found: Summary, seeds: int, repeats: str = "") -> str:
    """The page of one site: itself and the aggregate; the others by name only where the study publishes sites."""
    shown = found.chosen or found.reference
    row = _row(study, site, shown.kind, shown.setting)
    rows = []
    for line in found.lines:
        if line.kind == "left out" or line.partial:
            continue
        rows.append(
            {
                "name": "alone, this hospital's own" if line.kind == "local" else line.name,
                "here": value_text(mean_at(study, site, line.kind, line.setting)),
                "everywhere": value_text(line.test.mean if len(study["sites"]) >= FEWEST_SITES else None),
                "calibration": {
                    figure: value_text(mean_at(study, site, line.kind, line.setting, figure))
                    for figure in CALIBRATION[study["measure"]]
                },
                **_row(study, site, line.kind, line.setting),
            }
        )
    groups = [
        {**texts(each), "group": each["group"], "name": WORDS[each["kind"]].format(each["setting"])}
        for each in study["subgroups"][site]
        if (each["kind"], each["setting"]) in {(shown.kind, shown.setting), ("federated", shown.setting)}
        and _usable(study, each)
    ]
    others = [
        {
            "site": other,
            "own": value_text(own_score(study, other)),
            "shown": value_text(mean_at(study, other, shown.kind, shown.setting)),
        }
        for other in study["sites"]
    ]
    published = others if study["publish_sites"] else []
    each = seeds // study.get("folds", 1)  # runs that a patient is tested in
    page = Page(
        site, study["title"], study["measure"], each, row, shown.name, rows, groups, published, repeats, simulated=True
    )
    return worth_page(page)


def _row(study: Mapping[str, Any], site: str, kind: str, setting: str) -> dict[str, Any]:
    for line in study["worth"][site]:
        if (line["kind"], line["setting"]) == (kind, setting):
            return texts(line)
    return texts({})


def mean_at(study: Mapping[str, Any], site: str, kind: str, setting: str, figure: str = "") -> float:
    """Mean over seeds of a figure of the test rows (the headline) of one model at one site; NaN without it."""
    name = figure or study["measure"]
    found = [
        row["row"].get(name)
        for row in study["rows"]
        if (row["site"], row["kind"], row["setting"], row["split"], row["label"])
        == (site, kind, setting, "test", study["label"])
        and row["trained"] in ("", site)
    ]
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else nan


def own_score(study: Mapping[str, Any], site: str) -> float:
    return mean_at(study, site, "local", "")


def _finite(value: float) -> float | None:
    return round(value, 8) if isfinite(value) else None
