// Keeps the page as the coordinator's server tells it. Talks to the server that it came from, and to nobody else.
"use strict";

const RETRY_MS = 5000;
const body = document.body;
const shapes = JSON.parse(body.dataset.shapes).map((path) => new Path2D(path));
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = new Map(); // element -> { plot, text }
let mark = body.dataset.mark; // of the last change that this page has

// ---- time, in words that go on ----

function span(seconds) {
  const count = Math.max(0, Math.round(seconds));
  if (count < 60) return `${count} s`;
  if (count < 3600) return `${Math.floor(count / 60)} min`;
  if (count < 48 * 3600) return `${Math.floor(count / 3600)} h ${Math.floor((count % 3600) / 60)} min`;
  return `${Math.floor(count / 86400)} days`;
}

function tick() {
  const now = Date.now();
  for (const each of document.querySelectorAll("time[datetime]")) {
    const at = Date.parse(each.dateTime);
    const away = (at - now) / 1000;
    const words = each.dataset.until !== undefined ? away > 0 ? `in ${span(away)}` : "any moment"
      : each.dataset.for !== undefined ? `for ${span(-away)}` : `${span(-away)} ago`;
    if (each.textContent !== words) each.textContent = words;
    each.title = new Date(at).toLocaleString();
  }
}

// ---- a section as it is now, with as few changes as will do: what has the focus keeps it, what is open stays open ----

function patch(old, made) {
  if (old.nodeType !== made.nodeType || old.nodeName !== made.nodeName) {
    old.replaceWith(made);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== made.nodeValue) old.nodeValue = made.nodeValue;
    return;
  }
  if (old.nodeName === "TIME" && old.dateTime === made.dateTime) return; // its words go on by themselves
  for (const { name } of [...old.attributes]) {
    if (!made.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of made.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (!old.hasAttribute("data-keep")) patchAll(old, made);
}

function patchAll(old, made) {
  const before = [...old.childNodes];
  const after = [...made.childNodes];
  after.forEach((node, i) => (before[i] ? patch(before[i], node) : old.append(node)));
  before.slice(after.length).forEach((node) => node.remove());
}

function take({ name, html }) {
  const place = document.querySelector(`[data-section="${name}"]`);
  if (!place) return;
  const made = document.createElement("template");
  made.innerHTML = html;
  patchAll(place, made.content);
  tick();
  if (name === "now") say();
  draw();
}

function say() {
  const words = [...document.querySelectorAll("[data-said]")].map((each) => each.dataset.said).join(" ");
  const place = document.getElementById("said");
  if (place.textContent !== words) place.textContent = words;
}

// ---- charts ----

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

// ---- what changes ----

function state(word, words) {
  const place = document.getElementById("live");
  place.dataset.state = word;
  if (place.textContent !== words) place.textContent = words;
}

function listen() {
  const asked = new URLSearchParams({ after: mark });
  if (body.dataset.run) asked.set("run", body.dataset.run);
  const source = new EventSource(`/events?${asked}`);
  source.addEventListener("section", (event) => take(JSON.parse(event.data)));
  source.addEventListener("state", (event) => {
    mark = event.lastEventId;
    const trouble = document.getElementById("trouble");
    trouble.textContent = JSON.parse(event.data).trouble;
    trouble.hidden = !trouble.textContent;
    state("on", "live");
  });
  source.onerror = async () => {
    state("lost", "not live: trying again");
    if (source.readyState !== EventSource.CLOSED) return; // it comes back by itself, with its last id
    try {
      const answer = await fetch("/", { redirect: "manual" });
      if (answer.type === "opaqueredirect") location.assign("/login"); // the session has ended
    } catch { /* the server is away */ }
    setTimeout(listen, RETRY_MS);
  };
}

tick();
say();
draw();
setInterval(tick, 1000);
dark.addEventListener("change", () => draw(true));
state("off", "connecting");
listen();
