"""The model card: what a model is for, how good it is at the worst site too, and what is not known of it.

After Mitchell et al. 2019 (Model Cards for Model Reporting). Whatever nobody has said or measured stands there as not
known. Scores are told by site; the sites' names only where the study lets them be named (`evaluate.publish_sites`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

from pydantic import Field

from fedserver.report import in_words
from shared_models.calibration import carried
from shared_models.files import write_atomic, write_json
from shared_models.parse import STRICT, parse, read_toml
from shared_models.study import MODALITIES, Study

UNKNOWN = "not known"
NORMAL = 1.96  # of a 95 % interval
Line = Annotated[str, Field(max_length=2000)]


@dataclass(frozen=True, slots=True)
class Words:
    """What a person says of a model in a TOML file; nothing said is told as not known."""

    __pydantic_config__ = STRICT
    intended_use: Line = ""
    limits: Annotated[tuple[Line, ...], Field(max_length=30)] = ()
    populations: Line = ""
    subgroups: Line = ""
    authors: Line = ""
    contact: Line = ""
    copyright: Line = ""
    licence: Annotated[str, Field(max_length=100_000)] = ""
    data_source: Line = ""


def read_words(path: Path | None) -> Words:
    """The words of a TOML file with the keys of `Words`."""
    return Words() if path is None else parse(Words, read_toml(path), str(path))


def card(
    study: Study,
    version: str,
    found: Mapping[str, Any],
    words: Words,
    privacy: Mapping[str, Any] | None,
    data_cards: Mapping[str, Mapping[str, Any]],
    origin: str,
) -> dict[str, Any]:
    """card.json.

    Args:
        found: the facts of the run's report (fedserver/report.py).
        data_cards: site -> its data card, of the sites that have handed theirs in.
    """
    performance = performance_of(study, found)
    populations = words.populations or UNKNOWN
    facets = merged_facets(data_cards.values())
    calibration = calibration_of(performance, carried(study, found.get("calibration", {})), found)
    told: dict[str, Any] = {
        "format": 1,
        "name": study.name,
        "version": version,
        "title": study.title or study.name,
        "origin": origin,
        "intended_use": words.intended_use or UNKNOWN,
        "not_for": "Not for diagnosis or treatment; not a medical device unless whoever uses it makes it one.",
        "what_it_does": in_words(study),
        "limits": [*limits_of(study, found, origin), *words.limits],
        "populations": {"words": populations, "data_cards": len(data_cards), "cases": facets},
        "training": {
            "rounds": found["rounds_done"],
            "sites": len([s for s in found["sites"] if any(s in line["sites"] for line in found["rounds"])]),
        },
        "performance": performance,
        "calibration": calibration,
        "subgroups": words.subgroups or UNKNOWN,
        "privacy": privacy_in_words(privacy),
        "authors": words.authors or UNKNOWN,
        "contact": words.contact or UNKNOWN,
        "licence": words.licence.strip().splitlines()[0] if words.licence.strip() else UNKNOWN,
    }
    told["not_known"] = not_known(told)
    return told


def limits_of(study: Study, found: Mapping[str, Any], origin: str) -> list[str]:
    """What follows from how it was made."""
    if study.table_only:
        seen = f"It sees the columns {', '.join(c.column for c in study.task.covariates)} of a table, and no image."
    else:
        names = f" ({', '.join(study.channels)})" if study.channels else ""
        seen = (
            f"It was trained on {MODALITIES[study.modality]}{names} alone; of any other image its answer means nothing."
        )
    limits = [seen]
    if study.model.spatial_dims == 2 and not study.table_only:
        limits.append("It sees one plane at a time.")
    if origin == "simulation":
        limits.append("It was made in a simulation on one machine: no hospital has approved it or stands behind it.")
    if not found["finished"]:
        limits.append(f"Its run was not finished: {found['rounds_done']} of {found['rounds_planned']} rounds.")
    if not found["test"]:
        limits.append("It was not scored on test patients.")
    if missing := found["not_tested"]:
        limits.append(f"{len(missing)} of the sites did not score it on their test patients.")
    return limits


def performance_of(study: Study, found: Mapping[str, Any]) -> dict[str, Any]:
    """Label -> all cases together, each site, the worst, each with its interval."""
    names = site_names(study, found)
    told: dict[str, Any] = {"measure": found["measure"]["name"], "labels": {}}
    for label, test in found["test"].items():
        rows = {names[site]: _row(row) for site, row in test["sites"].items()}
        told["labels"][label] = {
            "all_cases": _row(test["all_cases"]) if test["all_cases"] else None,
            "sites": dict(sorted(rows.items())),
            "worst": names[test["worst"]] if test["worst"] is not None else None,
            "gap": test["gap"],
        }
    return told


def site_names(study: Study, found: Mapping[str, Any]) -> dict[str, str]:
    """Site -> what the card calls it: its name, or a letter in the order of the first label's score, best first."""
    sites = {site for test in found["test"].values() for site in test["sites"]}
    if study.evaluate.publish_sites:
        return {site: site for site in sites}
    first: Mapping[str, Any] = next(iter(found["test"].values()), {"sites": {}})["sites"]

    def rank(site: str) -> float:
        value = first.get(site, {}).get("value")
        return 1.0 if value is None else -float(value)

    return {site: f"site {_letters(n)}" for n, site in enumerate(sorted(sites, key=lambda s: (rank(s), s)))}


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    first, last = divmod(number, 26)
    return (_letters(first - 1) if first else "") + ascii_uppercase[last]


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("value", "cases", "positives", "events", "ece", "brier") if key in row}
    return kept | {"interval": interval(row)}


def interval(row: Mapping[str, Any]) -> list[float] | None:
    """A 95 % interval of a headline figure from its counts; None where these do not give one.

    Dice: mean over cases, by the normal distribution. AUROC: Hanley & McNeil 1982, equations 1 and 2.
    """
    value, cases = row.get("value"), row.get("cases", 0)
    if value is None or cases < 2:
        return None
    if "deviation" in row and row["deviation"] is not None:
        error = float(row["deviation"]) / sqrt(cases - 1)
    elif row.get("measure") == "auroc" and 0 < row["positives"] < cases:
        shown, not_shown = row["positives"], cases - row["positives"]
        q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
        spread = value * (1 - value) + (shown - 1) * (q1 - value**2) + (not_shown - 1) * (q2 - value**2)
        error = sqrt(max(0.0, spread) / (shown * not_shown))
    else:
        return None
    return [round(max(0.0, value - NORMAL * error), 4), round(min(1.0, value + NORMAL * error), 4)]


def calibration_of(
    performance: Mapping[str, Any], scales: Mapping[str, Any] | None, found: Mapping[str, Any]
) -> dict[str, Any] | str:
    """Label -> expected calibration error and Brier score of all test cases, where the task has them; and where the
    release divides its logits by a temperature, that, and the error with it."""
    whole = {label: part["all_cases"] for label, part in performance["labels"].items() if part["all_cases"]}
    told = {
        label: {key: row[key] for key in ("ece", "brier") if row.get(key) is not None} for label, row in whole.items()
    }
    for label, by in (scales or {}).get("temperature", {}).items():
        row = {"temperature": by, "ece_after": found["calibration"][label].get("ece_after")}
        told[label] = {**told.get(label, {}), **{key: value for key, value in row.items() if value is not None}}
    told = {label: row for label, row in told.items() if row}
    return told or UNKNOWN


def merged_facets(cards: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Table -> cell -> cases over all data cards; withheld cells add nothing, so that sums are at least what stands."""
    sums: dict[str, dict[str, int]] = {}
    for one in cards:
        for table, cells in one.get("tables", {}).items():
            for cell, count in cells.items():
                if isinstance(count, int):
                    sums.setdefault(str(table), {})[str(cell)] = sums.get(str(table), {}).get(str(cell), 0) + count
    return sums


def privacy_in_words(privacy: Mapping[str, Any] | None) -> str:
    if privacy is not None:
        return str(privacy["words"])
    return (
        "Not differentially private: what one patient adds to these weights is not bounded. Images and labels stayed "
        "at their hospitals; updates went to the coordinator."
    )


def not_known(told: Mapping[str, Any]) -> list[str]:
    """What is not known, by the words of the card."""
    words = {
        "intended_use": "what it is meant to be used for",
        "subgroups": "how well it does in groups of patients (age, sex, scanner)",
        "calibration": "how far its probabilities can be taken at their word",
        "authors": "who answers for it",
        "licence": "under which licence it may be used",
    }
    missing = [what for key, what in words.items() if told[key] == UNKNOWN]
    if told["populations"]["words"] == UNKNOWN and not told["populations"]["cases"]:
        missing.append("which patients it was trained and tested on")
    if not told["performance"]["labels"]:
        missing.append("how good it is on test patients")
    return missing


# ---- as text ----


def markdown(told: Mapping[str, Any]) -> str:
    """card.md."""
    lines = [f"# {_plain(told['title'])}, version {told['version']}", "", f"**{told['not_for']}**", ""]
    for title, key in (("Intended use", "intended_use"), ("What it does", "what_it_does")):
        lines += [f"## {title}", "", _plain(str(told[key])), ""]
    lines += ["## Limits", "", *(f"- {_plain(limit)}" for limit in told["limits"]), ""]
    lines += [
        "## Not known",
        "",
        *(f"- {what}" for what in told["not_known"] or ["nothing of what this card asks"]),
        "",
    ]
    lines += ["## Patients", "", _plain(str(told["populations"]["words"])), ""]
    for table, cells in sorted(told["populations"]["cases"].items()):
        counted = ", ".join(f"{_plain(cell)}: {count}" for cell, count in sorted(cells.items()))
        lines += [f"- {_plain(table)}: {counted}"]
    lines += ["", "## How good it is", ""]
    for label, part in told["performance"]["labels"].items():
        lines += [f"| {_plain(label)} | {told['performance']['measure']} | 95 % | cases |", "|---|---|---|---|"]
        rows = ([("all cases", part["all_cases"])] if part["all_cases"] else []) + list(part["sites"].items())
        for name, row in rows:
            mark = " (worst)" if name == part["worst"] else ""
            lines += [f"| {_plain(name)}{mark} | {value_words(row)} | {interval_words(row)} | {row.get('cases', '')} |"]
        lines += [""]
    if not told["performance"]["labels"]:
        lines += ["Not tested.", ""]
    lines += ["## Calibration", "", calibration_words(told["calibration"]), ""]
    for title, key in (("Groups of patients", "subgroups"), ("Privacy", "privacy"), ("Authors", "authors"),
                       ("Contact", "contact"), ("Licence", "licence")):  # fmt: skip
        lines += [f"## {title}", "", _plain(str(told[key])), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that no reader of Markdown takes for mark-up."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|!" else letter for letter in text.replace("\n", " "))


def value_words(row: Mapping[str, Any]) -> str:
    return UNKNOWN if row.get("value") is None else f"{row['value']:.3f}"


def interval_words(row: Mapping[str, Any]) -> str:
    return UNKNOWN if row.get("interval") is None else f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"


def calibration_words(calibration: Mapping[str, Any] | str) -> str:
    if isinstance(calibration, str):
        return calibration
    names = {
        "ece": "expected calibration error", "brier": "Brier score",
        "temperature": "calibrated by a temperature of", "ece_after": "calibration error then",
    }  # fmt: skip
    return "; ".join(
        f"{label}: {', '.join(f'{names[key]} {value:.3f}' for key, value in row.items())}"
        for label, row in calibration.items()
    )


def page(told: Mapping[str, Any]) -> str:
    """card.html: no scripts, no links, every value escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedserver"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"value": value_words, "interval": interval_words, "calibration": calibration_words}
    return environment.get_template("card.html").render(card=told)


def write_card(folder: Path, told: Mapping[str, Any]) -> None:
    write_json(folder / "card.json", told)
    write_atomic(folder / "card.md", markdown(told).encode())
    write_atomic(folder / "card.html", page(told).encode())
