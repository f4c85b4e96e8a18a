// The chat page. Everything a user or a model wrote enters the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const talk = $("talk"), scroller = $("scroll"), text = $("text"), send = $("send"), stop = $("stop");
const name = $("name"), key = $("key"), status = $("status");

let underWay = null; // the AbortController of the answer that is being streamed

function element(tag, className = "", content = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(content);
  return made;
}

function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- talking to the server

class Refused extends Error {
  constructor(error = {}, status = 0) {
    super(error.message || "");
    this.code = error.code || `http_${status}`;
  }
}

function headers(id) {
  const all = { "Content-Type": "application/json", "Idempotency-Key": id };
  if (key.value) all.Authorization = `Bearer ${key.value}`;
  return all;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function ask(words, user, id, signal, onText) {
  const body = { model: "whisper-fast", stream: true, messages: [{ role: "user", content: words }] };
  if (user) body.user = user;
  const request = { method: "POST", headers: headers(id), body: JSON.stringify(body), signal };
  const response = await fetch("/v1/chat/completions", request);
  if (!response.ok) throw new Refused((await response.json().catch(() => ({}))).error, response.status);
  let extra = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return extra;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error);
    const piece = chunk.choices?.[0]?.delta?.content;
    if (piece) onText(piece);
    extra = chunk.whisper_fast ?? extra;
  }
  throw new TypeError("the connection broke");
}

// ---- what stands under an answer

function meter(className, from, to, label, value, least) {
  const track = element("span", `meter ${className}`);
  const fill = element("i", value < 0 ? "low" : "");
  fill.style.left = `${100 * from}%`;
  fill.style.width = `${100 * (to - from)}%`;
  track.append(fill);
  track.setAttribute("role", "meter");
  track.setAttribute("aria-label", label);
  track.setAttribute("aria-valuemin", least);
  track.setAttribute("aria-valuemax", 1);
  track.setAttribute("aria-valuenow", value.toFixed(2));
  return track;
}

function mood(emotion) {
  const made = element("span", "mood");
  if ("valence" in emotion) {
    const value = Math.max(-1, Math.min(1, emotion.valence));
    const word = value > 0.6 ? "very bright" : value > 0.15 ? "bright" : value < -0.6 ? "very low" : value < -0.15 ? "low" : "even";
    const middle = 0.5 + value / 2;
    made.append(meter("", Math.min(0.5, middle), Math.max(0.5, middle), `emotion: ${word}`, value, -1), `sounds ${word}`);
    return made;
  }
  const [[strongest, strength] = ["even", 0]] = Object.entries(emotion).sort((a, b) => b[1] - a[1]);
  const share = Math.max(0, Math.min(1, strength));
  made.append(meter("share", 0, share, `emotion: ${strongest}`, share, 0), strongest);
  return made;
}

function milliseconds(seconds) {
  const ms = 1000 * seconds;
  return `${ms >= 100 ? ms.toFixed(0) : ms >= 1 ? ms.toFixed(1) : ms.toFixed(2)} ms`;
}

function remembered(memories) {
  const box = element("section");
  box.append(element("h2", "", "Recalled"));
  if (!memories.length) {
    box.append(element("p", "none", "Nothing said before seemed to matter here."));
    return box;
  }
  const list = element("ul", "memories");
  list.tabIndex = 0;
  list.setAttribute("aria-label", "Recalled memories");
  for (const memory of memories) {
    const item = element("li");
    const quote = element("q", "", memory.text);
    quote.dir = "auto";
    const when = new Date(1000 * memory.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    item.append(quote, element("small", "", memory.scope === "dm" ? when : `${when}, ${memory.scope}`));
    list.append(item);
  }
  box.append(list);
  return box;
}

// Laps follow one another; all other parts run within one of them: the first token within the model's, components
// while everything that is known is gathered.
const LAPS = ["journal", "lane", "gather", "llm"];

function starts(timings) {
  const start = {};
  let at = 0;
  for (const lap of LAPS) {
    start[lap] = at;
    at += timings[lap] ?? 0;
  }
  for (const part of Object.keys(timings)) start[part] ??= part === "first_token" ? start.llm : start.gather;
  return start;
}

function waterfall({ total, ...timings }) {
  const box = element("section"), rows = element("dl", "timings"), start = starts(timings);
  const whole = Math.max(total ?? 0, ...Object.keys(timings).map((part) => start[part] + timings[part]), 1e-9);
  const parts = Object.keys(timings).sort((a, b) => start[a] - start[b] || LAPS.includes(b) - LAPS.includes(a));
  for (const part of parts) {
    const bar = element("i"), track = element("dd", "track");
    bar.style.left = `min(${(100 * start[part]) / whole}%, 100% - 2px)`;
    bar.style.width = `${(100 * timings[part]) / whole}%`;
    track.append(bar);
    track.setAttribute("aria-hidden", "true");
    rows.append(element("dt", "", part.replaceAll("_", " ")), track, element("dd", "ms", milliseconds(timings[part])));
  }
  box.append(element("h2", "", "Time taken"));
  box.append(rows);
  return box;
}

function about({ emotion, memories, partial, timings }) {
  const made = element("details", "about");
  made.open = localStorage.getItem("about") !== "closed";
  const line = element("summary");
  line.addEventListener("click", () => localStorage.setItem("about", made.open ? "closed" : "open"));
  if (emotion) line.append(mood(emotion));
  line.append(element("span", "", memories.length ? `${memories.length} recalled` : "nothing recalled"));
  if (timings.total !== undefined) line.append(element("span", "", milliseconds(timings.total)));
  if (partial.length) line.append(element("span", "missing", `without ${partial.join(", ")}`));
  const inside = element("div", "inside");
  inside.append(remembered(memories));
  if (Object.keys(timings).length) inside.append(waterfall(timings));
  made.append(line, inside);
  return made;
}

// ---- when it does not work

const KIND = {
  overloaded: "There is a lot going on just now. A moment later it should work.",
  rate_limit_exceeded: "The language model asks for a pause.",
  llm_timeout: "The language model took too long.",
  llm_unavailable: "The language model cannot be reached.",
  llm_rejected: "The language model did not accept this.",
  llm_protocol_error: "The language model gave an answer that makes no sense.",
  shutting_down: "The server is being stopped. Your message is kept.",
  store_full: "The server has no space left to remember this.",
  message_too_large: "This message is too long.",
  request_too_large: "This message is too long.",
  invalid_api_key: "This server asks for an API key.",
  user_not_allowed: "This API key is a person of its own: leave the name empty.",
};

function trouble(error, retry) {
  const made = element("div", "trouble"), words = element("div");
  const unreachable = error instanceof TypeError;
  words.append(unreachable ? "The server cannot be reached. Is it still running?" : KIND[error.code] || "This did not work.");
  if (error.message && !unreachable) words.append(element("small", "", error.message));
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", retry);
  made.setAttribute("role", "alert");
  made.append(words, again);
  return made;
}

// ---- one turn

function nearEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
}

function follow(change) {
  const stay = nearEnd();
  change();
  if (stay) scroller.scrollTop = scroller.scrollHeight;
}

// Brings more of what was added into view, but never moves the beginning of the turn out of it.
function reveal(turn) {
  const room = turn.getBoundingClientRect().top - scroller.getBoundingClientRect().top - 16;
  const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  if (room > 0) scroller.scrollTop += Math.min(room, below);
}

function begin(words) {
  $("welcome").hidden = true;
  for (const earlier of talk.querySelectorAll(".about[open]")) earlier.open = false;
  const turn = element("li", "turn"), said = element("p", "said", words);
  said.dir = "auto";
  turn.append(said);
  talk.append(turn);
  const id = freshId(), user = name.value.trim();
  attempt(turn, words, user, id);
  scroller.scrollTop = scroller.scrollHeight;
}

async function attempt(turn, words, user, id) {
  const controller = (underWay = new AbortController());
  const answer = element("article", "answer"), prose = element("p"), dots = element("span", "waiting");
  dots.append(element("i"), element("i"), element("i"));
  prose.dir = "auto";
  answer.setAttribute("aria-label", "Answer");
  answer.setAttribute("aria-busy", "true");
  answer.append(prose, dots);
  follow(() => turn.append(answer));
  busy(true);
  status.textContent = "Answering";
  try {
    const extra = await ask(words, user, id, controller.signal, (piece) => follow(() => {
      dots.remove();
      answer.classList.add("streaming");
      prose.append(piece);
    }));
    if (extra) answer.append(about(extra));
    reveal(turn);
    status.textContent = prose.textContent;
  } catch (error) {
    status.textContent = "";
    follow(() => answer.append(controller.signal.aborted ? element("div", "note", "Stopped.") : trouble(error, () => {
      answer.remove();
      attempt(turn, words, user, id);
      text.focus();
    })));
    if (error.code === "invalid_api_key") askForKey();
  } finally {
    dots.remove();
    answer.classList.remove("streaming");
    answer.setAttribute("aria-busy", "false");
    underWay = null;
    busy(false);
  }
}

function busy(streaming) {
  send.hidden = streaming;
  stop.hidden = !streaming;
  for (const button of document.querySelectorAll(".trouble button")) button.disabled = streaming;
  allow();
}

function allow() {
  send.disabled = !text.value.trim() || underWay !== null;
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
  allow();
}

function askForKey() {
  document.querySelector(".key").hidden = false;
  key.focus();
}

function submit() {
  const words = text.value.trim();
  if (!words || underWay) return;
  text.value = "";
  grow();
  text.focus();
  begin(words);
}

// ---- beginnings

$("who").addEventListener("submit", (event) => { event.preventDefault(); text.focus(); });
$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
stop.addEventListener("click", () => { underWay?.abort(); text.focus(); });
text.addEventListener("input", grow);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") underWay?.abort(); });
name.addEventListener("input", () => localStorage.setItem("name", name.value));
key.addEventListener("input", () => sessionStorage.setItem("key", key.value));
for (const starter of document.querySelectorAll(".starters button")) {
  starter.addEventListener("click", () => { text.value = starter.textContent; grow(); text.focus(); });
}

async function welcome() {
  const state = await fetch("/readyz").then((answer) => answer.json());
  if (state.llm) $("model").textContent = state.llm;
  const models = await fetch("/v1/models", key.value ? { headers: { Authorization: `Bearer ${key.value}` } } : {});
  if (models.status === 401) askForKey();
}

name.value = localStorage.getItem("name") ?? "";
key.value = sessionStorage.getItem("key") ?? "";
if (key.value) document.querySelector(".key").hidden = false;
grow();
text.focus();
welcome().catch(() => { $("model").textContent = "The server cannot be reached. Is it still running?"; });
