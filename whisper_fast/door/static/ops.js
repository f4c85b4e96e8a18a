// The operations page. It draws one snapshot a second; every text in it enters the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const key = $("key"), status = $("status"), state = $("state"), pause = $("pause");
const HISTORY = 120; // points of the line under the rate
const PATIENCE = 5000; // milliseconds without an event after which the connection counts as lost

let latest = null; // the snapshot that is shown
let reading = null; // the AbortController of the stream
let heard = 0; // when the last event came
let paused = false;
const rates = [];

function element(tag, className = "", content = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(content);
  return made;
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- how figures are written

const count = (value) => Math.round(value).toLocaleString("en");
const share = (value) => (value === null || value === undefined ? "-" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`);
const rate = (value) => (value >= 100 ? count(value) : value.toFixed(1));
const clock = (at) => new Date(1000 * at).toLocaleTimeString();

function seconds(value) {
  if (!value) return value === 0 ? "0" : "-";
  if (value >= 10) return `${value.toFixed(1)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  const ms = 1000 * value;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 1 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

function bytes(value) {
  if (value === undefined || value === null) return "-";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at++) value /= 1024;
  return `${at && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[at]}`;
}

function lasting(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

const named = (counts) => Object.entries(counts).map(([name, number]) => `${name} ${count(number)}`).join(", ");

// ---- tables: a row is kept by its name, a cell is touched only when its text changes

function table(id, label, columns) {
  const made = $(id), head = element("thead"), line = element("tr"), body = element("tbody"), rows = new Map();
  for (const { title, kind } of columns) {
    const cell = element("th", kind === "number" ? "number" : "", title);
    cell.scope = "col";
    line.append(cell);
  }
  head.append(line);
  made.append(element("caption", "unseen", label), head, body);
  made.parentElement.tabIndex = 0;
  made.parentElement.setAttribute("role", "region");
  made.parentElement.setAttribute("aria-label", label);
  const empty = document.querySelector(`[data-empty="${id}"]`);
  return (items) => {
    made.hidden = !items.length;
    if (empty) empty.hidden = items.length > 0;
    const seen = new Set();
    items.forEach((item, place) => {
      const name = item.key ?? columns[0].cell(item);
      seen.add(name);
      let row = rows.get(name);
      if (!row) {
        row = element("tr");
        columns.forEach(({ kind }, at) => {
          const cell = element(at ? "td" : "th", kind ?? "");
          if (!at) cell.scope = "row";
          row.append(cell);
        });
        rows.set(name, row);
      }
      columns.forEach(({ cell, kind, bad }, at) => {
        write(row.cells[at], String(cell(item)));
        if (bad) row.cells[at].className = `${kind ?? ""}${bad(item) ? " bad" : ""}`;
      });
      if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    });
    for (const [name, row] of rows) if (!seen.has(name)) { row.remove(); rows.delete(name); }
  };
}

const number = (title, cell, bad) => ({ title, cell, bad, kind: "number" });
const percentiles = [
  number("p50", (row) => seconds(row.p50)),
  number("p95", (row) => seconds(row.p95)),
  number("p99", (row) => seconds(row.p99)),
];
const PARTS = { reply: "The whole reply", llm: "of that the language model", ours: "of that ourselves" };
const BREAKER = { closed: "well", open: "left alone", "half-open": "being tried" };

const tables = {
  replies: table("replies", "Time until the reply, in all and split into the language model's and ours", [
    { title: "", cell: (row) => PARTS[row.name] },
    ...percentiles,
    number("replies", (row) => count(row.count)),
  ]),
  ranking: table("ranking", "Resources that cost turns their time", [
    { title: "Resource", cell: (row) => row.resource },
    number("of all turns' time", (row) => share(row.share)),
    number("used", (row) => share(row.utilisation)),
    number("waiting", (row) => row.waiting.toFixed(1)),
  ]),
  stages: table("stages", "Time of every stage and component", [
    { title: "Stage", cell: (row) => row.name.replaceAll("_", " ") },
    ...percentiles,
    number("times", (row) => count(row.count)),
    number("missing since the start", (row) => count(row.missing), (row) => row.missing > 0),
  ]),
  endpoints: table("endpoints", "Language models", [
    { title: "Endpoint", cell: (row) => row.name },
    { title: "Health", cell: (row) => (row.shut_for ? `${BREAKER[row.breaker]} for ${seconds(row.shut_for)}` : BREAKER[row.breaker]), bad: (row) => row.breaker !== "closed" || row.shut_for > 0 },
    number("in flight / limit", (row) => `${count(row.in_flight)} / ${count(row.limit)}`),
    { title: "Limit is there because", cell: (row) => row.limit_why, kind: "why" },
    number("waiting", (row) => count(row.waiting)),
    number("oldest", (row) => seconds(row.oldest_waiting || null)),
    number("answer takes", (row) => seconds(row.latency || row.first_token || null)),
    number("calls", (row) => count(row.calls)),
    { title: "Errors", cell: (row) => named(row.errors) || "none", bad: (row) => Object.keys(row.errors).length > 0 },
  ]),
  batchers: table("batchers", "Batches", [
    { title: "Of", cell: (row) => row.name },
    number("items", (row) => count(row.items)),
    number("batches", (row) => count(row.batches)),
    number("fill", (row) => share(row.fill)),
    number("waiting", (row) => count(row.waiting)),
    { title: "Sent because", cell: (row) => named(Object.fromEntries(["idle", "full", "linger", "cost", "direct"].filter((why) => row[why]).map((why) => [why, row[why]]))) || "-", kind: "why" },
  ]),
  caches: table("caches", "Caches", [
    { title: "Of", cell: (row) => row.name },
    number("hits", (row) => share(row.ratio)),
    number("holds", (row) => bytes(row.bytes)),
    number("at most", (row) => bytes(row.bound)),
    number("given up", (row) => count(row.evictions)),
  ]),
  lines: table("lines", "Lines that held the event loop", [
    { title: "Line", cell: (row) => row.line },
    number("times", (row) => count(row.blocks)),
    number("in all", (row) => seconds(row.seconds)),
  ]),
  errors: table("errors", "Errors that ended a turn for now", [
    { title: "Error", cell: (row) => row.name },
    number("times", (row) => count(row.count)),
  ]),
  changes: table("changes", "Changes of optimisations", [
    { title: "At", cell: (row) => clock(row.at) },
    { title: "What", cell: (row) => `${row.flag} ${row.on ? "on" : "off"}` },
    { title: "Because", cell: (row) => row.reason, kind: "why" },
  ]),
  moves: table("moves", "Changes of the memory budget", [
    { title: "At", cell: (row) => clock(row.at) },
    { title: "What", cell: (row) => row.what },
    number("from", (row) => (row.what === "shedding" ? row.before : bytes(row.before))),
    number("to", (row) => (row.what === "shedding" ? row.after : bytes(row.after))),
    { title: "Because", cell: (row) => row.reason, kind: "why" },
  ]),
};

// ---- one reply as bars

function waterfall(one) {
  const rows = element("dl", "timings"), whole = Math.max(one.seconds, 1e-9);
  for (const bar of one.stages) {
    const fill = element("i", bar.name === "llm" || bar.name === "first_token" ? "model" : ""), track = element("dd", "track");
    fill.style.left = `min(${(100 * bar.start) / whole}%, 100% - 2px)`;
    fill.style.width = `${(100 * bar.seconds) / whole}%`;
    track.append(fill);
    track.setAttribute("aria-hidden", "true");
    rows.append(element("dt", "", bar.name.replaceAll("_", " ")), track, element("dd", "number", seconds(bar.seconds)));
  }
  return rows;
}

function turn(one) {
  const made = element("details", "turn"), line = element("summary");
  line.append(element("b", "", one.id), element("span", "", seconds(one.seconds)), element("span", "quiet", clock(one.at)));
  if (one.partial.length) line.append(element("span", "missing", `without ${one.partial.join(", ")}`));
  made.append(line, waterfall(one));
  return made;
}

const turns = new Map();

function slowest(list) {
  document.querySelector('[data-empty="slowest"]').hidden = list.length > 0;
  const name = (one) => `${one.at} ${one.id}`;
  const wanted = new Set(list.map(name)), box = $("slowest");
  for (const [known, node] of turns) if (!wanted.has(known)) { node.remove(); turns.delete(known); }
  list.forEach((one, place) => {
    if (!turns.has(name(one))) turns.set(name(one), turn(one));
    const node = turns.get(name(one));
    if (box.children[place] !== node) box.insertBefore(node, box.children[place] ?? null);
  });
}

// ---- the figures

function show(name, text) {
  write(document.querySelector(`[data-show="${name}"]`), text);
}

function fill(name, value, most, label) {
  const node = document.querySelector(`[data-meter="${name}"]`), part = most ? Math.min(1, value / most) : 0;
  node.firstElementChild.style.width = `${100 * part}%`;
  node.classList.toggle("high", part >= 0.9);
  node.setAttribute("role", "meter");
  node.setAttribute("aria-label", label);
  node.setAttribute("aria-valuemin", 0);
  node.setAttribute("aria-valuemax", 100);
  node.setAttribute("aria-valuenow", Math.round(100 * part));
}

function line(value) {
  rates.push(value);
  if (rates.length > HISTORY) rates.shift();
  const most = Math.max(1, ...rates), from = HISTORY - rates.length;
  const points = rates.map((one, at) => `${from + at},${(30 - (28 * one) / most).toFixed(1)}`).join(" ");
  document.querySelector(".spark polyline").setAttribute("points", points);
}

function figures({ traffic, replies, memory, loop }) {
  show("answered", rate(traffic.answered_per_s));
  line(traffic.answered_per_s);
  show("accepted", `${rate(traffic.accepted_per_s)} accepted a second, ${count(traffic.accepted)} in all`);
  show("lost", `${count(traffic.lost)} lost, ${count(traffic.doubled)} answered twice`);
  show("running", `${count(traffic.running)} of ${count(traffic.slots)}`);
  fill("running", traffic.running, traffic.slots, "Turns that run, of those that may");
  show("waiting", `${count(traffic.in_flight)} in flight, ${count(traffic.waiting)} wait${traffic.waiting ? `, the oldest for ${seconds(traffic.oldest_waiting)}` : ""}`);
  show("ours", seconds(replies?.ours?.p99));
  show("model", `the language model's ${seconds(replies?.llm?.p99)}`);
  show("shed", count(traffic.shed));
  show("refused", named(traffic.refused) || "nobody since the start");
  const used = Math.max(memory.rss ?? 0, memory.group ?? 0);
  show("rss", bytes(used || null));
  fill("memory", used, memory.bytes, "Memory used, of the budget");
  show("budget", `of ${bytes(memory.bytes)}`);
  show("lag", seconds(loop?.lag?.p99));
  show("blocked", loop ? `held ${loop.blocked === 1 ? "once" : `${count(loop.blocked)} times`} since the start, at most ${seconds(loop.lag_max)} late` : "not measured");
}

function bottleneck({ resource, share: part, confidence, advice, ranking }) {
  show("limit", resource ? `${resource}: ${share(part)} of all turns' time, ${share(confidence)} sure` : "");
  show("advice", advice);
  tables.ranking(ranking);
}

function problems({ ready, problems: found }) {
  const box = $("problems"), list = box.firstElementChild;
  box.hidden = !found.length;
  found.forEach(({ text }, at) => {
    if (!list.children[at]) list.append(element("li"));
    write(list.children[at], text);
  });
  while (list.children.length > found.length) list.lastElementChild.remove();
  if (!ready) standing("down", "Takes no messages");
  else if (found.length) standing("trouble", `${found.length} to see to`);
  else standing("well", "All is well");
  const kinds = found.map(({ kind }) => kind).join(" ");
  if (kinds !== problems.kinds) status.textContent = found.length ? found.map(({ text }) => text).join(" ") : "All is well.";
  problems.kinds = kinds;
}

function standing(kind, text) {
  state.dataset.state = kind;
  write(state, text);
}

const switches = new Map();

function flags(all) {
  for (const flag of all) {
    if (!switches.has(flag.name)) switches.set(flag.name, lever(flag));
    const { button, told } = switches.get(flag.name);
    const failed = flag.failures ? `, failed ${count(flag.failures)} times` : "";
    write(told, `${flag.does}${failed}${flag.resting ? ", off by itself and tried again" : ""}`);
    told.classList.toggle("missing", flag.resting);
    button.setAttribute("aria-checked", String(flag.on));
    write(button, flag.on ? "on" : "off");
  }
}

function lever({ name, does }) {
  const item = element("li"), button = element("button"), told = element("span", "quiet", does), title = element("b", "", name);
  button.type = "button";
  button.setAttribute("role", "switch");
  button.setAttribute("aria-label", name);
  button.addEventListener("click", () => flip(name, button.getAttribute("aria-checked") !== "true"));
  item.append(title, told, button);
  $("flags").append(item);
  return { button, told };
}

async function flip(name, on) {
  const reason = $("why").value.trim() || "on the operations page";
  const request = { method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body: JSON.stringify({ flags: { [name]: on }, reason }) };
  const response = await fetch("/ops/flags", request).catch(() => null);
  const told = (await response?.json()) ?? { error: { message: "the server cannot be reached" } };
  if (!response?.ok) { status.textContent = told.error.message; return; }
  flags(told.flags);
  tables.changes(changed(told.changes.slice(0, 10)));
  status.textContent = `${name} is ${on ? "on" : "off"}`;
}

const changed = (list) => list.map((one) => ({ key: `${one.at} ${one.flag}`, ...one }));

function draw(snapshot) {
  latest = snapshot;
  $("main").classList.remove("stale");
  for (const part of document.querySelectorAll("[data-needs]")) part.hidden = !(part.dataset.needs in snapshot);
  write($("since"), `up ${lasting(snapshot.uptime_s)}`);
  figures(snapshot);
  problems(snapshot.health);
  if (snapshot.bottleneck) bottleneck(snapshot.bottleneck);
  const { replies } = snapshot;
  if (replies) {
    show("over", `, in the last ${Math.round(replies.over_s)} seconds`);
    tables.replies(["reply", "llm", "ours"].filter((name) => replies[name]).map((name) => ({ key: name, name, ...replies[name] })));
    tables.stages(snapshot.stages);
    tables.lines(snapshot.loop.lines);
    tables.errors(Object.entries(snapshot.errors).map(([name, number]) => ({ name, count: number })));
    slowest(snapshot.slowest);
  }
  tables.endpoints(snapshot.endpoints.map((one, at) => ({ key: at, ...one })));
  tables.batchers(snapshot.batchers);
  tables.caches(snapshot.caches);
  flags(snapshot.flags);
  tables.changes(changed(snapshot.flag_changes));
  tables.moves(snapshot.memory.history.toReversed().map((one) => ({ key: `${one.at} ${one.what}`, ...one })));
}

// ---- the stream

const headers = () => (key.value ? { Authorization: `Bearer ${key.value}` } : {});

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function follow(signal) {
  const response = await fetch("/ops/events", { headers: headers(), signal });
  if (!response.ok) {
    const { error } = await response.json();
    if (response.status === 401 || response.status === 403) return askForKey(error.message);
    throw new Error(error.message);
  }
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    heard = performance.now();
    draw(event);
  }
  throw new Error("the connection ended");
}

async function connect() {
  reading?.abort();
  const controller = (reading = new AbortController());
  heard = performance.now();
  try {
    await follow(controller.signal);
  } catch {
    if (reading !== controller) return;
    lost();
    setTimeout(() => { if (reading === controller && !paused && !document.hidden) connect(); }, 1000);
  }
}

function lost() {
  standing("down", "No connection");
  $("main").classList.add("stale");
  if (problems.kinds !== "lost") status.textContent = "The connection to the server is lost. Trying again.";
  problems.kinds = "lost";
}

function askForKey(why) {
  document.querySelector(".key").hidden = false;
  standing("down", "Needs a key");
  status.textContent = why;
  key.focus();
}

function rest() {
  reading?.abort();
  reading = null;
}

// ---- beginnings

$("who").addEventListener("submit", (event) => { event.preventDefault(); connect(); });
key.addEventListener("change", () => { sessionStorage.setItem("key", key.value); connect(); });
pause.addEventListener("click", () => {
  paused = !paused;
  pause.setAttribute("aria-pressed", String(paused));
  if (paused) { rest(); standing("joining", "Paused"); problems.kinds = "paused"; } else connect();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) rest();
  else if (!paused) connect();
});
$("find").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = $("id").value.trim();
  if (!id) return;
  const response = await fetch(`/ops/turn?id=${encodeURIComponent(id)}`, { headers: headers() }).catch(() => null);
  const told = (await response?.json()) ?? { error: { message: "the server cannot be reached" } };
  const shown = response?.ok ? turn(told) : element("p", "missing", told.error.message);
  if (response?.ok) shown.open = true;
  $("found").replaceChildren(shown);
  status.textContent = response?.ok ? `${id} took ${seconds(told.seconds)}` : told.error.message;
});
setInterval(() => {
  if (reading && performance.now() - heard > PATIENCE && state.dataset.state !== "down") connect();
}, 1000);

key.value = sessionStorage.getItem("key") ?? "";
if (key.value) document.querySelector(".key").hidden = false;
connect();
