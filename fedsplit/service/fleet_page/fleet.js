// The devices that a model watches: their scores over time, asked for again and again.

const $ = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
const QUIET = 30; // seconds
const WIDTH = 400, HEIGHT = 110;
let model = null;

async function ask(path) {
  const token = sessionStorage.getItem("fedsplit-token");
  const response = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {}, redirect: "error" });
  if (response.ok) return response.json();
  const said = await response.json().catch(() => ({}));
  const error = new Error(said.detail ?? `the service answers with status ${response.status}`);
  error.status = response.status;
  throw error;
}

async function begin() {
  try {
    const models = (await ask("/v1/models")).models.filter(({ watches }) => watches);
    $("entry").hidden = true;
    $("models").replaceChildren(...models.map(({ name }) => new Option(name, name)));
    $("models-row").hidden = models.length < 2;
    model = models[0].name;
    await look();
  } catch (error) {
    if (error.status === 401) $("entry").hidden = false;
    if (error.status !== 401 || sessionStorage.getItem("fedsplit-token")) $("problem").textContent = error.message;
  }
}

async function look() {
  try {
    const { devices, now } = await ask(`/v1/models/${model}/devices`);
    $("problem").textContent = "";
    $("devices").replaceChildren(...devices.map((device) => card(device, now)));
    const alarms = devices.filter(alarmed).length, quiet = devices.filter((device) => silent(device, now)).length;
    $("summary").textContent = `${devices.length} devices, ${alarms} with an alarm now${quiet ? `, ${quiet} silent` : ""}`;
  } catch (error) {
    $("problem").textContent = error.message;
  }
  setTimeout(look, EVERY);
}

const alarmed = ({ episodes }) => episodes.length > 0 && episodes.at(-1)[2];

/** Whether a device that has sent episodes sends none any more: what it showed last says nothing of now. */
const silent = ({ episodes, seconds }, now) =>
  episodes.length > 0 && now - episodes.at(-1)[0] > Math.max(QUIET, 3 * seconds);

/** One device's section. */
function card(device, now) {
  const section = document.createElement("section"), title = document.createElement("h2");
  const state = document.createElement("span"), figures = document.createElement("p");
  title.textContent = device.name;
  state.className = "state";
  const last = device.episodes.at(-1);
  state.textContent = !last ? "calibrated" : last[2] ? "ALARM" : "normal";
  if (silent(device, now)) state.textContent += `, silent since ${Math.round(now - last[0])} s`;
  section.className = last?.[2] ? "alarm" : "";
  const count = device.episodes.filter(([, , alarm]) => alarm).length;
  figures.textContent = last
    ? `score ${last[1].toFixed(2)}, threshold ${device.threshold.toFixed(2)}; ${count} of ${device.episodes.length} above it`
    : `threshold ${device.threshold.toFixed(2)}; nothing sent yet`;
  section.append(title, state, figures, chart(device));
  return section;
}

function chart({ name, threshold, episodes }) {
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Scores of ${name} over time` });
  const times = episodes.map(([time]) => time), scores = episodes.map(([, score]) => score);
  const first = times[0] ?? 0, span = Math.max(1, (times.at(-1) ?? 1) - first);
  const top = 1.1 * Math.max(threshold, ...scores);
  const x = (time) => 4 + ((time - first) / span) * (WIDTH - 8), y = (score) => HEIGHT - 4 - (score / top) * (HEIGHT - 8);
  svg.append(drawn("line", { class: "limit", x1: 0, x2: WIDTH, y1: y(threshold), y2: y(threshold) }));
  svg.append(drawn("polyline", { class: "score", points: episodes.map(([t, s]) => `${x(t)},${y(s)}`).join(" ") }));
  for (const [time, score, alarm] of episodes)
    if (alarm) svg.append(drawn("circle", { class: "dot", cx: x(time), cy: y(score), r: 3 }));
  return svg;
}

function drawn(kind, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("fedsplit-token", $("token").value.trim());
  begin();
});
$("models").addEventListener("change", () => (model = $("models").value));
begin();
