"""The page that says whether it was worth it for one hospital: after a simulation, and at the hospital itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedclient.comparing import FEWEST_IN_GROUP
from fedclient.worth import FEWEST_PATIENTS, RESAMPLES
from shared_models.figure_text import DASH, MINUS, value_text
from shared_models.scores import NAMES

CALIBRATION = {  # headline measure -> what of a row tells of calibration
    "dice": {},
    "auroc": {"brier": "Brier", "ece": "calibration error"},
    "c_index": {"brier": "Brier"},
    "cpm": {},
    "restored": {},
}


@dataclass(frozen=True, slots=True)
class Page:
    """What the page says.

    Attributes:
        measure: the headline, as a row of scores calls it.
        seeds: training runs of each model.
        row: of the model that the answer is about, as `texts` has it; `shown` is its name.
        rows: one for each model: `name`, `here`, `everywhere`, `calibration`, and what `texts` has.
        groups: of patients, likewise, with `group`.
        others: the other sites by name, where they may be named; none at a hospital.
        repeats: how often everything was trained, where it is more than a number of seeds.
        label: what was scored; not told where it is empty.
        simulated: there are pooled models and means of all sites, which no hospital has.
    """

    site: str
    title: str
    measure: str
    seeds: int
    row: Mapping[str, Any]
    shown: str
    rows: Sequence[Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    others: Sequence[Mapping[str, Any]] = ()
    repeats: str = ""
    label: str = ""
    simulated: bool = False


def worth_page(page: Page) -> str:
    """As HTML, without scripts and with nothing from elsewhere."""
    text: str = (
        environment()
        .get_template("worth.html")
        .render(
            page=page,
            measure=NAMES[page.measure],
            sentence=sentence(page.row, page.shown),
            harmed=page.row["verdict"] == "harmed",
            calibration=CALIBRATION[page.measure],
            per_case=page.measure == "dice",
            resamples=RESAMPLES,
            fewest=FEWEST_PATIENTS,
            least=FEWEST_IN_GROUP,
        )
    )
    return text


def environment(*packages: str) -> Any:
    """Jinja's, with the templates of `packages` beside those of this one."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(package) for package in (*packages, "fedclient")]
    return Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def sentence(row: Mapping[str, Any], shown: str) -> str:
    """For who reads one line only."""
    figures = f"{row['value']} against training alone, 95 % interval {row['interval']}, {row['patients']} patients"
    match row["verdict"]:
        case "gains":
            return f"Yes: with {shown} this hospital's patients are better off ({figures})."
        case "harmed":
            return f"No: with {shown} this hospital's patients are worse off ({figures}). Keep your own model."
        case "too few patients":
            return f"It cannot be told: too few test patients ({row['patients']}) for an interval."
        case "":
            return f"It cannot be told: there is no model trained here alone to compare {shown} with."
    return f"No clear difference with {shown} ({figures})."


def texts(line: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a difference as text; dashes for what there is none of."""
    low, high, value = (line.get(key) for key in ("low", "high", "value"))
    return {
        "value": DASH if value is None else f"{value:+.3f}".replace("-", MINUS),
        "interval": DASH if low is None or high is None else f"{low:+.3f} to {high:+.3f}".replace("-", MINUS),
        "patients": line.get("patients", DASH),
        "worst": value_text(line.get("worst_tenth")),
        "within": _within(line.get("here") or {}),
        "verdict": line.get("verdict", ""),
    }


def _within(ends: Mapping[str, float | None]) -> str:
    low, high = ends.get("low"), ends.get("high")
    return DASH if low is None or high is None else f"{low:.3f} to {high:.3f}"
