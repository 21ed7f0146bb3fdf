// The charts of the dashboard, drawn anew where live.js has brought other figures.
"use strict";

const shapes = JSON.parse(document.body.dataset.shapes).map((path) => new Path2D(path));
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Map(); // element -> { plot, text }

function colour(number) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--c${number}`).trim();
}

function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function points(line, many) {
  return {
    show: !many,
    filter: (u, i) => u.data[i].flatMap((value, at) => (value === null ? [] : [at])),
    paths: (u, i, from, to, only) => {
      const path = new Path2D();
      const ratio = devicePixelRatio;
      for (const at of only || []) {
        if (u.data[i][at] === null) continue;
        const x = u.valToPos(u.data[0][at], "x", true);
        const y = u.valToPos(u.data[i][at], "y", true);
        path.addPath(shapes[line.colour], new DOMMatrix([ratio, 0, 0, ratio, x, y]));
      }
      return { fill: path, stroke: path };
    },
    fill: colour(line.colour),
    stroke: colour(line.colour),
    width: 0.5,
  };
}

function readout(plot, told) {
  const at = plot.cursor.idx;
  const place = plot.root.closest("figure").querySelector(".readout");
  const value = (line) => (line.values[at] === null ? "–" : line.values[at].toFixed(told.digits));
  place.textContent = at === null || at === undefined ? "\u00a0"
    : `round ${told.rounds[at]}: ${told.lines.map((line) => `${line.site} ${value(line)}`).join(", ")}`;
}

function made(place, told) {
  const ink = variable("soft");
  const rule = variable("rule");
  const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 }, font: "12px system-ui" };
  const many = told.rounds.length > 60;
  return new uPlot({
    width: place.clientWidth || 320,
    height: 230,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
    scales: {
      x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low - 0.3, high + 0.3]) },
      y: { range: (u, low, high) => {
        if (told.zero) return [Math.min(0, low || 0), (high || 1) * 1.05];
        const room = low === null ? 1 : (high - low || Math.abs(low) || 1) / 10;
        return low === null ? [0, 1] : [low - room, high + room];
      } },
    },
    axes: [{ ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], space: 34, size: 28 }, { ...axis, size: 52 }],
    series: [{}, ...told.lines.map((line) => ({
      label: line.site,
      stroke: colour(line.colour),
      width: 2,
      dash: line.dash.length ? line.dash : undefined,
      points: points(line, many),
    }))],
    hooks: { setCursor: [(plot) => readout(plot, told)] },
  }, [told.rounds, ...told.lines.map((line) => line.values)], place);
}

function draw(anew = false) {
  for (const [place, chart] of charts) {
    if (anew || !place.isConnected || chart.text !== place.dataset.chart) {
      chart.plot.destroy();
      sizes.unobserve(place);
      charts.delete(place);
    }
  }
  for (const place of document.querySelectorAll(".plot")) {
    if (charts.has(place)) continue;
    charts.set(place, { plot: made(place, JSON.parse(place.dataset.chart)), text: place.dataset.chart });
    sizes.observe(place);
  }
}

const sizes = new ResizeObserver((seen) => {
  for (const { target } of seen) {
    const chart = charts.get(target);
    if (chart && target.clientWidth && chart.plot.width !== target.clientWidth) {
      chart.plot.setSize({ width: target.clientWidth, height: 230 });
    }
  }
});

draw();
dark.addEventListener("change", () => draw(true));
document.addEventListener("told", () => draw());
