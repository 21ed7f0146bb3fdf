"""What federation was worth: the federated model beside pooled training and every site alone, over one seed or more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any

from shared_models.figure_text import DASH, MINUS, value_text
from shared_models.scores import Score, value_of

ALL = "all sites together"  # in the place of a site's name, where nothing is known of any by itself


@dataclass(frozen=True, slots=True)
class Comparison:
    """The models of one seed on the test patients of every site, for the first label of the study.

    Attributes:
        local: site that trained alone -> site that was tested -> score; empty where nobody trained alone.
        pooled: site that was tested -> score of the model trained on all images together; empty where there is none.
        federated: site that was tested -> score of the federated model.
        personalised: site -> score of its own model of the federation; empty where the study gives it none.
        left_out: site -> score of the federation of all the others; empty where none was trained.
        partial: layers of the federated model stay at the sites, and it is scored with those that they began with: a
            site is judged by its own.
    """

    local: Mapping[str, Mapping[str, Score]]
    pooled: Mapping[str, Score]
    federated: Mapping[str, Score]
    personalised: Mapping[str, Score] = field(default_factory=dict)
    left_out: Mapping[str, Score] = field(default_factory=dict)
    partial: bool = False

    @property
    def usable(self) -> Mapping[str, Score]:
        """Site -> score of the model of the federation that it would use."""
        return self.personalised if self.partial else self.federated


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean over seeds, NaN without a value, and the standard deviation (n - 1), NaN with fewer than two."""

    mean: float = nan
    deviation: float = nan


@dataclass(frozen=True, slots=True)
class SiteResult:
    """How one site fares, by the headline measure of the study's task (mean test Dice, AUROC).

    Attributes:
        own: of the model that it trained alone, on its own patients.
        elsewhere: of the model that it trained alone, mean over the other sites.
        pooled, federated: of those models, on its own patients.
        gain_points: federated less own, in points (hundredths); personalised less own where the former is `partial`.
        personalised: of the model that the federation gives this site for its own, on its own patients.
        left_out: of the federation of all other sites, on this one's patients.
    """

    site: str
    own: Spread
    elsewhere: Spread
    pooled: Spread
    federated: Spread
    gain_points: Spread
    personalised: Spread = Spread()
    left_out: Spread = Spread()
    partial: bool = False

    @property
    def usable(self) -> Spread:
        return self.personalised if self.partial else self.federated


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One row of the site x model matrix; `trained` is the site of a local model, else None."""

    name: str
    trained: str | None
    values: Mapping[str, Spread]


FIGURES = ("own", "elsewhere", "pooled", "federated", "gain_points", "personalised", "left_out")
NAMES = {"personalised": "each site's own", "left_out": "the others alone"}
PARTIAL = ", shared layers alone"  # what the coordinator has: no model that anybody would use


def spread(values: Iterable[float]) -> Spread:
    known = [v for v in values if isfinite(v)]
    return Spread(fmean(known) if known else nan, stdev(known) if len(known) > 1 else nan)


def sites_of(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    return tuple(sorted({s for c in comparisons for s in (*c.federated, *c.pooled, *c.local)}))


def _value(scores: Mapping[str, Score], site: str) -> float:
    return value_of(scores.get(site))


def _elsewhere(scores: Mapping[str, Score], site: str) -> float:
    return spread(_value(scores, s) for s in scores if s != site).mean


def results(comparisons: Sequence[Comparison]) -> tuple[SiteResult, ...]:
    """One result for each site, each figure taken per seed and then over the seeds."""

    def of(site: str) -> SiteResult:
        own = [_value(c.local.get(site, {}), site) for c in comparisons]
        usable = [_value(c.usable, site) for c in comparisons]
        return SiteResult(
            site,
            own=spread(own),
            elsewhere=spread(_elsewhere(c.local.get(site, {}), site) for c in comparisons),
            pooled=spread(_value(c.pooled, site) for c in comparisons),
            federated=spread(_value(c.federated, site) for c in comparisons),
            gain_points=spread(100 * (f - o) for f, o in zip(usable, own, strict=True)),
            personalised=spread(_value(c.personalised, site) for c in comparisons),
            left_out=spread(_value(c.left_out, site) for c in comparisons),
            partial=any(c.partial for c in comparisons),
        )

    return tuple(of(site) for site in sites_of(comparisons))


def mean_over_sites(comparisons: Sequence[Comparison]) -> SiteResult:
    """Every site weighs the same; the spread is that of the seeds' means."""
    by_seed = [results([c]) for c in comparisons]

    def over(name: str) -> Spread:
        return spread(spread(getattr(r, name).mean for r in rows).mean for rows in by_seed)

    partial = any(c.partial for c in comparisons)
    return SiteResult("mean over sites", partial=partial, **{name: over(name) for name in FIGURES})


def matrix(comparisons: Sequence[Comparison]) -> tuple[ModelRow, ...]:
    """Every model on every site's test patients: a row for each site's own model, then pooled, then federated."""
    sites = sites_of(comparisons)
    trained = sorted({s for c in comparisons for s in c.local})
    rows = [
        ModelRow(f"{m} alone", m, {s: spread(_value(c.local.get(m, {}), s) for c in comparisons) for s in sites})
        for m in trained
    ]
    for name in ("pooled", "federated", "personalised", "left_out"):
        if any(getattr(c, name) for c in comparisons):
            row = {s: spread(_value(getattr(c, name), s) for c in comparisons) for s in sites}
            partial = name == "federated" and any(c.partial for c in comparisons)
            rows.append(ModelRow(NAMES.get(name, name) + PARTIAL * partial, None, row))
    return tuple(rows)


def spread_text(spread: Spread) -> str:
    return value_text(spread.mean) + (f" ± {spread.deviation:.3f}" if isfinite(spread.deviation) else "")


def points_text(spread: Spread) -> str:
    if not isfinite(spread.mean):
        return DASH
    sign = "+" if round(spread.mean, 1) > 0 else MINUS if round(spread.mean, 1) < 0 else ""
    more = f" ± {spread.deviation:.1f}" if isfinite(spread.deviation) else ""
    return f"{sign}{abs(spread.mean):.1f}{more}"


def verdict(result: SiteResult, seeds: int, measure: str) -> str:
    """One sentence on whether federation helped a site; over several seeds a gain within its deviation is no gain."""
    gain, site = result.gain_points, result.site
    if not isfinite(gain.mean):
        return f"{site}: cannot be compared, a test score is missing."
    model = "its own model of the federation" if result.partial else "the federated model"
    figures = f"{value_text(result.usable.mean)} with {model}, {value_text(result.own.mean)} alone"
    change = f"({points_text(gain)} {measure} points{f', {seeds} seeds' if seeds > 1 else ''})"
    if round(gain.mean, 1) == 0:
        return f"Federation made no difference to {site}: {figures} {change}."
    if isfinite(gain.deviation) and abs(gain.mean) <= gain.deviation:
        return f"Federation made no clear difference to {site}: {figures} {change}."
    return f"Federation {'helped' if gain.mean > 0 else 'did not help'} {site}: {figures} {change}."


def as_json(comparisons: Sequence[Comparison], measure: str) -> dict[str, Any]:
    """All figures for report.json; NaN as null."""
    rows, means = results(comparisons), mean_over_sites(comparisons)
    known = [r for r in rows if isfinite(r.federated.mean) and not r.partial]
    worst = min(known, key=lambda r: r.federated.mean, default=None)
    cells = [(m.values[s].mean, m.trained, s) for m in matrix(comparisons) if m.trained is not None for s in m.values]
    low = min((c for c in cells if isfinite(c[0])), default=None)
    return {
        "seeds": len(comparisons),
        "has_local": any(c.local for c in comparisons),
        "has_pooled": any(c.pooled for c in comparisons),
        "has_personalised": any(c.personalised for c in comparisons),
        "has_left_out": any(c.left_out for c in comparisons),
        "sites": {r.site: {**_row(r), "verdict": verdict(r, len(comparisons), measure)} for r in rows},
        "mean": _row(means),
        "worst_federated": worst and {"site": worst.site, "value": _number(worst.federated.mean)},
        "worst_local": low and {"trained": low[1], "tested": low[2], "value": _number(low[0])},
        "matrix": [
            {"model": m.name, "trained": m.trained, "values": {s: _spread(d) for s, d in m.values.items()}}
            for m in matrix(comparisons)
        ],
        "by_seed": [by_seed(c) for c in comparisons],
    }


def by_seed(comparison: Comparison) -> dict[str, Any]:
    """The scores of one seed: {"local": {site: {site: value}}, "pooled": {site: value}, "federated": {site: value}}.

    And, where there are such models, "personalised" and "left_out": {site: value}.
    """

    def flat(scores: Mapping[str, Score]) -> dict[str, float | None]:
        return {s: _number(d.value) for s, d in sorted(scores.items())}

    return {
        "local": {trained: flat(scores) for trained, scores in sorted(comparison.local.items())},
        "pooled": flat(comparison.pooled),
        "federated": flat(comparison.federated),
        **{name: flat(getattr(comparison, name)) for name in NAMES if getattr(comparison, name)},
    }


def _row(result: SiteResult) -> dict[str, Any]:
    return {name: _spread(getattr(result, name)) for name in FIGURES}


def _spread(spread: Spread) -> dict[str, float | None]:
    return {"mean": _number(spread.mean), "deviation": _number(spread.deviation)}


def spread_of(figures: Mapping[str, float | None]) -> Spread:
    """The spread that report.json holds as `figures`."""
    mean, deviation = figures["mean"], figures["deviation"]
    return Spread(nan if mean is None else mean, nan if deviation is None else deviation)


def _number(value: float) -> float | None:
    return round(value, 6) if isfinite(value) else None
