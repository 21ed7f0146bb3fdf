"""Figures of a comparison as PNG: curves by round, the matrix, boxes by site, cost against quality."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedserver import plots
from shared_models.scores import NAMES
from simulations.compare_tables import WORDS, Summary, is_partial, matrix, summary, values

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes

MB = 1e6


def figures_of(study: Mapping[str, Any]) -> dict[str, bytes]:
    """Name of the file without its suffix -> PNG; a figure without data is left out."""
    found, measure = summary(study), NAMES[study["measure"]]
    made = {"sites": boxes_png(study, measure), "cost": cost_png(study, found, measure)}
    if any(cost["rounds"] and not is_partial(study, "federated", cost["setting"]) for cost in study["costs"]):
        made["curves"] = curves_png(study, measure)
    made["matrix"] = plots.matrix_png(matrix(study), study["label"], measure)
    return {name: made[name] for name in ("curves", "matrix", "sites", "cost") if name in made}


def curves_png(study: Mapping[str, Any], measure: str) -> bytes:
    """Validation, mean over sites and seeds, by round; the band is the range over seeds. Of models that are whole."""
    from matplotlib.ticker import MaxNLocator

    figure = plots.new_figure(7.2, 4.2)
    axes: Axes = figure.add_subplot()
    for place, setting in enumerate(_settings(study)):
        if is_partial(study, "federated", setting):
            continue
        runs = [dict(map(tuple, cost["rounds"])) for cost in study["costs"] if cost["setting"] == setting]
        rounds = sorted(set.intersection(*(set(run) for run in runs)))
        at = [[run[number] for run in runs] for number in rounds]
        colour, dash = _look(place)
        axes.plot(rounds, [fmean(of) for of in at], color=colour, linestyle=dash, label=plots.literal(setting))
        if len(runs) > 1:
            axes.fill_between(rounds, [min(of) for of in at], [max(of) for of in at], color=colour, alpha=0.12, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, "rounds trained", f"validation {measure}", f"{study['label']}: mean over sites")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return plots.png(figure)


def boxes_png(study: Mapping[str, Any], measure: str) -> bytes:
    """For each site a box of each kind of model: at home alone, pooled, and each setting; a dot is a seed."""
    cells, sites = values(study), study["sites"]
    groups: dict[str, list[list[float]]] = {}
    for kind, setting in dict.fromkeys((row["kind"], row["setting"]) for row in study["rows"]):
        if is_partial(study, kind, setting):
            continue
        own = kind in ("local", "left out")
        groups[WORDS[kind].format(setting)] = [
            [v for key, v in cells.items() if key[:3] == (kind, setting, "test") and key[4] == site
             and (not own or key[5] == site) and isfinite(v)] for site in sites
        ]  # fmt: skip
    figure = plots.new_figure(max(7.2, 1.1 * len(sites) + 0.28 * len(sites) * len(groups)), 4.6)
    axes: Axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for place, (name, by_site) in enumerate(groups.items()):
        colour, _ = _look(place)
        at = [n - 0.4 + width * (place + 0.5) for n in range(len(sites))]
        filled = [(x, of) for x, of in zip(at, by_site, strict=True) if of]
        drawn = axes.boxplot(
            [of for _, of in filled], positions=[x for x, _ in filled], widths=width * 0.8, patch_artist=True,
            showfliers=False, medianprops={"color": colour}, boxprops={"edgecolor": colour},
            whiskerprops={"color": colour}, capprops={"color": colour}, manage_ticks=False,
        )  # fmt: skip
        for box in drawn["boxes"]:
            box.set_facecolor(colour + "33")
        axes.scatter([x for x, of in filled for _ in of], [v for _, of in filled for v in of], s=9, color=colour,
                     label=plots.literal(name), zorder=3)  # fmt: skip
    axes.set_xticks(range(len(sites)), [plots.literal(site) for site in sites], rotation=30, ha="right")
    _dress(axes, "", f"test {measure}", f"{study['label']}: by site, a dot for each seed")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return plots.png(figure)


def cost_png(study: Mapping[str, Any], found: Summary, measure: str) -> bytes:
    """Test score against bytes on the wire, and against seconds that sites trained, of each setting's runs.

    Of the sites' own models where layers of the federation's stay with them.
    """
    figure = plots.new_figure(9.0, 4.0)
    panels: Sequence[tuple[str, str, float]] = (
        ("bytes", "MB on the wire, all sites", MB),
        ("training_seconds", "seconds of training, sites added up", 1.0),
    )
    quality = {line.setting: line.test_by_seed for line in found.lines if line.kind == "federated"}
    own = {line.setting: line.test_by_seed for line in found.lines if line.kind == "personalised"}
    quality |= {setting: of for setting, of in own.items() if is_partial(study, "federated", setting)}
    for number, (key, words, unit) in enumerate(panels, start=1):
        axes: Axes = figure.add_subplot(1, 2, number)
        for place, setting in enumerate(_settings(study)):
            colour, _ = _look(place)
            costs = sorted((c for c in study["costs"] if c["setting"] == setting), key=lambda c: int(c["seed"]))
            axes.scatter([c[key] / unit for c in costs], quality[setting], color=colour, s=28,
                         marker=plots.MARKERS[place % len(plots.MARKERS)],
                         label=plots.literal(setting) if number == 1 else None)  # fmt: skip
        _dress(axes, words, f"test {measure}, mean over sites", "")
        axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return plots.png(figure)


def _settings(study: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(cost["setting"] for cost in study["costs"]))


def _look(place: int) -> tuple[str, str]:
    return plots.LIGHT[place % len(plots.LIGHT)], ("-", "--", ":", "-.")[place // len(plots.LIGHT) % 4]


def _dress(axes: "Axes", x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(plots.literal(title), fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
