"""What a comparison comes to: means and deviations over seeds, paired tests, the setting that validation chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt
from statistics import fmean
from typing import Any

from fedclient.data.cases import ALL
from fedserver.comparison import PARTIAL, ModelRow, Spread, spread, spread_text
from shared_models.figure_text import DASH, value_text
from shared_models.scores import NAMES
from simulations.compare import headline

BASELINES = ("local", "pooled")
WORDS = {
    "local": "each site alone, at home",
    "pooled": "pooled",
    "federated": "{}",
    "personalised": "{}, each site's own",
    "left out": "{}, without the tested site",
}
TEST = (
    "Two-sided paired t-test over seeds on the mean over sites of the test score, against {}; n = {}; adjusted "
    "for the number of settings after Holm (1979)."
)
TEST_OF_FOLDS = (
    "Two-sided paired t-test over folds on the mean over sites of the test score, against {}; n = {}, with the "
    "variance of Nadeau and Bengio (2003), as folds share patients to train on; adjusted for the number of settings "
    "after Holm (1979)."
)
Key = tuple[str, str]  # kind, setting


@dataclass(frozen=True, slots=True)
class Line:
    """One kind of model over the seeds; every figure is the mean over sites but `worst`, the lowest site.

    Attributes:
        test_by_seed: NaN for a seed in which a site has no score.
        margin, error: test less that of the reference, mean over seeds and its standard error.
        p, p_holm: of the paired test; NaN for the reference, the baselines, and fewer than two seeds.
        partial: layers of the model stay at the sites, and it is scored with those that they began with.
    """

    kind: str
    setting: str
    validation: Spread
    test: Spread
    worst: Spread
    test_by_seed: tuple[float, ...]
    margin: float = nan
    error: float = nan
    p: float = nan
    p_holm: float = nan
    partial: bool = False

    @property
    def name(self) -> str:
        return named(self.kind, self.setting, self.partial)


def named(kind: str, setting: str, partial: bool) -> str:
    return WORDS[kind].format(setting) + PARTIAL * partial


def is_partial(study: Mapping[str, Any], kind: str, setting: str) -> bool:
    """Whether layers of a federation's model stayed at the sites (FedBN, FedPer, FedRep)."""
    return kind in ("federated", "left out") and setting in study.get("partial", ())


@dataclass(frozen=True, slots=True)
class Summary:
    """A study's lines, the baselines first.

    Attributes:
        reference: what the others are tested against.
        chosen: the line with the highest validation score; None where no site validates.
        by_fold: the test score of the setting that each fold's own validation chooses; None without folds.
    """

    lines: tuple[Line, ...]
    reference: Line
    chosen: Line | None
    test: str
    by_fold: Spread | None = None


def summary(study: Mapping[str, Any]) -> Summary:
    """The tables of one study of `compare`'s results."""
    seeds, sites = sorted({row["seed"] for row in study["rows"]}), study["sites"]
    cells = values(study)
    keys = list(dict.fromkeys((row["kind"], row["setting"]) for row in study["rows"]))
    keys = sorted(keys, key=lambda key: BASELINES.index(key[0]) if key[0] in BASELINES else len(BASELINES))

    def at(key: Key, split: str, seed: int) -> list[float]:
        return [cells.get((*key, split, seed, site, site if key[0] in ("local", "left out") else ""), nan)
                for site in sites]  # fmt: skip

    lines = []
    for key in keys:
        test = [_mean(at(key, "test", seed)) for seed in seeds]
        validation = spread(_mean(at(key, "val", seed)) for seed in seeds)
        worst = spread(min(at(key, "test", seed)) if isfinite(_mean(at(key, "test", seed))) else nan for seed in seeds)
        lines.append(Line(*key, validation, spread(test), worst, tuple(test), partial=is_partial(study, *key)))
    whole = whole_of(lines)
    federated = [line for line in whole if line.kind == "federated"] or whole
    federated = federated or [line for line in lines if line.kind == "federated"]
    plain = [line for name in ("fedavg", "study") for line in federated if line.setting == name]
    reference = (plain or federated)[0]
    folds = study.get("folds", 1)
    lines = _tested(lines, reference, folds)
    candidates = [line for line in whole_of(lines) if isfinite(line.validation.mean)]
    chosen = max(candidates, key=lambda line: line.validation.mean, default=None)
    pairs = len(_by_fold(reference.test_by_seed, folds))
    words = (TEST if folds == 1 else TEST_OF_FOLDS).format(reference.name, pairs)
    if missing := sum(not isfinite(value) for value in reference.test_by_seed):
        words += f" {missing} of {len(seeds)} seeds count nowhere: a site had no score in them."
    by_fold = None
    if folds > 1 and chosen is not None:
        validated = {
            (line.kind, line.setting): [_mean(at((line.kind, line.setting), "val", seed)) for seed in seeds]
            for line in candidates
        }
        best = [max(candidates, key=lambda x: _low(validated[x.kind, x.setting][n])) for n in range(len(seeds))]
        by_fold = spread(line.test_by_seed[n] for n, line in enumerate(best))
    return Summary(tuple(lines), reference, chosen, words, by_fold)


def _low(value: float) -> float:
    return value if isfinite(value) else -inf


def _by_fold(values: Sequence[float], folds: int) -> list[float]:
    """What counts as one observation of a test: a seed, or the mean of all seeds of a fold; what is unknown is none."""
    if folds == 1:
        return [value for value in values if isfinite(value)]
    parts = [[value for value in values[fold::folds] if isfinite(value)] for fold in range(folds)]
    return [fmean(part) for part in parts if part]


def whole_of(lines: Sequence[Line]) -> list[Line]:
    """The lines of settings: models that a site could use."""
    return [line for line in lines if line.kind in ("federated", "personalised") and not line.partial]


def values(study: Mapping[str, Any]) -> dict[tuple[str, str, str, int, str, str], float]:
    """(kind, setting, split, seed, site, trained) -> headline score of the first answer."""
    return {
        (row["kind"], row["setting"], row["split"], row["seed"], row["site"], row["trained"]): headline(row)
        for row in study["rows"]
        if row["label"] == study["label"]
    }


def _mean(of: Sequence[float]) -> float:
    """NaN where one is: a mean over fewer sites cannot be compared."""
    return fmean(of) if of else nan


def _tested(lines: Sequence[Line], reference: Line, folds: int) -> list[Line]:
    from scipy.stats import t as student  # half a second

    found: dict[Key, tuple[float, float, float]] = {}
    for line in whole_of(lines):
        if line == reference:
            continue
        gains = _by_fold([a - b for a, b in zip(line.test_by_seed, reference.test_by_seed, strict=True)], folds)
        mean, deviation, n = spread(gains).mean, spread(gains).deviation, len(gains)
        error = deviation * sqrt(1 / n + (1 / (folds - 1) if folds > 1 else 0)) if n > 1 else nan
        p = float(2 * student.sf(abs(mean) / error, n - 1)) if n > 1 and error > 0 else nan
        found[line.kind, line.setting] = mean, error, p
    adjusted = holm({key: p for key, (_, _, p) in found.items()})
    keys = [(x.kind, x.setting) for x in lines]
    return [
        replace(x, margin=found[key][0], error=found[key][1], p=found[key][2], p_holm=adjusted[key])
        if key in found
        else x
        for x, key in zip(lines, keys, strict=True)
    ]


def holm(of: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values (Holm 1979); NaN stays and does not count."""
    known = sorted((p, key) for key, p in of.items() if isfinite(p))
    found, highest = dict.fromkeys(of, nan), 0.0
    for rank, (p, key) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        found[key] = highest
    return found


@dataclass(frozen=True, slots=True)
class Unseen:
    """How models do at a site that none of them was trained at, on all of its patients.

    Attributes:
        without: the federation of all the others.
        others: the mean of the models that the others trained alone.
        best: of these the highest mean over seeds.
        margin: `without` less `others`, seed by seed.
        partial: layers stay at the sites, and `without` is scored with those that they began with.
    """

    site: str
    setting: str
    partial: bool
    without: Spread
    others: Spread
    best: float
    margin: Spread


def unseen(study: Mapping[str, Any]) -> list[Unseen]:
    """Setting by setting, site by site, where sites were left out."""
    cells, seeds, split = values(study), sorted({row["seed"] for row in study["rows"]}), unseen_split(study)
    settings = dict.fromkeys(row["setting"] for row in study["rows"] if row["kind"] == "left out")
    found = []
    for setting in settings:
        for site in study["sites"]:
            alone = {
                other: [cells.get(("local", "", split, seed, site, other), nan) for seed in seeds]
                for other in study["sites"]
                if other != site
            }
            alone = {other: of for other, of in alone.items() if any(map(isfinite, of))}  # one without labels has none
            means = [_mean(of) for of in zip(*alone.values(), strict=True)] or [nan] * len(seeds)
            without = [cells.get(("left out", setting, split, seed, site, site), nan) for seed in seeds]
            best = max((_mean(of) for of in alone.values()), default=nan)
            margin = spread(a - b for a, b in zip(without, means, strict=True))
            partial = is_partial(study, "left out", setting)
            found.append(Unseen(site, setting, partial, spread(without), spread(means), best, margin))
    return found


def unseen_split(study: Mapping[str, Any]) -> str:
    """All patients of a site, or its test patients where these alone have the labels that count."""
    return ALL if any(row["split"] == ALL for row in study["rows"]) else "test"


UNSEEN = ("left out", "setting", "the others federated", "each of them alone, mean", "the best of them", "margin")
UNSEEN_WORDS = (
    "At a site that none of the models was trained at, on {}: the federation of the others, and the models that each "
    "of them trained alone."
)


def unseen_words(study: Mapping[str, Any]) -> str:
    who = "all of its patients" if unseen_split(study) == ALL else "its test patients"
    return UNSEEN_WORDS.format(who)


def unseen_cells(of: Unseen) -> tuple[str, ...]:
    """The figures of a line as text, in the order of `UNSEEN`."""
    margin = f"{of.margin.mean:+.4f}" if isfinite(of.margin.mean) else DASH
    return (
        of.site,
        of.setting + PARTIAL * of.partial,
        spread_text(of.without),
        spread_text(of.others),
        value_text(of.best),
        margin,
    )


HEADINGS = ("model", "validation", "test, mean over sites", "worst site", "over reference", "p", "p (Holm)")


def cells_of(line: Line) -> tuple[str, ...]:
    """The figures of a line as text, in the order of `HEADINGS`."""
    margin = f"{line.margin:+.4f}" + (f" (SE {line.error:.4f})" if isfinite(line.error) else "")
    return (
        line.name,
        spread_text(line.validation),
        spread_text(line.test),
        spread_text(line.worst),
        margin if isfinite(line.margin) else DASH,
        *(f"{p:.3g}" if isfinite(p) else DASH for p in (line.p, line.p_holm)),
    )


def verdict_of(found: Summary, measure: str) -> str:
    """Which setting validation chose, and its test score, in a sentence."""
    if found.chosen is None:
        return "No setting can be chosen: a site has no validation patients, and test patients are not for choosing."
    line = found.chosen
    anew = (
        f" Chosen anew in each fold by its own validation patients, whom other folds test on: test {measure} "
        f"{spread_text(found.by_fold)}."
        if found.by_fold is not None
        else ""
    )
    return (
        f"Chosen on validation among all settings: {line.name} (validation {measure} "
        f"{value_text(line.validation.mean)}). Its test {measure}: {spread_text(line.test)}, worst site "
        f"{spread_text(line.worst)}.{anew}"
    )


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each study; mean ± standard deviation over seeds."""
    parts = []
    for name, study in results["studies"].items():
        found, measure = summary(study), NAMES[study["measure"]]
        rows = [HEADINGS, *(cells_of(line) for line in found.lines)]
        title = f"**{name}**: {measure}, mean ± standard deviation over {repeats_text(results)}."
        parts.append("\n".join([title, "", *_lines(rows, 1), "", verdict_of(found, measure), "", found.test, ""]))
        if strangers := unseen(study):
            parts.append("\n".join([unseen_words(study), "", *_lines([UNSEEN, *map(unseen_cells, strangers)], 2), ""]))
    return "\n".join(parts)


def repeats_text(results: Mapping[str, Any]) -> str:
    """How often everything was trained, and whether on the same patients."""
    seeds, folds = f"{results['seeds']} seed(s)", results.get("folds", 1)
    return seeds if folds == 1 else f"{seeds}, each with the patients of another of {folds} folds for test"


def _lines(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """A table in Markdown; the first columns are `names`, to the left."""
    head, *body = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return [head, "|---" * names + "|---:" * (len(rows[0]) - names) + "|", *body]


def latex(results: Mapping[str, Any]) -> str:
    """The same with booktabs' rules."""
    parts = []
    for name, study in results["studies"].items():
        found, measure = summary(study), NAMES[study["measure"]]
        lines = [" & ".join(map(_tex, cells_of(line))) + r" \\" for line in found.lines]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    r"\begin{tabular}{l" + "r" * (len(HEADINGS) - 1) + "}",
                    r"\toprule",
                    " & ".join(map(_tex, HEADINGS)) + r" \\",
                    r"\midrule",
                    *lines,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\caption{"
                    + _tex(f"{name}: {measure}, mean ± standard deviation over {repeats_text(results)}. {found.test}")
                    + "}",
                    r"\end{table}",
                    "",
                ]
            )
        )
    return "\n".join(parts)


def _tex(text: str) -> str:
    for char, tex in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("$", r"\$"),
                      ("±", r"$\pm$"), (DASH, "--")):  # fmt: skip
        text = text.replace(char, tex)
    return text


def matrix(study: Mapping[str, Any]) -> list[ModelRow]:
    """Each model at each site, test, over the seeds: local models by who trained, then pooled, then the settings."""
    cells, sites = values(study), study["sites"]
    keys = list(dict.fromkeys((row["kind"], row["setting"], row["trained"]) for row in study["rows"]))
    rows = []
    for kind, setting, trained in keys:
        if kind == "left out":
            continue
        of = {site: spread(v for key, v in cells.items() if key[:3] == (kind, setting, "test")
                           and key[4:] == (site, trained)) for site in sites}  # fmt: skip
        name = f"{trained} alone" if kind == "local" else named(kind, setting, is_partial(study, kind, setting))
        rows.append(ModelRow(name, trained or None, of))
    for setting in dict.fromkeys(key[1] for key in keys if key[0] == "left out"):
        of = {site: spread(v for key, v in cells.items() if key[:3] == ("left out", setting, "test")
                           and key[4] == site) for site in sites}  # fmt: skip
        rows.append(ModelRow(named("left out", setting, is_partial(study, "left out", setting)), None, of))
    return rows
