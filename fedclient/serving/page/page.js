// One image in, its overlay out. Talks to the service that it came from, and to nobody else.
"use strict";

const at = (id) => document.getElementById(id);
const POLL_MS = 700;
const WORDS = { dicom: "DICOM", mask: "mask", facts: "facts as JSON", picture: "picture" };
let health = null;
let job = null;
let shown = 0; // run of uploads: what a superseded one still hears is not shown
let pictures = new Map(); // address -> object URL

function headers() {
  const token = sessionStorage.getItem("token");
  return token ? { authorization: `Bearer ${token}` } : {};
}

function takeToken() { // of a link that ends in #token=TOKEN; a fragment is sent to nobody
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
  at("sign").hidden = true;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.ok) return answer;
  if (answer.status === 401) at("sign").hidden = false;
  let words = `the service answered ${answer.status}`;
  try { words = (await answer.json()).detail; } catch { /* no words of its own */ }
  throw new Error(words);
}

function say(words, bad = false) {
  at("status").textContent = words;
  at("status").classList.toggle("bad", bad);
}

function item(list, words) {
  const li = document.createElement("li");
  li.textContent = words;
  at(list).append(li);
  return li;
}

async function begin() {
  try {
    health = await (await ask("/api/health")).json();
  } catch (error) {
    at("model").textContent = "";
    say(`The service does not answer: ${error.message}`, true);
    return;
  }
  const model = health.model;
  at("title").textContent = model.title || model.study;
  at("model").textContent = `${model.name} ${model.version}: ${model.task} of ${model.answers.join(", ")} on ` +
    `${model.modality.toUpperCase()}. Release ${model.sha256.slice(0, 16)}.`;
  at("standing").hidden = !model.warnings.length;
  at("standing").textContent = model.warnings.join(" ");
  const part = health.partial === 1 ? "1 case is" : `${health.partial} cases are`;
  at("partial").hidden = !health.partial;
  at("partial").textContent = `${part} of a part of a series, and not to be relied on: send the whole series again.`;
  at("sign").hidden = !health.token || Boolean(sessionStorage.getItem("token"));
}

// ---- in ----

async function filesOf(items) {
  const roots = [...items].map((each) => each.webkitGetAsEntry && each.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      found.push(await new Promise((good, bad) => entry.file(good, bad)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((good, bad) => reader.readEntries(good, bad));
      if (!some.length) return;
      for (const each of some) await walk(each);
    }
  };
  for (const root of roots) await walk(root);
  return found;
}

function upload(form) {
  return new Promise((good, bad) => { // fetch cannot tell how much of a body has gone
    const request = new XMLHttpRequest();
    request.open("POST", "/api/jobs");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => {
      if (event.lengthComputable) at("progress").value = event.loaded / event.total;
    };
    request.onload = () => {
      let said = {};
      try { said = JSON.parse(request.responseText); } catch { /* no JSON */ }
      if (request.status === 202) good(said);
      else {
        if (request.status === 401) at("sign").hidden = false;
        bad(new Error(said.detail || `the service answered ${request.status}`));
      }
    };
    request.onerror = () => bad(new Error("the service broke the connection off; are the files too large?"));
    request.send(form);
  });
}

async function give(files) {
  if (!files.length) return;
  const mine = ++shown;
  const total = [...files].reduce((sum, file) => sum + file.size, 0);
  if (health && total > health.most_mib * 2 ** 20) {
    say(`These files are larger than the ${health.most_mib} MiB that are taken at once.`, true);
    return;
  }
  at("result").hidden = true;
  at("progress").hidden = false;
  at("progress").value = 0;
  say(`Sending ${files.length} ${files.length === 1 ? "file" : "files"}…`);
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  try {
    let told = await upload(form);
    at("progress").removeAttribute("value");
    while (mine === shown && (told.state === "waiting" || told.state === "running")) {
      say(told.state === "running" ? "The model looks at it…" : `Waiting; ${told.ahead} before it…`);
      await new Promise((later) => setTimeout(later, POLL_MS));
      told = await (await ask(`/api/jobs/${told.id}`)).json();
    }
    if (mine !== shown) return;
    if (told.state !== "done") throw new Error(`${told.error.why} (${told.error.code})`);
    say("Done.");
    show(told);
  } catch (error) {
    if (mine === shown) say(`No answer: ${error.message}`, true);
  } finally {
    if (mine === shown) at("progress").hidden = true;
  }
}

// ---- out ----

async function picture(name) {
  const path = `/api/jobs/${job.id}/files/${name}`;
  if (!pictures.has(path)) {
    pictures.set(path, ask(path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob)));
  }
  return pictures.get(path);
}

function show(told) {
  for (const address of pictures.values()) address.then((url) => URL.revokeObjectURL(url), () => {});
  pictures = new Map();
  job = told;
  at("image").replaceChildren(...told.images.map((each, n) => new Option(`image ${n + 1}`, n)));
  at("pick").hidden = told.images.length < 2;
  at("unread").replaceChildren();
  if (told.partial) item("unread", `Not of the whole series: ${told.partial.why} (${told.partial.code})`);
  for (const each of told.unread) item("unread", `Not read: ${each.why} (${each.code})`);
  at("result").hidden = false;
  showImage(0);
  at("result-title").focus();
}

function sized(answer) {
  if (answer.volume_mm3 !== undefined) {
    const longest = answer.longest_axial_mm == null ? "" : `, longest axial diameter ${answer.longest_axial_mm.toFixed(1)} mm`;
    return answer.called ? `${(answer.volume_mm3 / 1000).toFixed(2)} ml in ${answer.parts} parts${longest}` : "nothing marked";
  }
  if (answer.pixels !== undefined) return answer.called ? `${answer.pixels} pixels in ${answer.parts} parts` : "nothing marked";
  return answer.called ? "yes" : "no";
}

function showImage(n) {
  const image = job.images[n];
  at("doubts").replaceChildren();
  for (const doubt of image.doubts) item("doubts", `Doubtful: ${doubt.words} (${doubt.code})`);
  at("answers").replaceChildren(...image.answers.map((answer, k) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    if (image.planes.some((plane) => plane.marks)) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = health.model.colours[k];
      name.append(swatch);
    }
    name.append(answer.name);
    const result = document.createElement("td");
    result.textContent = sized(answer);
    const chance = document.createElement("td");
    chance.textContent = answer.chance.toFixed(3);
    row.append(name, result, chance);
    return row;
  }));
  at("downloads").replaceChildren();
  for (const file of image.files) {
    const link = document.createElement("a");
    link.href = "#";
    link.textContent = file.file.split("/").pop();
    link.addEventListener("click", async (event) => {
      event.preventDefault();
      const save = document.createElement("a");
      save.href = await picture(file.file);
      save.download = link.textContent;
      save.click();
    });
    item("downloads", "").append(link, ` (${WORDS[file.kind] || file.kind})`);
  }
  at("stage-box").hidden = !image.planes.length;
  if (!image.planes.length) return;
  at("at").max = image.planes.length - 1;
  at("at").value = Math.max(0, image.planes.findIndex((plane) => plane.key));
  at("at").disabled = image.planes.length < 2;
  showPlane();
}

async function showPlane() {
  const image = job.images[Number(at("image").value)];
  const wanted = Number(at("at").value);
  const plane = image.planes[wanted];
  const [below, above] = await Promise.all([picture(plane.image), plane.marks ? picture(plane.marks) : null]);
  if (Number(at("at").value) !== wanted) return; // the slider has moved on
  at("stage").style.aspectRatio = String(plane.aspect);
  at("plane").src = below;
  at("plane").alt = `Plane ${plane.plane + 1} of the image`;
  at("marks").hidden = !above;
  if (above) at("marks").src = above;
  at("marks").alt = above ? "What the model marks in it" : "";
  const most = plane.key && image.answers.some((answer) => answer.called);
  at("caption").textContent = `Plane ${plane.plane + 1}${most ? ", in which most is marked" : ""}`;
  at("at").setAttribute("aria-valuetext", at("caption").textContent);
  document.body.dataset.shown = `${job.id}/${plane.plane}`;
}

at("files").addEventListener("change", (event) => give(event.target.files));
at("folder").addEventListener("change", (event) => give(event.target.files));
at("image").addEventListener("change", () => showImage(Number(at("image").value)));
at("at").addEventListener("input", showPlane);
at("share").addEventListener("input", () => { at("marks").style.opacity = at("share").value / 100; });
at("marks").style.opacity = 0.45;
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => { event.preventDefault(); at("drop").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  give(await filesOf(event.dataTransfer.items));
});
at("sign").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("sign").hidden = true;
  say("The token is used from now on, in this tab.");
});
at("forget").addEventListener("click", async () => {
  try {
    await ask(`/api/jobs/${job.id}`, { method: "DELETE" });
    at("result").hidden = true;
    say("Deleted here.");
  } catch (error) {
    say(error.message, true);
  }
});
addEventListener("hashchange", takeToken);
takeToken();
begin();
