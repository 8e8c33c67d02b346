import { expect, test } from "vitest";

import { readSafetensors } from "../src/safetensors";
import type { Goldens } from "../src/selftest";
import { bundleFile, bundleJson } from "./goldens";

function file(header: object, data: number[]): Uint8Array<ArrayBuffer> {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const bytes = new Uint8Array(8 + text.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
  bytes.set(text, 8);
  bytes.set(data, 8 + text.length);
  return bytes;
}

test("values of each dtype, little-endian, wherever they begin", () => {
  const tensors = readSafetensors(
    file(
      {
        __metadata__: { format: "pt" },
        a: { dtype: "I32", shape: [2], data_offsets: [0, 8] },
        b: { dtype: "F32", shape: [1, 1], data_offsets: [8, 12] },
        c: { dtype: "I64", shape: [1], data_offsets: [12, 20] },
      },
      [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0xc0, 0x3f, 0, 1, 0, 0, 0, 0, 0, 0],
    ),
  );
  expect(tensors).toEqual({
    a: { shape: [2], data: Int32Array.of(1, -1) },
    b: { shape: [1, 1], data: Float32Array.of(1.5) },
    c: { shape: [1], data: BigInt64Array.of(256n) },
  });
});

test("a dtype that goldens do not have is named", () =>
  expect(() => readSafetensors(file({ a: { dtype: "F16", shape: [1], data_offsets: [0, 2] } }, [0, 0]))).toThrow(
    "a has the dtype F16, but goldens have F32, I32, I64",
  ));

test("a file that is cut off is refused", () =>
  expect(() => readSafetensors(file({ a: { dtype: "I32", shape: [2], data_offsets: [0, 8] } }, [0, 0]))).toThrow(
    "a lies at bytes 0 to 8",
  ));

test("a header that is cut off is refused", () =>
  expect(() => readSafetensors(file({}, []).slice(0, 9))).toThrow("the file has 9 bytes"));

test("the bundle's goldens have the shapes that docs/bundle.md tells", () => {
  const { ids, positions, top_ids, top_logits, logsumexp } = readSafetensors(bundleFile("goldens.safetensors"));
  const [a, b] = bundleJson<Goldens>("goldens.json").prefills;
  const rows = 2 + ids.shape[0] - a - b;
  expect([positions.shape, logsumexp.shape]).toEqual([[rows], [rows]]);
  expect(top_logits.shape).toEqual(top_ids.shape);
  expect(Array.from(positions.data.slice(0, 3), Number)).toEqual([a - 1, a + b - 1, a + b]);
});
