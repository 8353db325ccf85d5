// Unpacks the headless Chromium that the npm package @sparticuz/chromium ships, compressed, in bin/.
//   node unpack.mjs PACKAGE/bin OUT   ->   OUT/chromium and the libraries it needs in OUT/lib

import { execFileSync } from "node:child_process";
import { chmodSync, createReadStream, createWriteStream, renameSync, unlinkSync } from "node:fs";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { createBrotliDecompress } from "node:zlib";

const [source, out] = process.argv.slice(2);

async function unpack(name, target) {
  await pipeline(createReadStream(join(source, name)), createBrotliDecompress(), createWriteStream(target));
}

const libraries = join(out, "libraries.tar");
await unpack("al2023.tar.br", libraries);
execFileSync("tar", ["-xf", libraries, "-C", out]);
unlinkSync(libraries);
// Under its own name only once it is whole.
const unfinished = join(out, "chromium.part");
await unpack("chromium.br", unfinished);
chmodSync(unfinished, 0o755);
renameSync(unfinished, join(out, "chromium"));
