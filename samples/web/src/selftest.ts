/**
 * Whether the bundle answers in this browser as its reference did: the goldens' logits, greedy answers and chats, and
 * how fast. The rules are those of docs/bundle.md.
 */

import type { Bundle, Manifest } from "./bundle";
import { render, type ChatFormat, type Message } from "./chat";
import { argmax, nextTask, type Model } from "./model";
import { readSafetensors } from "./safetensors";
import type { Tokenizer } from "./tokenizer";

export interface Goldens {
  prefills: [number, number];
  prompts: { text: string; ids: number[]; greedy_ids: number[]; greedy_text: string; greedy_margins: number[] }[];
  chats: { messages: Message[]; text: string; ids: number[] }[];
}

/** The reference's most likely tokens at each kept position, best first, and the logsumexp over all. */
export interface GoldenLogits {
  topIds: Int32Array; // [m, k]
  topLogits: Float32Array; // [m, k]
  logsumexp: Float32Array; // [m]
  k: number;
}

export interface Parity {
  positions: number;
  mean_kl_nats: number;
  worst_kl_nats: number;
  top1_agreement: number;
  decided_top1_agreement: number;
  decided_positions: number;
  max_abs_logit_diff: number;
}

export interface DeviceReport {
  schema: "llama-export/device-report/1";
  manifest_sha256: string;
  device: { model: string; os: string; runtime: string; app: string };
  parity: Parity;
  greedy: { prompts: number; compared: number; agreeing: number };
  chats: { compared: number; agreeing: number } | null;
  latency: Record<string, number | null>;
  peak_memory_bytes: null;
  reason: string;
}

/** One line of the verdict: a figure, what was wanted of it, and whether it is so. */
export interface Check {
  name: string;
  found: string;
  wanted: string;
  passed: boolean;
}

const CLEAR_MARGIN = 0.25; // in logits: nearer than that, another processor may rightly choose otherwise
const LEAST_REST = 1e-12; // float32 logits know no less
const RUNS = 3;
const PROMPT_TOKENS = 128;
const DECODED_TOKENS = 32;

export async function selfTest(
  bundle: Bundle,
  model: Model,
  tokenizer: Tokenizer,
  format: ChatFormat | null,
  progress: (text: string) => void,
): Promise<DeviceReport> {
  progress("Reading the goldens");
  const goldens = await bundle.readJson<Goldens>("goldens.json");
  const tensors = readSafetensors(await bundle.read("goldens.safetensors"));
  const ids = Array.from(tensors.ids.data as BigInt64Array, Number);
  const kept: GoldenLogits = {
    topIds: tensors.top_ids.data as Int32Array,
    topLogits: tensors.top_logits.data as Float32Array,
    logsumexp: tensors.logsumexp.data as Float32Array,
    k: tensors.top_ids.shape[1],
  };
  const parity = await compareLogits(model, ids, goldens.prefills, kept, progress);
  const greedy = await compareGreedy(model, goldens, progress);
  const chats = compareChats(goldens, tokenizer, format);
  const latency = await measureLatency(model, ids, bundle.manifest.context, progress);
  return {
    schema: "llama-export/device-report/1",
    manifest_sha256: bundle.manifestSha256,
    device: { ...(await describeDevice()), runtime: model.runtimeName, app: `llama-export samples/web ${__VERSION__}` },
    parity,
    greedy,
    chats,
    latency,
    peak_memory_bytes: null,
    reason: "peak_memory_bytes: a browser does not tell a page its peak memory",
  };
}

/** The report against the gates that the export itself had to keep. */
export function judge(report: DeviceReport, manifest: Pick<Manifest, "parity">): Check[] {
  const { parity, greedy, chats } = report;
  const gate = manifest.parity;
  const least = gate.gate_decided_top1_agreement;
  const percent = (share: number) => `${(100 * share).toFixed(1)} %`;
  return [
    {
      name: "Mean KL",
      found: `${parity.mean_kl_nats.toExponential(2)} nats`,
      wanted: `at most ${gate.gate_mean_kl_nats.toExponential(2)}`,
      passed: parity.mean_kl_nats <= gate.gate_mean_kl_nats, // false for NaN
    },
    {
      name: "KL at the worst position",
      found: `${parity.worst_kl_nats.toExponential(2)} nats`,
      wanted: `at most ${gate.gate_worst_kl_nats.toExponential(2)}`,
      passed: parity.worst_kl_nats <= gate.gate_worst_kl_nats,
    },
    {
      name: "Same first choice where it is decided",
      found: `${percent(parity.decided_top1_agreement)} of ${parity.decided_positions}`,
      wanted: least > 0 ? `at least ${percent(least)}` : "no bound",
      passed: parity.decided_top1_agreement >= least,
    },
    {
      name: "Same first choice",
      found: `${percent(parity.top1_agreement)} of ${parity.positions}`,
      wanted: "no bound",
      passed: true,
    },
    {
      name: "Largest logit difference",
      found: parity.max_abs_logit_diff.toPrecision(2),
      wanted: "a number",
      passed: Number.isFinite(parity.max_abs_logit_diff),
    },
    {
      name: "Greedy tokens",
      found: `${greedy.agreeing} of ${greedy.compared}`,
      wanted: "all",
      passed: greedy.agreeing === greedy.compared,
    },
    {
      name: "Chats",
      found: chats ? `${chats.agreeing} of ${chats.compared}` : "no chat format",
      wanted: chats ? "all" : "nothing",
      passed: !chats || chats.agreeing === chats.compared,
    },
  ];
}

/** Two prefills, the second one twice to see that going back works, then token by token. */
async function compareLogits(
  model: Model,
  ids: number[],
  [a, b]: [number, number],
  kept: GoldenLogits,
  progress: (text: string) => void,
): Promise<Parity> {
  const sums = new ParitySums(kept);
  const first = await model.feed(model.empty, ids.slice(0, a));
  sums.add(first.logits);
  model.release((await model.feed(first.cache, ids.slice(a, a + b))).cache);
  let step = await model.advance(first.cache, ids.slice(a, a + b));
  sums.add(step.logits);
  for (let at = a + b; at < ids.length; at++) {
    step = await model.advance(step.cache, [ids[at]]);
    sums.add(step.logits);
    if (at % 8 === 0) {
      progress(`Comparing logits: ${at + 1 - a - b} of ${ids.length - a - b} tokens`);
      await nextTask();
    }
  }
  model.release(step.cache);
  return sums.figures();
}

/** Sums over positions, so that no more than one position's logits are ever held. */
export class ParitySums {
  private row = 0;
  private kl = 0;
  private worst = 0;
  private same = 0;
  private decided = 0;
  private decidedSame = 0;
  private largest = 0;

  constructor(private readonly kept: GoldenLogits) {}

  add(logits: Float32Array): void {
    const { topIds, topLogits, logsumexp, k } = this.kept;
    const from = this.row * k;
    const ids = topIds.subarray(from, from + k);
    const reference = topLogits.subarray(from, from + k);
    const kl = divergence(ids, reference, logsumexp[this.row], logits);
    this.kl += kl;
    this.worst = Math.max(this.worst, kl); // NaN as soon as one is
    const same = argmax(logits) === ids[0];
    this.same += +same;
    if (reference[0] - reference[1] > 2 * fp16Spacing(reference[0])) {
      this.decided += 1;
      this.decidedSame += +same;
    }
    ids.forEach((id, at) => {
      this.largest = Math.max(this.largest, Math.abs(logits[id] - reference[at]));
    });
    this.row += 1;
  }

  figures(): Parity {
    const rows = this.kept.logsumexp.length;
    if (this.row !== rows) throw new Error(`${this.row} positions were computed, but the goldens have ${rows}.`);
    return {
      positions: rows,
      mean_kl_nats: this.kl / rows,
      worst_kl_nats: this.worst,
      top1_agreement: this.same / rows,
      decided_top1_agreement: this.decided ? this.decidedSame / this.decided : 1,
      decided_positions: this.decided,
      max_abs_logit_diff: this.largest,
    };
  }
}

/** KL(reference || logits) in nats, over the kept tokens and one bin for all others. */
export function divergence(ids: Int32Array, reference: Float32Array, logsumexp: number, logits: Float32Array): number {
  const total = logSumExp(logits);
  let kl = 0;
  let keptP = 0;
  let keptQ = 0;
  ids.forEach((id, at) => {
    // The reference's logits are float32, and so is their difference: p is what the exporter takes it for.
    const logP = Math.fround(reference[at] - logsumexp);
    const logQ = logits[id] - total;
    keptP += Math.exp(logP);
    keptQ += Math.exp(logQ);
    kl += Math.exp(logP) * (logP - logQ);
  });
  const restP = Math.max(1 - keptP, LEAST_REST);
  const restQ = Math.max(1 - keptQ, LEAST_REST);
  return Math.max(kl + restP * Math.log(restP / restQ), 0);
}

function logSumExp(logits: Float32Array): number {
  const largest = logits[argmax(logits)];
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return largest + Math.log(sum);
}

/** The distance of neighbouring fp16 numbers at the size of x. */
export function fp16Spacing(x: number): number {
  return 2 ** (Math.floor(Math.log2(Math.max(Math.abs(x), 2 ** -14))) - 10);
}

async function compareGreedy(
  model: Model,
  goldens: Goldens,
  progress: (text: string) => void,
): Promise<DeviceReport["greedy"]> {
  let compared = 0;
  let agreeing = 0;
  for (const [at, prompt] of goldens.prompts.entries()) {
    progress(`Comparing answers: ${at + 1} of ${goldens.prompts.length}`);
    await nextTask();
    let step = await model.feed(model.empty, prompt.ids);
    for (const [index, wanted] of prompt.greedy_ids.entries()) {
      if (prompt.greedy_margins[index] < CLEAR_MARGIN) break;
      compared += 1;
      if (argmax(step.logits) !== wanted) break;
      agreeing += 1;
      step = await model.advance(step.cache, [wanted]);
    }
    model.release(step.cache);
  }
  return { prompts: goldens.prompts.length, compared, agreeing };
}

/** Null where the bundle has no chat_format.json. */
function compareChats(goldens: Goldens, tokenizer: Tokenizer, format: ChatFormat | null): DeviceReport["chats"] {
  if (!format) return null;
  const agreeing = goldens.chats.filter((chat) => {
    const text = render(format, chat.messages);
    return text === chat.text && tokenizer.encode(text).join() === chat.ids.join();
  });
  return { compared: goldens.chats.length, agreeing: agreeing.length };
}

/** One warm-up and three counted runs, as the exporter measures on its host. */
async function measureLatency(
  model: Model,
  ids: number[],
  context: number,
  progress: (text: string) => void,
): Promise<DeviceReport["latency"]> {
  const prompt = ids.slice(0, Math.min(PROMPT_TOKENS, Math.floor(context / 2)));
  const decoded = ids.slice(prompt.length, prompt.length + Math.min(DECODED_TOKENS, context - prompt.length));
  const firstToken: number[] = [];
  const decode: number[] = [];
  for (let run = 0; run <= RUNS; run++) {
    progress(run === 0 ? "Measuring speed: warming up" : `Measuring speed: run ${run} of ${RUNS}`);
    await nextTask();
    const started = performance.now();
    let step = await model.feed(model.empty, prompt);
    const read = performance.now();
    for (const id of decoded) step = await model.advance(step.cache, [id]);
    const done = performance.now();
    model.release(step.cache);
    if (run === 0) continue;
    firstToken.push(read - started);
    decode.push(done - read);
  }
  return {
    load_s: model.loadSeconds,
    time_to_first_token_ms: median(firstToken),
    prefill_tokens_per_s: (1000 * prompt.length) / median(firstToken),
    decode_tokens_per_s: decoded.length > 0 ? (1000 * decoded.length) / median(decode) : null,
    prompt_tokens: prompt.length,
    decoded_tokens: decoded.length,
    threads: model.threads,
    runs: RUNS,
  };
}

/** What the browser tells of the device; many tell little on purpose. */
async function describeDevice(): Promise<{ model: string; os: string }> {
  const data = (navigator as { userAgentData?: UserAgentData }).userAgentData;
  if (!data) return { model: "not told by the browser", os: navigator.userAgent };
  const { model, platform, platformVersion } = await data.getHighEntropyValues(["model", "platformVersion"]);
  return { model: model || "not told by the browser", os: `${platform} ${platformVersion}`.trim() };
}

interface UserAgentData {
  getHighEntropyValues(hints: string[]): Promise<{ model: string; platform: string; platformVersion: string }>;
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
}
