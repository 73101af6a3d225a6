// The page around layer.js: drawing and traces, the slider, asking the service, showing what came back.
import { Device } from "./layer.js";

const $ = (id) => document.getElementById(id);
const PEN = 18, STEP = 7; // pixels of the drawing area
const COLOURS = ["#8ab4f8", "#f28b82", "#81c995", "#fdd663", "#c58af9", "#78d9ec"];

// `release` is what Send would send, with all that belongs to it: what comes back is shown only if it still is
export const state = { device: null, raw: null, release: null, policies: [], classes: {}, asked: 0 };

/** The secret that masks are drawn from: made here, kept by this browser, never sent. */
function ownSecret() {
  let text = localStorage.getItem("fedsplit-secret");
  if (!/^[0-9a-f]{64}$/.test(text ?? "")) {
    text = hex(crypto.getRandomValues(new Uint8Array(32)));
    localStorage.setItem("fedsplit-secret", text);
  }
  return Uint8Array.from(text.match(/../g), (byte) => parseInt(byte, 16));
}

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("fedsplit-token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers, redirect: "error" });
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const error = new Error(said.detail ?? `the service answers with status ${response.status}`);
  error.status = response.status;
  throw error;
}

function tell(error) {
  $("problem").textContent = error ? error.message : "";
}

// ------------------------------------------------------------------------------------------------ beginning

async function begin() {
  tell(null);
  try {
    if (!crypto.subtle) throw new Error("browsers compute this over HTTPS or on 127.0.0.1 only");
    const { models } = await (await ask("/v1/models")).json();
    $("entry").hidden = true;
    $("models").replaceChildren(...models.map(({ name }) => new Option(name, name)));
    $("models-row").hidden = models.length < 2;
    state.classes = Object.fromEntries(models.map(({ name, classes }) => [name, classes]));
    await choose(models[0].name);
    $("work").hidden = false;
  } catch (error) {
    if (error.status === 401) $("entry").hidden = false;
    if (error.status !== 401 || sessionStorage.getItem("fedsplit-token")) tell(error);
  }
}

async function choose(name) {
  const [description, weights] = await Promise.all([
    ask(`/demo/models/${name}/device.json`).then((r) => r.json()),
    ask(`/demo/models/${name}/first_layer.safetensors`).then((r) => r.arrayBuffer()),
  ]);
  const digest = hex(new Uint8Array(await crypto.subtle.digest("SHA-256", weights)));
  if (digest !== description.sha256) throw new Error("the first layer is damaged: its SHA-256 is another");
  state.device = new Device(description, weights, ownSecret());
  state.policies = policies(description.dropping, state.device.outputs(new Float64Array(state.device.size)).length);
  $("policy").max = state.policies.length - 1;
  $("policy").value = 0;
  $("drawing").hidden = !side();
  $("trace").hidden = Boolean(side());
  $("trace-shape").textContent = `${state.device.shape.at(-1)} lines of ${state.device.size / state.device.shape.at(-1)}`;
  clear();
}

/** The model's own policy, then others that tell ever more of a record. */
function policies(own, width) {
  const plain = { policy: "none", keep: 1, k: 0, bits: 0, clip: 0, noise: 0 };
  const says = { random: `each output with probability ${own.keep}`, "at-most": `${own.k} outputs at random`,
    "top-k": `the ${own.k} largest outputs`, units: "all outputs", none: "all outputs",
    bits: `all outputs as ${own.bits}-bit codes` };
  const found = [[`as trained: ${says[own.policy] ?? own.policy}`, own]];
  const shares = [...new Set([16, 8, 4, 2].map((part) => Math.max(1, Math.floor(width / part))))];
  for (const k of shares) found.push([`the ${k} largest of ${width} outputs`, { ...plain, policy: "top-k", k }]);
  return [...found, [`nothing is dropped: all ${width} outputs`, plain]];
}

/** The side of a square image; 0 if records are none. */
function side() {
  const { shape, size } = state.device, square = Math.round(Math.sqrt(size));
  if (size < 64) return 0; // a row of a table
  const flat = shape.length === 1 || (shape.length === 2 ? shape[0] === shape[1] : shape[0] === 1);
  return flat && square * square === size ? square : 0;
}

// -------------------------------------------------------------------------------------------------- a record

const pen = { down: false, x: 140, y: 140 };

function clear() {
  const area = $("draw"), context = area.getContext("2d");
  context.clearRect(0, 0, area.width, area.height);
  Object.assign(pen, { down: false, x: 140, y: 140 });
  state.raw = null;
  $("file").value = "";
  drawTrace($("lines"), null);
  forgetAnswer();
  show();
}

function stroke(x, y) {
  const context = $("draw").getContext("2d");
  Object.assign(context, { lineWidth: PEN, lineCap: "round", strokeStyle: "#fff" });
  context.beginPath();
  context.moveTo(pen.x, pen.y);
  context.lineTo(x, y);
  context.stroke();
}

function move(x, y) {
  if (pen.down) stroke(x, y);
  Object.assign(pen, { x, y });
}

function place(event) {
  const box = $("draw").getBoundingClientRect();
  return [((event.clientX - box.left) * 280) / box.width, ((event.clientY - box.top) * 280) / box.height];
}

$("draw").addEventListener("pointerdown", (event) => {
  $("draw").setPointerCapture(event.pointerId);
  [pen.x, pen.y] = place(event);
  pen.down = true;
  move(pen.x + 0.1, pen.y);
});
$("draw").addEventListener("pointermove", (event) => event.buttons && pen.down && move(...place(event)));
for (const end of ["pointerup", "pointercancel"]) {
  $("draw").addEventListener(end, () => {
    if (!pen.down) return;
    pen.down = false;
    drawn();
  });
}
$("draw").addEventListener("keydown", (event) => {
  const before = pen.down;
  const to = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key];
  if (to) {
    move(Math.min(280, Math.max(0, pen.x + to[0])), Math.min(280, Math.max(0, pen.y + to[1])));
  } else if (event.key === " ") {
    pen.down = !pen.down;
    move(pen.x, pen.y + 0.1);
  } else if (event.key === "Escape") {
    clear();
    return;
  } else {
    return;
  }
  event.preventDefault();
  $("pen").textContent = `Pen ${pen.down ? "down" : "up"} at ${pen.x}, ${Math.round(pen.y)}.`;
  if (before || pen.down) drawn();
});

/** Take what was drawn as a record, centred and sized as MNIST's digits are. */
function drawn() {
  const area = $("draw"), pixels = area.getContext("2d").getImageData(0, 0, 280, 280).data, n = side();
  let [left, top, right, bottom, mass, x, y] = [280, 280, -1, -1, 0, 0, 0];
  for (let i = 0; i < 280 * 280; i++) {
    const ink = pixels[4 * i + 3], [column, row] = [i % 280, Math.floor(i / 280)];
    if (!ink) continue;
    [left, top] = [Math.min(left, column), Math.min(top, row)];
    [right, bottom] = [Math.max(right, column), Math.max(bottom, row)];
    [mass, x, y] = [mass + ink, x + ink * column, y + ink * row];
  }
  if (!mass) return;
  const scale = (n * 20) / 28 / Math.max(right - left + 1, bottom - top + 1);
  const small = new OffscreenCanvas(n, n), context = small.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(area, n / 2 - (x / mass) * scale, n / 2 - (y / mass) * scale, 280 * scale, 280 * scale);
  const gray = context.getImageData(0, 0, n, n).data, { high } = state.device.description.scaling;
  const most = Number.isFinite(Number(high)) ? Number(high) : 1;
  state.raw = Float64Array.from({ length: n * n }, (_, i) => Math.round((gray[4 * i + 3] / 255) * most * 255) / 255);
  if (most >= 16) state.raw = state.raw.map(Math.round); // whole numbers, as the data set's
  forgetAnswer();
  show();
}

/** Take moments (lines) of channels as a record. */
function taken(moments) {
  const { shape, size } = state.device, length = shape.at(-1), channels = size / length;
  if (moments.length !== length || moments.some((line) => line.length !== channels || !line.every(Number.isFinite))) {
    throw new Error(`a trace must have ${length} lines of ${channels} numbers`);
  }
  state.raw = Float64Array.from({ length: size }, (_, i) => Math.fround(moments[i % length][Math.floor(i / length)]));
  drawTrace($("lines"), state.raw);
  forgetAnswer();
  show();
}

$("file").addEventListener("change", async () => {
  tell(null);
  try {
    const [file] = $("file").files;
    if (file.size > 1e6) throw new Error("a trace may have 1 MB at most");
    const lines = (await file.text()).split(/\r?\n/).filter((line) => line.trim());
    taken(lines.map((line) => line.split(",").map((cell) => (cell.trim() ? Number(cell) : NaN))));
  } catch (error) {
    tell(error);
  }
});

$("example").addEventListener("click", () => {
  const { shape, size, description: { scaling } } = state.device, length = shape.at(-1), channels = size / length;
  const at = (numbers, c) => numbers[numbers.length === 1 ? 0 : c];
  taken(Array.from({ length }, (_, t) => Array.from({ length: channels }, (_, c) =>
    at(scaling.subtract, c) + at(scaling.divide, c) * Math.sin((2 * Math.PI * t * (c % 3 + 1)) / length + c))));
});

function drawTrace(canvas, raw, low, high) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!raw) return;
  const length = state.device.shape.at(-1), record = state.device.scaled(raw);
  const [bottom, top] = [low ?? Math.min(...record), high ?? Math.max(...record)];
  for (let c = 0; c < record.length / length; c++) {
    context.strokeStyle = COLOURS[c % COLOURS.length];
    context.lineWidth = canvas.width / 280;
    context.beginPath();
    for (let t = 0; t < length; t++) {
      const share = (record[c * length + t] - bottom) / (top - bottom || 1);
      context.lineTo((t * canvas.width) / (length - 1), canvas.height * (0.95 - 0.9 * share));
    }
    context.stroke();
  }
}

// ------------------------------------------------------------------------------------------------ what leaves

async function show() {
  const [says, dropping] = state.policies[$("policy").value], { raw, device } = state, number = ++state.asked;
  state.release = null; // until there is another one nothing can be sent
  $("policy-says").textContent = says;
  $("policy").setAttribute("aria-valuetext", says);
  $("send").disabled = true;
  if (!raw) {
    $("leaves").textContent = "Nothing yet.";
    $("bytes").textContent = "";
    return;
  }
  let release;
  try {
    release = await device.release(raw, dropping);
  } catch (error) {
    tell(error);
    return;
  }
  if (number !== state.asked) return; // something newer is being looked at
  state.release = { ...release, dropping, raw, device };
  $("leaves").textContent = `${release.payload.length} bytes: ${release.sent} of ${release.width} outputs, none of the ` +
    `record's ${device.size} numbers.`;
  $("bytes").textContent = hex(release.payload).match(/.{1,4}/g).join(" ");
  $("send").disabled = false;
}

function forgetAnswer() {
  for (const id of ["answer", "attack"]) $(id).textContent = "-";
  $("scores").hidden = $("pictures").hidden = true;
}

$("policy").addEventListener("input", () => {
  forgetAnswer();
  show();
});

// ----------------------------------------------------------------------------------------------- what comes back

$("send").addEventListener("click", async () => {
  tell(null);
  $("send").disabled = true;
  const mine = state.release, { payload, dropping, device: { description } } = mine;
  const options = { method: "POST", body: payload, headers: { "Content-Type": "application/octet-stream" } };
  try {
    const { outputs: [outputs] } = await (await ask(`/v1/models/${description.model}/predict`, options)).json();
    if (mine !== state.release) return; // the record, the policy or the model is another by now
    answered(outputs, state.classes[description.model]);
    $("attack").textContent = "Attacking what was sent (some seconds) ...";
    const { policy, keep, k, bits } = dropping;
    const query = new URLSearchParams({ policy, keep, k, bits });
    const found = await (await ask(`/demo/models/${description.model}/attack?${query}`, options)).json();
    if (mine === state.release) attacked(mine, found);
  } catch (error) {
    if (mine !== state.release) return;
    tell(error);
    $("attack").textContent = "-";
  } finally {
    $("send").disabled = !state.release;
  }
});

function answered(outputs, classes) {
  if (classes && outputs.length > 1) {
    const most = Math.max(...outputs), weights = outputs.map((v) => Math.exp(v - most));
    const sum = weights.reduce((a, b) => a + b, 0), order = [...outputs.keys()].sort((a, b) => outputs[b] - outputs[a]);
    $("answer").textContent = `${order[0]}`;
    $("scores").tBodies[0].replaceChildren(...order.slice(0, 3).map((c) => {
      const row = document.createElement("tr");
      for (const text of [c, `${((100 * weights[c]) / sum).toFixed(1)} %`]) row.insertCell().textContent = text;
      return row;
    }));
    $("scores").hidden = false;
  } else {
    $("answer").textContent = classes ? `${Number(outputs[0] > 0)}` : outputs.map((v) => v.toPrecision(4)).join(", ");
  }
  $("answer").className = "large";
}

function attacked({ raw, device }, { guesses, without, peak }) {
  const record = device.scaled(raw);
  const psnr = (guess) => 10 * Math.log10(peak ** 2 / Math.max(1e-12, guess.reduce((sum, v, i) => sum + (v - record[i]) ** 2, 0) / guess.length));
  const closest = (all) => Object.entries(all).map(([name, guess]) => [psnr(guess), name, guess]).sort((a, b) => b[0] - a[0])[0];
  const [before, nothing, guess] = closest(without), [after, name, reconstruction] = closest({ ...without, ...guesses });
  $("attack").textContent = name === nothing
    ? `No attack comes closer than the best guess without the upload, ${before.toFixed(1)} dB.`
    : `The closest, "${name}", reaches ${after.toFixed(1)} dB; the best guess without the upload ${before.toFixed(1)} dB.`;
  $("guess-says").textContent = `without the upload (${nothing}), ${before.toFixed(1)} dB`;
  $("reconstruction-says").textContent = `with it (${name}), ${after.toFixed(1)} dB`;
  $("pictures").hidden = false;
  for (const [id, values] of [["original", record], ["guess", guess], ["reconstruction", reconstruction]]) picture($(id), values, record);
}

function picture(canvas, values, record) {
  const n = side();
  if (!n) {
    [canvas.width, canvas.height] = [280, 160];
    drawTrace(canvas, state.device.unscaled(values), Math.min(...record), Math.max(...record));
    return;
  }
  canvas.width = canvas.height = n;
  const context = canvas.getContext("2d"), image = context.createImageData(n, n), most = Math.max(...record, 1e-9);
  values.forEach((v, i) => image.data.set([...new Array(3).fill(255 * Math.min(1, Math.max(0, v / most))), 255], 4 * i));
  context.putImageData(image, 0, 0);
}

$("clear").addEventListener("click", clear);
$("models").addEventListener("change", () => choose($("models").value).catch(tell));
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("fedsplit-token", $("token").value.trim());
  begin();
});
begin();
