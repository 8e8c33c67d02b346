/** The exported graph in ONNX Runtime, on the GPU where the browser gives one, and the cache that it goes on from. */

import type { InferenceSession, Tensor } from "onnxruntime-web/wasm";
import gpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url";
import gpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url";
import cpuGlue from "onnxruntime-web/ort-wasm-simd-threaded.mjs?url";
import cpuWasm from "onnxruntime-web/ort-wasm-simd-threaded.wasm?url";

import type { Bundle, Manifest, Progress } from "./bundle";

export type Provider = "webgpu" | "wasm";

/** What the page's address asks for; null leaves the choice to the browser's abilities. */
export interface Forced {
  provider: Provider | null;
  threads: number | null;
}

type Runtime = typeof import("onnxruntime-web/wasm");

const WEIGHTS = "model.onnx.data";

/**
 * onnxruntime-web 1.30 on WebGPU was seen to answer wrongly, by whole logits, when it reads 32 tokens or more in one
 * call, and rightly below (Chromium 156, SwiftShader). Each GPU is asked at load; delete this when none does so.
 */
const SAFE_TOKENS_PER_CALL = 16;
const TRIED_TOKENS = 64;
const LARGEST_DIFFERENCE = 0.01; // of the spread of the logits: seen are 0.00001 where it is right, 0.1 where not

/**
 * Keys and values of the tokens read so far. No call changes one: going back to an earlier position is going on from
 * an earlier cache.
 */
export interface Cache {
  readonly ids: readonly number[];
  readonly tensors: Readonly<Record<string, Tensor>>;
}

/** What comes of reading tokens: logits after the last of them, and the cache to go on from. */
export interface Step {
  logits: Float32Array;
  cache: Cache;
}

interface Files {
  graph: Uint8Array;
  weights: Uint8Array | null;
  manifest: Manifest;
  threads: number | null;
}

export class Model {
  readonly empty: Cache;
  /** More are read in several calls; Infinity where any number comes out right. */
  tokensPerCall = Infinity;

  private constructor(
    private readonly runtime: Runtime,
    private readonly session: InferenceSession,
    private readonly manifest: Manifest,
    readonly provider: Provider,
    /** Why it does not run on the GPU; empty where it does or was not asked to. */
    readonly fallbackReason: string,
    readonly loadSeconds: number,
  ) {
    const { num_hidden_layers: layers, num_key_value_heads: heads, head_dim: size } = manifest.model;
    const tensors: Record<string, Tensor> = {};
    for (let layer = 0; layer < layers; layer++) {
      for (const kind of ["key", "value"]) {
        tensors[`past_key_values.${layer}.${kind}`] = new runtime.Tensor("float32", [], [1, heads, 0, size]);
      }
    }
    this.empty = { ids: [], tensors };
  }

  /** WebGPU first, WebAssembly where that fails; or the one that is `forced`, or an error. */
  static async load(bundle: Bundle, forced: Forced, progress?: Progress): Promise<Model> {
    const graph = await bundle.read("model.onnx", progress);
    const weights = bundle.has(WEIGHTS) ? await bundle.read(WEIGHTS, progress) : null;
    const files = { graph, weights, manifest: bundle.manifest, threads: forced.threads };

    let reason = "";
    if (forced.provider !== "wasm") {
      try {
        await requireGpu({ software: forced.provider === "webgpu" });
        return await Model.on("webgpu", files);
      } catch (error) {
        // The runtime may throw what is no Error, or one that says nothing.
        reason = (error instanceof Error && error.message) || `it failed: ${String(error)}`;
        if (forced.provider) throw new Error(`WebGPU was asked for, but ${reason}.`);
      }
    }
    return Model.on("wasm", files, reason);
  }

  private static async on(provider: Provider, files: Files, fallbackReason = ""): Promise<Model> {
    const { graph, weights, manifest } = files;
    const runtime = await runtimeFor(provider);
    if (files.threads) runtime.env.wasm.numThreads = files.threads;
    const started = performance.now();
    const session = await runtime.InferenceSession.create(graph, {
      executionProviders: [provider],
      externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
      // The cache stays where it is computed: of the GPU's memory only the logits are copied back.
      ...(provider === "webgpu" && { preferredOutputLocation: onGpu(manifest) }),
      logSeverityLevel: 3, // errors only: a node that runs on the CPU is no news
    });
    const seconds = (performance.now() - started) / 1000;
    const model = new Model(runtime, session, manifest, provider, fallbackReason, seconds);
    try {
      await model.tryOut();
    } catch (error) {
      await session.release(); // the next provider needs the room
      throw error;
    }
    return model;
  }

  /**
   * A GPU compiles its programs at the first run, and may fail there: better here than at the first question. And it
   * has to answer the same whether it reads tokens in one call or in several.
   */
  private async tryOut(): Promise<void> {
    const { context, model } = this.manifest;
    const count = this.provider === "webgpu" ? Math.min(TRIED_TOKENS, context) : 1;
    const ids = Array.from({ length: count }, (_, at) => (model.bos_token_id + 7 * at) % model.vocab_size);
    const atOnce = await this.read(ids);
    if (!atOnce.every(Number.isFinite)) throw new Error(`${this.provider} computes logits that are not numbers`);
    if (count <= SAFE_TOKENS_PER_CALL) return;
    this.tokensPerCall = SAFE_TOKENS_PER_CALL;
    const inPieces = await this.read(ids);
    const difference = inPieces.reduce((largest, logit, id) => Math.max(largest, Math.abs(logit - atOnce[id])), 0);
    const spread = inPieces.reduce((a, b) => Math.max(a, b)) - inPieces.reduce((a, b) => Math.min(a, b));
    if (difference <= LARGEST_DIFFERENCE * spread) this.tokensPerCall = Infinity;
  }

  private async read(ids: readonly number[]): Promise<Float32Array> {
    const { cache, logits } = await this.feed(this.empty, ids);
    this.release(cache);
    return logits;
  }

  get runtimeName(): string {
    const pieces = Number.isFinite(this.tokensPerCall) ? `, ${this.tokensPerCall} tokens a call` : "";
    return `onnxruntime-web ${this.runtime.env.versions.web}, ${this.provider}${pieces}`;
  }

  get threads(): number {
    return this.runtime.env.wasm.numThreads ?? 1;
  }

  /** Read `ids` after what `past` holds. `past` stays as it is, and is the caller's to release. */
  async feed(past: Cache, ids: readonly number[]): Promise<Step> {
    const total = past.ids.length + ids.length;
    if (total > this.manifest.context) {
      throw new Error(`The text has ${total} tokens, but the cache of this bundle holds ${this.manifest.context}.`);
    }
    let step = await this.call(past, ids.slice(0, this.tokensPerCall));
    for (let at = this.tokensPerCall; at < ids.length; at += this.tokensPerCall) {
      const earlier = step.cache;
      step = await this.call(earlier, ids.slice(at, at + this.tokensPerCall));
      this.release(earlier);
    }
    return step;
  }

  private async call(past: Cache, ids: readonly number[]): Promise<Step> {
    const total = past.ids.length + ids.length;
    const { Tensor } = this.runtime;
    const outputs = await this.session.run({
      ...past.tensors,
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    });
    const tensors: Record<string, Tensor> = {};
    for (const [name, tensor] of Object.entries(outputs)) {
      if (name.startsWith("present.")) tensors[name.replace("present", "past_key_values")] = tensor;
    }
    const all = outputs.logits.data as Float32Array; // [1, 1, V], or [1, T, V] where the graph gives all
    const logits = all.slice(all.length - this.manifest.model.vocab_size);
    outputs.logits.dispose();
    return { logits, cache: { ids: [...past.ids, ...ids], tensors } };
  }

  /** The same, for a `past` that nobody needs any more. */
  async advance(past: Cache, ids: readonly number[]): Promise<Step> {
    const step = await this.feed(past, ids);
    this.release(past);
    return step;
  }

  /** Give a cache's memory back; the GPU's is not garbage-collected. */
  release(cache: Cache): void {
    if (cache !== this.empty) Object.values(cache.tensors).forEach((tensor) => tensor.dispose());
  }
}

/** Greedy choice. */
export function argmax(logits: Float32Array): number {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

async function runtimeFor(provider: Provider): Promise<Runtime> {
  // Two builds, of 27 and 14 MB: a phone fetches the one that it runs.
  const gpu = provider === "webgpu";
  const runtime = gpu ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const locate = (url: string) => new URL(url, location.href).href;
  runtime.env.wasm.wasmPaths = { mjs: locate(gpu ? gpuGlue : cpuGlue), wasm: locate(gpu ? gpuWasm : cpuWasm) };
  return runtime;
}

/** Throws where there is no GPU, and where it is one computed in software unless that is welcome. */
async function requireGpu({ software }: { software: boolean }): Promise<void> {
  if (!navigator.gpu) throw new Error("this browser has no WebGPU");
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) throw new Error("the browser finds no GPU to use");
  const { architecture, isFallbackAdapter, vendor } = adapter.info;
  if (isFallbackAdapter && !software) {
    throw new Error(`the GPU is software (${architecture || vendor}), and slower`);
  }
  // A driver may refuse here; the runtime, which asks again for its own, would only tell a number.
  (await adapter.requestDevice()).destroy();
}

function onGpu(manifest: Manifest): Record<string, "gpu-buffer"> {
  const places: Record<string, "gpu-buffer"> = {};
  for (let layer = 0; layer < manifest.model.num_hidden_layers; layer++) {
    places[`present.${layer}.key`] = places[`present.${layer}.value`] = "gpu-buffer";
  }
  return places;
}

/** Lets the worker hear what the page has to say: awaiting a session's run alone does not. */
export function nextTask(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
