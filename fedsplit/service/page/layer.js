// A device's half of a prediction in plain JavaScript: scaling, first layer, dropping, wire. Byte for byte what
// fedsplit.device.predictor sends for the same record and secret (tests/test_demo.py), but for the guard and the
// ledgers, which a page cannot keep.
//
// Sums are in float64, as there; only then are they rounded to float32 and float16.

const MAGIC = [0x66, 0x73], VERSION = 2, QUERY = 4; // fedsplit/packing.py, fedsplit/wire.py
const F4 = 0, F2 = 1, I8 = 3, U1 = 4, U2 = 5, U4 = 6, I2 = 8; // codes of the table's dtypes
const TOP = 15;
const ACTIVATIONS = {
  relu: (v) => Math.max(v, 0),
  leaky_relu: (v) => (v < 0 ? 0.01 * v : v),
  tanh: Math.tanh,
  sigmoid: (v) => 1 / (1 + Math.exp(-v)),
  identity: (v) => v,
};

/** Read a safetensors file of float32 tensors: {name: {shape, values}}. */
export function readTensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: [start, stop] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new Error(`tensor ${name} must be F32, it is ${dtype}`);
    found[name] = { shape, values: new Float32Array(buffer.slice(8 + length + start, 8 + length + stop)) };
  }
  return found;
}

export class Device {
  /**
   * @param {object} description what device.json says
   * @param {ArrayBuffer} weights first_layer.safetensors
   * @param {Uint8Array} secret 32 bytes that the server does not have
   */
  constructor(description, weights, secret) {
    const { activation, numbers } = description.layer;
    if (!(activation in ACTIVATIONS) || numbers) {
      throw new Error(`activation ${activation}${numbers ? " of these numbers" : ""} is not for this page`);
    }
    if (description.dropping.fields) throw new Error(`policy ${description.dropping.policy} is not for this page`);
    this.description = description;
    this.shape = description.layer.input_shape;
    this.size = this.shape.reduce((a, b) => a * b, 1);
    this.tensors = readTensors(weights);
    this.secret = secret;
    this.relu = description.layer.activation === "relu";
  }

  /** Return the record that the network takes, from raw numbers. */
  scaled(raw) {
    const { subtract, divide } = this.description.scaling;
    return Float32Array.from(raw, (v, i) => (v - this.#at(subtract, i)) / this.#at(divide, i));
  }

  /** Return raw numbers from a record. */
  unscaled(record) {
    const { subtract, divide } = this.description.scaling;
    return Float64Array.from(record, (v, i) => v * this.#at(divide, i) + this.#at(subtract, i));
  }

  /** Return the scaling's number for a record's i-th number: one for all, or one for each of its first axis. */
  #at(numbers, i) {
    return numbers[numbers.length === 1 ? 0 : Math.floor(i / (this.size / this.shape[0]))];
  }

  #check(raw) {
    const { low, high } = this.description.scaling;
    if (raw.length !== this.size) throw new Error(`a record must have ${this.size} numbers, it has ${raw.length}`);
    if (!raw.every((v) => Number.isFinite(Math.fround(v)))) throw new Error("a record's numbers must be finite");
    if (raw.some((v) => v < Number(low) || v > Number(high))) throw new Error(`numbers must be ${low} to ${high}`);
  }

  /** Return all outputs of the first layer as float32, which only dropping may see. */
  outputs(raw) {
    const { kind, activation } = this.description.layer;
    const x = this.scaled(raw);
    const before = kind === "Linear" ? this.#linear(x) : this.#convolution(x);
    return Float32Array.from(before, ACTIVATIONS[activation]);
  }

  #linear(x) {
    const { weight, bias } = this.tensors;
    const [rows, columns] = weight.shape, times = this.size / columns; // a layer along the last axis, or over all
    const found = new Float64Array(times * rows);
    for (let t = 0; t < times; t++) {
      for (let o = 0; o < rows; o++) {
        let sum = bias ? bias.values[o] : 0;
        for (let i = 0; i < columns; i++) sum += weight.values[o * columns + i] * x[t * columns + i];
        found[t * rows + o] = sum;
      }
    }
    return found;
  }

  #convolution(x) {
    const { weight, bias } = this.tensors, { arguments: given } = this.description.layer;
    // one axis is two, of which the first has one number
    const two = (name, filler) => (given[name].length === 1 ? [filler, given[name][0]] : given[name]);
    const [sy, sx] = two("stride", 1), [py, px] = two("padding", 0), [dy, dx] = two("dilation", 1);
    const [ky, kx] = two("kernel_size", 1), [outs, each] = weight.shape;
    const [height, width] = this.shape.length === 2 ? [1, this.shape[1]] : this.shape.slice(1);
    const rows = Math.floor((height + 2 * py - dy * (ky - 1) - 1) / sy) + 1;
    const columns = Math.floor((width + 2 * px - dx * (kx - 1) - 1) / sx) + 1;
    const found = new Float64Array(outs * rows * columns);
    for (let o = 0; o < outs; o++) {
      const first = Math.floor((o * given.groups) / outs) * each; // its group's first channel
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          let sum = bias ? bias.values[o] : 0;
          for (let i = 0; i < each; i++) {
            for (let a = 0; a < ky; a++) {
              const y = r * sy - py + a * dy;
              if (y < 0 || y >= height) continue;
              for (let b = 0; b < kx; b++) {
                const z = c * sx - px + b * dx;
                if (z < 0 || z >= width) continue;
                sum += weight.values[((o * each + i) * ky + a) * kx + b] * x[((first + i) * height + y) * width + z];
              }
            }
          }
          found[(o * rows + r) * columns + c] = sum;
        }
      }
    }
    return found;
  }

  /** Return {payload, sent, width}: the packed query of one raw record, under a policy (default: the model's own). */
  async release(raw, dropping = this.description.dropping) {
    this.#check(raw);
    const outputs = coded(this.outputs(raw), dropping), width = outputs.length;
    const mask = await this.#mask(raw, outputs, dropping);
    const sent = [...mask.keys()].filter((i) => mask[i] && (!this.relu || outputs[i] !== 0));
    const bitmap = new Uint8Array(Math.ceil(width / 8));
    for (const i of sent) bitmap[i >> 3] |= 1 << (i & 7);
    const values = Float32Array.from(sent, (i) => outputs[i]);
    const layer = new BigInt64Array([BigInt(`0x${this.description.model}`)]);
    const arrays = [
      [I8, [1], layer],
      [U4, [2], new Uint32Array([width, dropping.bits])],
      width <= 0xffff ? [U2, [1], new Uint16Array([sent.length])] : [U4, [1], new Uint32Array([sent.length])],
      [U1, [1, bitmap.length], bitmap],
      ...packedValues(values, dropping.bits, this.description.dtype),
    ];
    return { payload: packed(QUERY, arrays), sent: sent.length, width };
  }

  async #mask(raw, outputs, dropping) {
    const width = outputs.length;
    switch (dropping.policy) {
      case "random": {
        const words = new Uint16Array((await this.#stream(raw, 2 * width)).buffer, 0, width);
        const exact = dropping.keep * 65536, low = Math.floor(exact), rest = exact - low;
        const threshold = Math.max(1, low + (rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? 1 : 0));
        return Array.from(words, (word) => word < threshold);
      }
      case "at-most":
        return smallest(new Uint32Array((await this.#stream(raw, 4 * width)).buffer, 0, width), dropping.k);
      case "top-k":
        return smallest(outputs.map((v) => -Math.abs(v)), dropping.k);
      case "none": case "units": case "bits":
        return new Array(width).fill(true);
      default: // and nothing leaves
        throw new Error(`policy ${dropping.policy} is not for this page`);
    }
  }

  /** Return the record's own pseudo-random bytes: AES-256 of counter blocks (purpose 0, round 0, record, counter). */
  async #stream(raw, length) {
    const content = Float32Array.from(raw, (v) => v + 0); // -0 is 0
    const hmac = { name: "HMAC", hash: "SHA-256" }, from = (usage, algorithm) =>
      crypto.subtle.importKey("raw", this.secret, algorithm, false, [usage]);
    const name = await crypto.subtle.sign("HMAC", await from("sign", hmac), content);
    const record = new DataView(name).getUint32(0, true);
    const hkdf = { name: "HKDF", hash: "SHA-256", salt: new Uint8Array(0) };
    const info = new TextEncoder().encode("fedsplit device 0");
    const root = await from("deriveKey", "HKDF"), aes = { name: "AES-CTR", length: 256 };
    const key = await crypto.subtle.deriveKey({ ...hkdf, info }, root, aes, false, ["encrypt"]);
    const blocks = [...Array(Math.ceil(length / 16)).keys()].map((number) => {
      // the key stream's first block is AES of the counter itself
      const counter = new Uint8Array(new Uint32Array([0, 0, record, number]).buffer);
      return crypto.subtle.encrypt({ name: "AES-CTR", counter, length: 128 }, key, new Uint8Array(16));
    });
    const found = new Uint8Array(16 * blocks.length);
    (await Promise.all(blocks)).forEach((block, number) => found.set(new Uint8Array(block), 16 * number));
    return found;
  }
}

/** Round relu outputs up to the levels of `bits`-bit codes; other policies leave them as they are. */
function coded(outputs, { policy, bits }) {
  if (policy !== "bits") return outputs;
  const step = 2 ** (1 - bits);
  return outputs.map((v) => Math.min(Math.ceil(v / step), 2 ** bits - 1) * step);
}

/** Mark the k smallest keys; ties take the lower index. */
function smallest(keys, k) {
  const order = [...keys.keys()].sort((a, b) => keys[a] - keys[b] || a - b);
  const found = new Array(keys.length).fill(false);
  for (const i of order.slice(0, k)) found[i] = true;
  return found;
}

function packedValues(values, bits, dtype) {
  if (bits) {
    const levels = values.map((v) => v * 2 ** (bits - 1));
    const bytes = new Uint8Array(bits === 1 ? 0 : Math.ceil((levels.length * bits) / 8)); // one-bit codes are all 1
    for (let i = 0; bits > 1 && i < levels.length; i++) {
      for (let b = 0; b < bits; b++) {
        const place = i * bits + b;
        if (((levels[i] - 1) >> b) & 1) bytes[place >> 3] |= 1 << (place & 7);
      }
    }
    return [[U1, [bytes.length], bytes], [I2, [0], new Int16Array(0)]];
  }
  if (dtype === "float32") return [[F4, [values.length], values], [I2, [1], new Int16Array(1)]];
  const largest = values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);
  const exponent = largest > 0 ? exponentOf(largest) - TOP : 0;
  const halves = Uint16Array.from(values, (v) => toHalf(v * 2 ** -exponent));
  return [[F2, [halves.length], halves], [I2, [1], new Int16Array([exponent])]];
}

/** Return e of v = m * 2^e with m in [0.5, 1), for a positive float32. */
function exponentOf(v) {
  const bits = new DataView(new ArrayBuffer(8));
  bits.setFloat64(0, v); // no float32 is subnormal as float64
  return ((bits.getUint32(0) >> 20) & 0x7ff) - 1022;
}

/** Return the bits of the float16 that is nearest to a number below 2^15, ties to even. */
function toHalf(v) {
  const sign = v < 0 || Object.is(v, -0) ? 0x8000 : 0, size = Math.abs(v);
  if (size === 0) return sign;
  const exponent = Math.max(exponentOf(size) - 1, -14); // of the leading bit; below -14 steps no longer shrink
  const steps = size / 2 ** (exponent - 10), low = Math.floor(steps), rest = steps - low;
  const rounded = low + (rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? 1 : 0);
  // a carry into the exponent is right by itself; without a leading 1 the number is subnormal
  return sign | (rounded < 1024 ? rounded : ((exponent + 15) << 10) + (rounded - 1024));
}

/** Put arrays of [dtype, shape, typed array] into a payload; see fedsplit/packing.py. */
function packed(kind, arrays) {
  const table = [...MAGIC, VERSION, kind, ...little(arrays.length, 2)];
  for (const [dtype, shape] of arrays) table.push(dtype, shape.length, ...shape.flatMap((n) => little(n, 4)));
  const parts = [Uint8Array.from(table)];
  for (const [, , array] of arrays) parts.push(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
  const found = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    found.set(part, offset);
    offset += part.length;
  }
  return found;
}

function little(number, bytes) {
  return [...Array(bytes).keys()].map((i) => Math.floor(number / 256 ** i) % 256);
}
