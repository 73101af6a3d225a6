// Prints as hex what the page's JavaScript makes of records; the argument: a file of JSON, a list of
// {folder: made by fedsplit export, secret: hex, records: [[raw numbers]], dropping: {...} or null}.
import { readFileSync } from "node:fs";
import { Device } from "../fedsplit/service/page/layer.js";

for (const { folder, secret, records, dropping } of JSON.parse(readFileSync(process.argv[2], "utf-8"))) {
  const description = JSON.parse(readFileSync(`${folder}/device.json`, "utf-8"));
  const weights = readFileSync(`${folder}/first_layer.safetensors`);
  const copy = weights.buffer.slice(weights.byteOffset, weights.byteOffset + weights.length);
  const device = new Device(description, copy, new Uint8Array(Buffer.from(secret, "hex")));
  for (const record of records) {
    const { payload } = await device.release(record, dropping ?? undefined);
    console.log(Buffer.from(payload).toString("hex"));
  }
}
