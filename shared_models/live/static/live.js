// Keeps a page as the process that it came from tells it. Talks to that process, and to nobody else.
"use strict";

const RETRY_MS = 5000;
const QUIET_MS = 20000; // the process gives a sign of life every five seconds
const OLD_MS = 60000; // a look takes moments: one of which nothing has come for so long hangs
const body = document.body;
const asof = document.getElementById("asof");
let mark = body.dataset.mark; // of the last change that this page has
let ahead = 0; // by how many ms the clock of the process is ahead of this one's: it may be another machine's
let heard = Date.now(); // when the process last gave a sign of life
let source = null;

// ---- time, in words that go on ----

function span(seconds) {
  const count = Math.max(0, Math.round(seconds));
  if (count < 60) return `${count} s`;
  if (count < 3600) return `${Math.floor(count / 60)} min`;
  if (count < 48 * 3600) return `${Math.floor(count / 3600)} h ${Math.floor((count % 3600) / 60)} min`;
  return `${Math.floor(count / 86400)} days`;
}

function inWords({ dataset }, at) {
  const away = (at - ahead - Date.now()) / 1000;
  if (dataset.clock !== undefined) return new Date(at - ahead).toLocaleTimeString();
  if (dataset.until !== undefined) return away > 0 ? `in ${span(away)}` : "any moment";
  return dataset.for !== undefined ? `for ${span(-away)}` : `${span(-away)} ago`;
}

function tick() {
  for (const each of document.querySelectorAll("time[datetime]")) {
    const at = Date.parse(each.dateTime);
    const words = inWords(each, at);
    if (each.textContent !== words) each.textContent = words;
    const exact = new Date(at - ahead).toLocaleString();
    if (each.title !== exact) each.title = exact;
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

const keyOf = (node) => node.dataset?.key;

// Rows with a key stay the elements that they are while others come before them: a row that is read is not written over.
function patchAll(old, made) {
  const after = [...made.childNodes];
  const wanted = new Set(after.map(keyOf).filter(Boolean));
  const kept = new Map();
  for (const node of [...old.childNodes]) {
    if (!keyOf(node)) continue;
    if (wanted.has(keyOf(node))) kept.set(keyOf(node), node);
    else node.remove();
  }
  let at = old.firstChild; // what stands where the next node belongs
  for (const node of after) {
    const same = kept.get(keyOf(node));
    if (same) {
      if (same === at) at = at.nextSibling;
      else old.insertBefore(same, at);
      patch(same, node);
    } else if (keyOf(node) || !at || keyOf(at)) {
      old.insertBefore(node, at);
    } else {
      const here = at;
      at = at.nextSibling;
      patch(here, node);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function take({ name, html }) {
  const place = document.querySelector(`[data-section="${name}"]`);
  if (!place) return;
  const made = document.createElement("template");
  made.innerHTML = html;
  patchAll(place, made.content);
  tick();
  say();
  document.dispatchEvent(new CustomEvent("told", { detail: name }));
}

function write(id, words) {
  const place = document.getElementById(id);
  if (place.textContent !== words) place.textContent = words;
  return place;
}

function say() {
  write("said", [...document.querySelectorAll("[data-said]")].map((each) => each.dataset.said).join(" "));
}

// ---- how fresh it is ----

function state(word, words) {
  write("live", words).dataset.state = word;
  body.classList.toggle("old", word === "lost" || word === "stuck");
}

function warn(id, words) {
  write(id, words && `${words} What stands here is as of ${asof.textContent}.`).hidden = !words;
}

function lose() {
  state("lost", "not live: trying again");
  warn("lost", "The process that serves this page does not answer: it has ended or hangs.");
}

function hear({ now, looked = Date.parse(asof.dateTime) / 1000, trouble }) {
  heard = Date.now();
  ahead = Math.abs(now * 1000 - heard) < 1000 ? 0 : now * 1000 - heard;
  asof.dateTime = new Date(looked * 1000).toISOString();
  tick();
  const old = now * 1000 - looked * 1000 > OLD_MS;
  warn("lost", old && !trouble ? "The last look takes long: a disk or a tool may hang." : "");
  if (trouble !== undefined) warn("trouble", trouble);
  const stuck = old || !document.getElementById("trouble").hidden;
  state(stuck ? "stuck" : "on", stuck ? "nothing new can be read" : "live");
}

// ---- what changes ----

function listen() {
  source?.close();
  const asked = new URLSearchParams({ after: mark });
  if (body.dataset.run) asked.set("run", body.dataset.run);
  const mine = new EventSource(`/events?${asked}`);
  source = mine;
  mine.addEventListener("section", (event) => take(JSON.parse(event.data)));
  mine.addEventListener("state", (event) => {
    mark = event.lastEventId;
    hear(JSON.parse(event.data));
  });
  mine.addEventListener("beat", (event) => hear(JSON.parse(event.data)));
  mine.onerror = async () => {
    lose();
    if (mine !== source || mine.readyState !== EventSource.CLOSED) return; // it comes back by itself, with its last id
    try {
      const answer = await fetch("/", { redirect: "manual" });
      if (answer.type === "opaqueredirect") location.assign("/"); // the session has ended: one is led to the login
    } catch { /* the process is away */ }
    setTimeout(() => mine === source && listen(), RETRY_MS);
  };
}

function watch() {
  tick();
  if (Date.now() - heard < QUIET_MS) return;
  heard = Date.now();
  lose();
  listen();
}

state("off", "connecting");
tick();
say();
setInterval(watch, 1000);
listen();
