/** The page: shows what the worker loads, answers and finds. It computes nothing itself, and so never stands still. */

import { weightBytes, type Manifest } from "./bundle";
import type { Pace } from "./conversation";
import type { Forced, Provider } from "./model";
import type { Check, DeviceReport } from "./selftest";
import { Client, TaskError, type Running } from "./tasks";

const SUGGESTIONS = ["What news?", "Who are you?", "Tell me of the sea."];

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

const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const client = new Client(worker);

void main();

async function main(): Promise<void> {
  const query = new URLSearchParams(location.search);
  worker.addEventListener("error", (event) => client.fail(`The worker has failed: ${event.message || "no reason told"}`));
  try {
    const folder = folderUrl(query.get("bundle") ?? "bundle/").href;
    const forced: Forced = {
      provider: forcedProvider(query.get("provider")),
      threads: forcedThreads(query.get("threads")),
    };
    const running = await client.run("load", { folder, forced }, (loading) => {
      if ("manifest" in loading) showManifest(loading.manifest);
      else showProgress(loading);
    });
    showRunning(running);
    listen();
    if (query.has("selftest")) await showSelfTest();
  } catch (error) {
    page.loading.hidden = true;
    fail(error);
  }
}

function showManifest(manifest: Manifest): void {
  page.name.textContent = document.title = manifest.model.name;
  const bytes = weightBytes(manifest);
  const size = bytes < 1e9 ? `${(bytes / 1e6).toPrecision(2)} MB` : `${(bytes / 1e9).toPrecision(2)} GB`;
  const notation = Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  page.facts.textContent = `${notation.format(manifest.model.parameters)} · ${manifest.precision} · ${size}`;
  page.facts.title = "Parameters, how they are stored, and the size of the files";
}

function showProgress({ path, share, whole }: { path: string; share: number; whole: boolean }): void {
  page.progress.value = share;
  page.status.textContent = `${whole ? "Checking" : "Loading"} ${path}`;
}

function showRunning({ provider, threads, fallbackReason, tokensPerCall, chats, takesSystem }: Running): void {
  const why = fallbackReason ? `; no WebGPU: ${fallbackReason}` : "";
  const pieces = Number.isFinite(tokensPerCall)
    ? `, ${tokensPerCall} tokens a call: with more of them this GPU answers wrongly`
    : "";
  page.provider.textContent =
    provider === "webgpu" ? `On the GPU by WebGPU${pieces}` : `By WebAssembly, ${plural(threads, "thread")}${why}`;
  document.body.dataset.provider = provider;
  page.loading.hidden = true;
  page.welcome.hidden = false;
  page.instructions.hidden = !takesSystem;
  for (const control of [page.message, page.send, page.newChat, page.openSelftest]) control.disabled = false;
  page.message.placeholder = chats ? "Message" : "Text to go on from";
  page.message.focus({ preventScroll: true });
}

function listen(): void {
  const ask = async (question: string) => {
    if (busy || !question.trim()) return;
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
      figures.textContent = told(await client.run("ask", { question, system: page.system.value }, show));
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
  page.stop.addEventListener("click", () => void client.run("stop", null).catch(fail));
  page.newChat.addEventListener("click", () => {
    void client.run("restart", null).catch(fail);
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
  page.openSelftest.addEventListener("click", () => void showSelfTest().catch(fail));
  page.closeSelftest.addEventListener("click", () => page.selftest.close());
}

async function showSelfTest(): Promise<void> {
  page.figures.hidden = page.download.hidden = true;
  page.speed.textContent = "";
  delete page.selftestStatus.dataset.verdict;
  page.selftest.showModal();
  setBusy(true);
  try {
    const say = (text: string) => void (page.selftestStatus.textContent = text);
    const { report, checks } = await client.run("selfTest", null, say);
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
  if (!(error instanceof TaskError)) console.error(error); // the worker has told what is its own
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

function told({ read, readMs, wrote, wroteMs, end }: Pace): string {
  const figures = [`read ${rate(read, readMs)}`, wrote > 0 ? `wrote ${rate(wrote, wroteMs)}` : "", end];
  return figures.filter(Boolean).join(" · ");
}

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
