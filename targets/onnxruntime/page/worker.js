/**
 * Runs one artifact by onnxruntime-web, asked by targets/onnxruntime/chromium.py, which serves this file: POST /next
 * takes the answer to the request before, a line of JSON and behind it float32 logits, and gives the next request as
 * JSON, or nothing yet.
 *
 *     {load: {provider, threads, ...}}   answered when the session is made: seconds, version, GPU
 *     {calls: [[id, ...], ...], position}   feeds each of the calls, the first at that position; answered with the
 *                                           milliseconds of each and the logits of the last
 *
 * A request that fails is answered with {error}.
 */

let runtime;
let session;
let model;
let cache = { length: 0, tensors: {} };
const lines = [];

async function load({ provider, threads, external, verbose, ...rest }) {
  model = rest;
  const gpu = provider === "webgpu";
  if (verbose) keepConsole();
  runtime = await import(gpu ? "/ort/ort.webgpu.min.mjs" : "/ort/ort.wasm.min.mjs");
  const build = `${location.origin}/ort/ort-wasm-simd-threaded${gpu ? ".asyncify" : ""}`;
  runtime.env.wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  runtime.env.wasm.numThreads = threads;
  const adapter = gpu ? await describeGpu() : null;
  if (verbose) runtime.env.logLevel = "verbose";
  const file = await read("/files/model");
  const data = external ? [{ path: external, data: await read("/files/data") }] : [];
  const started = performance.now();
  session = await runtime.InferenceSession.create(file, {
    executionProviders: [provider],
    externalData: data,
    // The cache stays where it is computed: of the GPU's memory only the logits are copied back.
    ...(gpu && { preferredOutputLocation: Object.fromEntries(caches("present").map((name) => [name, "gpu-buffer"])) }),
    logSeverityLevel: verbose ? 0 : 3, // 3: errors only, for a node that runs on the CPU is no news
  });
  const load_s = (performance.now() - started) / 1000;
  await rewind(0);
  return { load_s, adapter, version: runtime.env.versions.web, lines };
}

async function read(path) {
  return new Uint8Array(await (await fetch(path)).arrayBuffer());
}

/** The runtime says on the console which node runs where. */
function keepConsole() {
  for (const kind of ["debug", "log", "info", "warn", "error"]) console[kind] = (...words) => lines.push(words.join(" "));
}

/**
 * SwiftShader has subgroups of 4, but the kernel of onnxruntime-web 1.30 that reads 32 tokens or more at once takes them
 * to be of 8 or more, and answers wrongly by whole logits. So such a GPU is shown as one without subgroups.
 */
const SMALLEST_SUBGROUP = 8;

if (navigator.gpu) {
  const ask = navigator.gpu.requestAdapter.bind(navigator.gpu);
  navigator.gpu.requestAdapter = async (options) => {
    const adapter = await ask(options);
    if (adapter && adapter.info.subgroupMinSize < SMALLEST_SUBGROUP) {
      const features = new Set([...adapter.features].filter((feature) => !feature.startsWith("subgroup")));
      Object.defineProperty(adapter, "features", { value: features });
    }
    return adapter;
  };
}

async function describeGpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error("the browser finds no GPU for WebGPU");
  const { vendor, architecture, description, isFallbackAdapter, subgroupMinSize } = adapter.info;
  const subgroups = adapter.features.has("subgroups");
  return { vendor, architecture, description, isFallbackAdapter, subgroupMinSize, subgroups };
}

/** Names of the keys and values of every layer, with `prefix` before them. */
function caches(prefix) {
  const layers = Array.from({ length: model.layers }, (_, layer) => layer);
  return layers.flatMap((layer) => ["key", "value"].map((kind) => `${prefix}.${layer}.${kind}`));
}

/** Forgets every token from `length` on. */
async function rewind(length) {
  if (length === cache.length && length > 0) return;
  const { heads, size } = model;
  const tensors = {};
  for (const name of caches("past_key_values")) {
    const kept = new Float32Array(heads * length * size);
    const all = length > 0 ? await cache.tensors[name].getData() : kept;
    for (let head = 0; head < heads && length > 0; head++) {
      const start = head * cache.length * size;
      kept.set(all.subarray(start, start + length * size), head * length * size);
    }
    tensors[name] = new runtime.Tensor("float32", kept, [1, heads, length, size]);
  }
  keep(length, tensors);
}

/** The cache to go on from; the one before is given back, for the GPU's memory is not garbage-collected. */
function keep(length, tensors) {
  Object.values(cache.tensors).forEach((tensor) => tensor.dispose());
  cache = { length, tensors };
}

async function feed(ids) {
  const total = cache.length + ids.length;
  const outputs = await session.run({
    ...cache.tensors,
    input_ids: new runtime.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new runtime.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
  });
  const { logits, ...presents } = outputs;
  keep(total, Object.fromEntries(caches("").map((name) => [`past_key_values${name}`, presents[`present${name}`]])));
  return logits;
}

async function run({ calls, position }) {
  await rewind(position);
  const steps_ms = [];
  let logits;
  for (const ids of calls) {
    const started = performance.now();
    logits = await feed(ids);
    steps_ms.push(performance.now() - started);
  }
  return [{ steps_ms, shape: logits.dims.slice(1) }, logits.data];
}

/** A line of JSON and, behind it, bytes. */
function packed(told, content = new Float32Array()) {
  const head = new TextEncoder().encode(`${JSON.stringify(told)}\n`);
  const bytes = new Uint8Array(head.length + content.byteLength);
  bytes.set(head);
  bytes.set(new Uint8Array(content.buffer, content.byteOffset, content.byteLength), head.length);
  return bytes;
}

async function answerTo(request) {
  try {
    return request.load ? packed(await load(request.load)) : packed(...(await run(request)));
  } catch (error) {
    // The runtime may throw what is no Error, or one that says nothing.
    return packed({ error: (error instanceof Error && error.message) || `it failed: ${String(error)}` });
  }
}

for (let answer = null; ; ) {
  const response = await fetch("/next", { method: "POST", body: answer });
  answer = response.status === 200 ? await answerTo(await response.json()) : null;
}
