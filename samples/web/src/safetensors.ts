/** Reads a .safetensors file: the length of a header as u64, the header as JSON, then the tensors' bytes. */

export type TensorData = Float32Array | Int32Array | BigInt64Array;

export interface Tensor {
  shape: number[];
  data: TensorData;
}

const ARRAYS = { F32: Float32Array, I32: Int32Array, I64: BigInt64Array };

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** All tensors by name. Throws for a dtype that goldens do not have, and for offsets that do not fit. */
export function readSafetensors(file: Uint8Array<ArrayBuffer>): Record<string, Tensor> {
  const headerBytes = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  const start = 8 + headerBytes;
  if (start > file.length) {
    throw new Error(`The header should end at byte ${start}, but the file has ${file.length} bytes.`);
  }
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, start))) as Record<string, Entry>;
  const tensors: Record<string, Tensor> = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    tensors[name] = { shape: entry.shape, data: readTensor(name, entry, file, start) };
  }
  return tensors;
}

function readTensor(name: string, entry: Entry, file: Uint8Array<ArrayBuffer>, start: number): TensorData {
  const Array = ARRAYS[entry.dtype as keyof typeof ARRAYS];
  if (!Array) {
    throw new Error(`${name} has the dtype ${entry.dtype}, but goldens have ${Object.keys(ARRAYS).join(", ")}.`);
  }
  const [from, to] = entry.data_offsets;
  const bytes = entry.shape.reduce((product, size) => product * size, Array.BYTES_PER_ELEMENT);
  if (to - from !== bytes || start + to > file.length) {
    throw new Error(`${name} lies at bytes ${from} to ${to}, but its shape [${entry.shape}] takes ${bytes}.`);
  }
  // A copy: a view has to begin at a multiple of the element's size, and a header may have any length.
  return new Array(file.slice(start + from, start + to).buffer);
}
