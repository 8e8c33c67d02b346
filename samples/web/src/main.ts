/** The page: loads the bundle, keeps one conversation, and runs the self-test. */

import { Bundle, BundleError } from "./bundle";
import { render, type ChatFormat, type Message } from "./chat";
import { argmax, Model, nextTask, type Cache, type Forced, type Provider } from "./model";
import { judge, selfTest, type Check, type DeviceReport } from "./selftest";
import { Tokenizer } from "./tokenizer";

const SUGGESTIONS = ["What news?", "Who are you?", "Tell me of the sea."];

/** Everything that a question needs; made once, when the bundle is loaded. */
interface Loaded {
  bundle: Bundle;
  model: Model;
  tokenizer: Tokenizer;
  /** Null: the bundle's template cannot be told as text around messages, and a message is continued as it stands. */
  format: ChatFormat | null;
}

const element = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const page = {
  name: element("name"),
  facts: element("facts"),
  loading: element("loading"),
  status: element("status"),
  progress: element<HTMLProgressElement>("progress"),
  error: element("error"),
  welcome: element("welcome"),
  suggestions: element("suggestions"),
  log: element("log"),
  composer: element<HTMLFormElement>("composer"),
  instructions: element("instructions"),
  system: element<HTMLTextAreaElement>("system"),
  message: element<HTMLTextAreaElement>("message"),
  send: element<HTMLButtonElement>("send"),
  stop: element<HTMLButtonElement>("stop"),
  newChat: element<HTMLButtonElement>("new-chat"),
  provider: element("provider"),
  openSelftest: element<HTMLButtonElement>("open-selftest"),
  selftest: element<HTMLDialogElement>("selftest"),
  selftestStatus: element("selftest-status"),
  figures: element<HTMLTableElement>("figures"),
  speed: element("speed"),
  download: element<HTMLAnchorElement>("download"),
  closeSelftest: element<HTMLButtonElement>("close-selftest"),
};

/** A session does one thing at a time: an answer or the self-test. */
let busy = false;

void main();

async function main(): Promise<void> {
  const query = new URLSearchParams(location.search);
  try {
    const loaded = await load(folderUrl(query.get("bundle") ?? "bundle/"), {
      provider: forcedProvider(query.get("provider")),
      threads: forcedThreads(query.get("threads")),
    });
    showLoaded(loaded);
    listen(new Conversation(loaded), loaded);
    if (query.has("selftest")) await showSelfTest(loaded);
  } catch (error) {
    page.loading.hidden = true;
    fail(error);
  }
}

async function load(folder: URL, forced: Forced): Promise<Loaded> {
  const bundle = await Bundle.open(folder);
  const { model: spec } = bundle.manifest;
  page.name.textContent = document.title = spec.name;

  const received = new Map<string, number>();
  const total = bundle.size("model.onnx") + (bundle.has("model.onnx.data") ? bundle.size("model.onnx.data") : 0);
  const show = (path: string, bytes: number, all: number) => {
    received.set(path, bytes);
    page.progress.value = [...received.values()].reduce((sum, part) => sum + part, 0) / total;
    page.status.textContent = bytes < all ? `Loading ${path}` : `Checking ${path}`;
  };
  const tokenizer = await Tokenizer.load(bundle);
  const format = bundle.has("chat_format.json") ? await bundle.readJson<ChatFormat>("chat_format.json") : null;
  const model = await Model.load(bundle, forced, show);

  const size = total < 1e9 ? `${(total / 1e6).toPrecision(2)} MB` : `${(total / 1e9).toPrecision(2)} GB`;
  const parameters = Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(spec.parameters);
  page.facts.textContent = `${parameters} · ${bundle.manifest.precision} · ${size}`;
  page.facts.title = "Parameters, how they are stored, and the size of the files";
  return { bundle, model, tokenizer, format };
}

function showLoaded({ model, format }: Loaded): void {
  const why = model.fallbackReason ? `; no WebGPU: ${model.fallbackReason}` : "";
  const pieces = Number.isFinite(model.tokensPerCall)
    ? `, ${model.tokensPerCall} tokens a call: with more of them this GPU answers wrongly`
    : "";
  page.provider.textContent =
    model.provider === "webgpu"
      ? `On the GPU by WebGPU${pieces}`
      : `By WebAssembly, ${plural(model.threads, "thread")}${why}`;
  document.body.dataset.provider = model.provider;
  page.loading.hidden = true;
  page.welcome.hidden = false;
  page.instructions.hidden = !format?.system_user;
  for (const control of [page.message, page.send, page.newChat, page.openSelftest]) control.disabled = false;
  page.message.placeholder = format ? "Message" : "Text to go on from";
  page.message.focus({ preventScroll: true });
}

/** Messages so far, and the cache of what the model has read of them. */
class Conversation {
  private messages: Message[] = [];
  private cache: Cache;

  constructor(private readonly loaded: Loaded) {
    this.cache = loaded.model.empty;
  }

  restart(): void {
    this.messages = [];
    this.forget();
  }

  /** Asks, and calls `show` with the answer so far. Returns how fast it went. */
  async ask(question: string, system: string, stopped: AbortSignal, show: (text: string) => void): Promise<string> {
    const { model, tokenizer, bundle } = this.loaded;
    const prompt = this.encode(question, system);
    const { context, model: spec } = bundle.manifest;
    if (prompt.length >= context) {
      const found = `The conversation has ${prompt.length} tokens`;
      throw new Error(`${found}, but the cache holds ${context}: start a new chat.`);
    }
    // What the model has read already is not read again, unless the new text is not a continuation of it.
    const continues = prompt.length > this.cache.ids.length && this.cache.ids.every((id, at) => id === prompt[at]);
    if (!continues) this.forget();
    const unread = prompt.slice(this.cache.ids.length);

    const started = performance.now();
    let step = await model.advance(this.cache, unread);
    const read = performance.now();
    const answer: number[] = [];
    let end = "";
    for (;;) {
      this.cache = step.cache;
      const token = argmax(step.logits);
      if (spec.eos_token_ids.includes(token)) break;
      answer.push(token);
      show(tokenizer.decodeSoFar(answer));
      await nextTask();
      if (stopped.aborted) end = "stopped";
      else if (this.cache.ids.length === context) end = "the cache is full";
      if (end) break;
      step = await model.advance(step.cache, [token]);
    }
    const written = performance.now();
    const text = tokenizer.decode(answer);
    show(text);
    this.messages.push({ role: "user", content: question }, { role: "assistant", content: text });
    if (!this.loaded.format) this.restart(); // every text stands for itself

    const figures = [`read ${rate(unread.length, read - started)}`];
    if (answer.length > 0) figures.push(`wrote ${rate(answer.length, written - read)}`);
    return [...figures, end].filter(Boolean).join(" · ");
  }

  private encode(question: string, system: string): number[] {
    const { tokenizer, format } = this.loaded;
    if (!format) return tokenizer.encodeBare(question);
    const first: Message[] = format.system_user && system.trim() ? [{ role: "system", content: system }] : [];
    return tokenizer.encode(render(format, [...first, ...this.messages, { role: "user", content: question }]));
  }

  private forget(): void {
    this.loaded.model.release(this.cache);
    this.cache = this.loaded.model.empty;
  }
}

function listen(conversation: Conversation, loaded: Loaded): void {
  let stopping = new AbortController();

  const ask = async (question: string) => {
    if (busy || !question.trim()) return;
    stopping = new AbortController();
    page.error.hidden = page.welcome.hidden = true;
    setBusy(true);
    addTurn("user", question);
    const { text, figures } = addTurn("assistant", "");
    const show = (soFar: string) => {
      const follows = atBottom();
      text.textContent = soFar;
      if (follows) scrollToBottom();
    };
    try {
      figures.textContent = await conversation.ask(question, page.system.value, stopping.signal, show);
      scrollToBottom();
    } catch (error) {
      text.parentElement!.remove();
      fail(error);
    }
    setBusy(false);
    page.message.focus({ preventScroll: true });
  };

  page.composer.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = page.message.value;
    if (!busy) page.message.value = "";
    fitMessage();
    void ask(question);
  });
  page.message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    page.composer.requestSubmit();
  });
  page.message.addEventListener("input", fitMessage);
  page.stop.addEventListener("click", () => stopping.abort());
  page.newChat.addEventListener("click", () => {
    conversation.restart();
    page.log.replaceChildren();
    page.error.hidden = true;
    page.welcome.hidden = false;
    page.message.focus();
  });
  page.suggestions.append(
    ...SUGGESTIONS.map((question) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: question });
      button.addEventListener("click", () => void ask(question));
      return button;
    }),
  );
  page.openSelftest.addEventListener("click", () => void showSelfTest(loaded).catch(fail));
  page.closeSelftest.addEventListener("click", () => page.selftest.close());
}

async function showSelfTest(loaded: Loaded): Promise<void> {
  const { bundle, model, tokenizer, format } = loaded;
  page.figures.hidden = page.download.hidden = true;
  page.speed.textContent = "";
  delete page.selftestStatus.dataset.verdict;
  page.selftest.showModal();
  setBusy(true);
  try {
    const say = (text: string) => void (page.selftestStatus.textContent = text);
    const report = await selfTest(bundle, model, tokenizer, format, say);
    const checks = judge(report, await bundle.readJson("goldens.json"), bundle.manifest);
    showReport(report, checks);
    window.deviceReport = report;
  } catch (error) {
    page.selftestStatus.textContent = `Not measured: ${(error as Error).message}`;
    page.selftestStatus.dataset.verdict = "failed";
    throw error;
  } finally {
    setBusy(false);
  }
}

function showReport(report: DeviceReport, checks: Check[]): void {
  const failed = checks.filter((check) => !check.passed);
  page.selftestStatus.dataset.verdict = failed.length === 0 ? "passed" : "failed";
  page.selftestStatus.textContent =
    failed.length === 0
      ? "Passed: this browser answers as the reference does"
      : `Failed: ${failed.map((check) => check.name.toLowerCase()).join(", ")}`;

  page.figures.tBodies[0].replaceChildren(
    ...checks.map((check) => {
      const row = document.createElement("tr");
      if (!check.passed) row.className = "failed";
      for (const text of [check.name, check.found, check.wanted]) row.insertCell().textContent = text;
      row.cells[0].outerHTML = `<th scope="row">${check.name}</th>`;
      return row;
    }),
  );
  page.figures.hidden = false;

  const { latency } = report;
  page.speed.textContent =
    `Loaded in ${latency.load_s!.toFixed(2)} s. Reads ${round(latency.prefill_tokens_per_s!)} tokens/s` +
    (latency.decode_tokens_per_s === null ? "." : `, writes ${round(latency.decode_tokens_per_s)} tokens/s.`);
  const file = new Blob([JSON.stringify(report, null, 2)], { type: "application/json" });
  URL.revokeObjectURL(page.download.href);
  page.download.href = URL.createObjectURL(file);
  page.download.hidden = false;
}

function addTurn(role: "user" | "assistant", content: string): { text: HTMLElement; figures: HTMLElement } {
  const turn = document.createElement("li");
  turn.className = role;
  const paragraph = (className: string, textContent: string) =>
    Object.assign(document.createElement("p"), { className, textContent });
  const who = paragraph("hidden", role === "user" ? "You:" : "The model:");
  const text = paragraph("text", content);
  const figures = paragraph("figures", "");
  turn.append(who, text, figures);
  page.log.append(turn);
  scrollToBottom();
  return { text, figures };
}

function setBusy(now: boolean): void {
  busy = now;
  // While it writes, a screen reader waits: it then reads the whole answer once, not each piece.
  page.log.setAttribute("aria-busy", String(now));
  page.send.hidden = now;
  page.stop.hidden = !now;
  for (const control of [page.newChat, page.openSelftest, page.closeSelftest]) control.disabled = now;
}

function fail(error: unknown): void {
  if (!(error instanceof BundleError)) console.error(error);
  page.error.textContent = (error as Error).message;
  page.error.hidden = false;
  page.error.scrollIntoView({ block: "nearest" });
}

function fitMessage(): void {
  page.message.style.height = "auto";
  page.message.style.height = `${page.message.scrollHeight}px`;
}

const scroller = document.querySelector("main")!;
const atBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
const scrollToBottom = () => scroller.scrollTo({ top: scroller.scrollHeight });

function rate(tokens: number, milliseconds: number): string {
  return `${plural(tokens, "token")} at ${round((1000 * tokens) / milliseconds)}/s`;
}

const round = (value: number) => Number(value.toPrecision(3)).toLocaleString("en");
const plural = (count: number, noun: string) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

function folderUrl(text: string): URL {
  return new URL(text.endsWith("/") ? text : `${text}/`, location.href);
}

function forcedThreads(text: string | null): number | null {
  if (text === null || Number(text) >= 1) return text === null ? null : Math.floor(Number(text));
  throw new Error(`threads is ${text}, but it has to be 1 or more.`);
}

function forcedProvider(text: string | null): Provider | null {
  if (text === null || text === "webgpu" || text === "wasm") return text;
  throw new Error(`provider is ${text}, but it has to be webgpu or wasm.`);
}
