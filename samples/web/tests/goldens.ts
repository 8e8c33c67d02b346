/** The bundle that the tests read: BUNDLE, or the one of `make demo`. */

import { readFileSync } from "node:fs";
import path from "node:path";

const folder = path.resolve(process.env.BUNDLE ?? "../../out/demo/onnxruntime");

export function bundleFile(name: string): Uint8Array<ArrayBuffer> {
  try {
    return new Uint8Array(readFileSync(path.join(folder, name)));
  } catch (error) {
    throw new Error(`No bundle to test with at ${folder}: run make demo, or set BUNDLE`, { cause: error });
  }
}

export function bundleJson<T>(name: string): T {
  return JSON.parse(new TextDecoder().decode(bundleFile(name))) as T;
}
