"""What is drawn: one colour and mark for a site everywhere, line charts for the page, and PNG files with Matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, floor, isfinite, log10
from typing import TYPE_CHECKING, Any

from fedserver.comparison import ModelRow
from shared_models.figure_text import value_text

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito (2008), darkened to a contrast of 3 on white, and lightened on black; the page's CSS has both.
LIGHT = ("#0072b2", "#d55e00", "#00845f", "#b5497f", "#96700a", "#4a4f57")
DARK = ("#5ab0ee", "#ff8a4c", "#3cc79a", "#ee97c6", "#e0b83a", "#c9cdd3")
DASHES = ("", "6 3", "2 2", "8 2 2 2")  # of the 1st to 6th site, the 7th to 12th, and so on
MARKERS = ("o", "s", "^", "D", "v", "X")  # Matplotlib's words for the shapes below
SHAPES = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-3.6 3.4 2.6h-6.8z",
    "M0-3.8 3.8 0 0 3.8-3.8 0z",
    "M0 3.6 3.4-2.6h-6.8z",
    "M-3-1.6-1.6-3 0-1.4 1.6-3 3-1.6 1.4 0 3 1.6 1.6 3 0 1.4-1.6 3-3 1.6-1.4 0z",
)
CIVIDIS = ((0, 34, 78), (65, 77, 107), (125, 124, 120), (188, 175, 111), (254, 232, 56))  # Nunez et al. 2018

Series = Mapping[str, Sequence[tuple[int, float | None]]]  # site -> (round, value)


@dataclass(frozen=True, slots=True)
class Style:
    """How a site is drawn: an index of colour and shape, a dash pattern of SVG."""

    colour: int
    dash: str


@dataclass(frozen=True, slots=True)
class Line:
    site: str
    style: Style
    paths: tuple[str, ...]
    points: tuple[tuple[float, float, str], ...]  # x, y, words


@dataclass(frozen=True, slots=True)
class Chart:
    """A line chart in units of its own box, for the page to draw."""

    title: str
    unit: str
    width: int
    height: int
    left: int
    bottom: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]


def styles(sites: Sequence[str]) -> dict[str, Style]:
    """A style for each site, by its place among all sites of the run."""
    return {s: Style(i % len(LIGHT), DASHES[i // len(LIGHT) % len(DASHES)]) for i, s in enumerate(sorted(sites))}


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Two or more round numbers, from at or below `low` to at or above `high`, 1, 2 or 5 times a power of ten apart."""
    high = high if high - low > 1e-6 * max(abs(low), abs(high), 1e-3) else low + max(abs(low), 1.0) / 10
    span = high - low
    power = 10.0 ** floor(log10(span / most))
    step = next(s * power for s in (1, 2, 5, 10, 20) if span <= s * power * most * (1 + 1e-9))
    return [i * step for i in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def line_chart(
    title: str, unit: str, series: Series, style_of: Mapping[str, Style], within: tuple[float, float]
) -> Chart:
    """A chart of `series` over rounds; `within` is widened to what the values need, None leaves a gap."""
    width, height, left, right, top, bottom = 360, 230, 40, 348, 12, 196
    values = [v for points in series.values() for _, v in points if v is not None]
    rounds = [r for points in series.values() for r, _ in points] or [1]
    y_at = ticks(min([within[0], *values]), max([within[1], *values]))
    first, last = min(rounds), max(rounds)
    span_x, span_y = max(last - first, 1), y_at[-1] - y_at[0]

    def x(at: float) -> float:
        return round(left + 8 + (right - left - 16) * ((at - first) / span_x if last > first else 0.5), 1)

    def y(at: float) -> float:
        return round(bottom - (bottom - top) * (at - y_at[0]) / span_y, 1)

    digits = max(0, -floor(log10(span_y / (len(y_at) - 1)) + 1e-9))
    whole = range(first, last + 1) if last - first < 10 else [first, *(round(t) for t in ticks(first, last)[1:])]
    return Chart(
        title,
        unit,
        width,
        height,
        left,
        bottom,
        tuple((x(t), str(t)) for t in whole if t <= last),
        tuple((y(t), f"{t:.{digits}f}") for t in y_at),
        tuple(
            Line(
                site,
                style_of[site],
                tuple(
                    "M" + " ".join(f"{x(r)} {y(v)}" for r, v in part) for part in _stretches(points) if len(part) > 1
                ),
                tuple(
                    (x(r), y(v), f"{site}, round {r}: {v:.3f}")
                    for part in _stretches(points)
                    for r, v in (part if len(points) <= 30 else part if len(part) == 1 else part[-1:])
                ),
            )
            for site, points in sorted(series.items())
        ),
    )


def xy_chart(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    style_of: Mapping[str, Style],
    x_ticks: Sequence[tuple[float, str]],
) -> Chart:
    """A chart of (x, y, words) by site, y from 0 to 1, x from the first to the last of `x_ticks`."""
    width, height, left, right, top, bottom = 360, 230, 40, 348, 12, 196
    first, last = x_ticks[0][0], x_ticks[-1][0]

    def x(at: float) -> float:
        return round(left + 8 + (right - left - 16) * (at - first) / (last - first), 1)

    def y(at: float) -> float:
        return round(bottom - (bottom - top) * at, 1)

    drawn = []
    for site, points in sorted(lines.items()):
        placed = tuple((x(a), y(b), words) for a, b, words in points)
        path = "M" + " ".join(f"{a} {b}" for a, b, _ in placed)
        drawn.append(Line(site, style_of[site], (path,) if len(placed) > 1 else (), placed))
    grid = tuple((y(share), f"{share:.1f}") for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    return Chart(title, unit, width, height, left, bottom, tuple((x(a), w) for a, w in x_ticks), grid, tuple(drawn))


def _stretches(points: Sequence[tuple[int, float | None]]) -> Iterator[list[tuple[int, float]]]:
    """Runs of points that have a value."""
    part: list[tuple[int, float]] = []
    for at, value in points:
        if value is not None:
            part.append((at, value))
        elif part:
            yield part
            part = []
    if part:
        yield part


def heat(value: float, low: float, high: float) -> tuple[str, str]:
    """Background on the cividis scale from `low` to `high`, and the ink that can be read on it."""
    if not isfinite(value):
        return "transparent", "inherit"
    place = min(max((value - low) / (high - low) if high > low else 1.0, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(place), len(CIVIDIS) - 2)
    rgb = [round(a + (b - a) * (place - i)) for a, b in zip(CIVIDIS[i], CIVIDIS[i + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#000000" if place > 1.9 else "#ffffff"


def curves_png(loss: Series, scores: Mapping[str, Series], sites: Sequence[str], measure: str) -> bytes:
    """Training loss, and the validation score of each label, by site over rounds."""
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, str, Series]] = [("Training loss", "loss", loss)]
    panels += [(f"Validation {measure}: {label}", measure, series) for label, series in scores.items()]
    columns, rows = min(3, len(panels)), ceil(len(panels) / 3)
    legend_rows = ceil(len(sites) / 6)
    figure = new_figure(4.4 * columns, 3.3 * rows + 0.25 * legend_rows)
    style_of = styles(sites)
    for i, (title, unit, series) in enumerate(panels):
        axes: Axes = figure.add_subplot(rows, columns, i + 1)
        for site, points in sorted(series.items()):
            look = style_of[site]
            axes.plot(
                [r for r, _ in points],
                [float("nan") if v is None else v for _, v in points],
                color=LIGHT[look.colour],
                linestyle=(0, tuple(float(n) / 1.5 for n in look.dash.split())) if look.dash else "-",
                marker=MARKERS[look.colour] if len(points) <= 30 else "",
                markersize=4.5,
                linewidth=1.6,
                label=literal(site),
            )
        axes.set_title(literal(title), fontsize=10, loc="left")
        axes.set_xlabel("round")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if unit == measure:
            axes.set_ylim(top=1.0)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0.0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(sites)), frameon=False, fontsize=9)
    return png(figure)


def matrix_png(rows: Sequence[ModelRow], label: str, measure: str) -> bytes:
    """The site x model matrix as a heat map."""
    sites = list(rows[0].values)
    names = max(len(row.name) for row in rows)  # beside the cells, at 0.085 inches a letter
    figure = new_figure(max(2.4, 1.2 + 0.085 * names) + 0.85 * len(sites), 1.5 + 0.45 * len(rows))
    axes: Axes = figure.add_subplot()
    cells = [[row.values[s].mean for s in sites] for row in rows]
    low, high = bounds(cells)
    image = axes.imshow(cells, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            ink = heat(value, low, high)[1]
            axes.text(j, i, value_text(value), ha="center", va="center", color="black" if ink == "inherit" else ink)
    axes.set_xticks(range(len(sites)), [literal(s) for s in sites], rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [literal(r.name) for r in rows])
    axes.set_xlabel("tested on the patients of")
    axes.set_title(literal(f"Test {measure} of every model at every site: {label}"), fontsize=10, loc="left")
    figure.colorbar(image, label=measure, shrink=0.9)
    return png(figure)


def bounds(cells: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Smallest and largest finite value; 0 and 1 where there is none."""
    known = [v for line in cells for v in line if isfinite(v)]
    return (min(known), max(known)) if known else (0.0, 1.0)


def literal(text: str) -> str:
    """Keeps Matplotlib from reading dollars as mathematics, and a leading underscore as a hidden label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def new_figure(width_in: float, height_in: float) -> "Figure":
    """An empty figure that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    stream = BytesIO()
    no_date: dict[str, Any] = {"Software": None}
    figure.savefig(stream, format="png", metadata=no_date)
    return stream.getvalue()
