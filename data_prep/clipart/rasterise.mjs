// Draws SVG pictures: one JSON string a line on standard input, one PNG a line (base64) on standard
// output, an empty line for what cannot be read.
//     node rasterise.mjs FOLDER_OF_RESVG_WASM SIDE
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, side] = process.argv.slice(2);
const { initWasm, Resvg } = await import(pathToFileURL(join(folder, "index.mjs")));
await initWasm(readFileSync(join(folder, "index_bg.wasm")));
for await (const line of createInterface({ input: process.stdin })) {
  let png = "";
  try {
    const drawing = new Resvg(JSON.parse(line), { fitTo: { mode: "width", value: Number(side) } });
    png = Buffer.from(drawing.render().asPng()).toString("base64");
  } catch (error) {
    process.stderr.write(`${error}\n`);
  }
  process.stdout.write(png + "\n");
}
