/**
 * Drives the built page in headless Chromium and prints what it saw, as JSON; tests/samples/test_web.py judges it.
 *
 *     node e2e.mjs http://localhost:4173/ QUESTION [FOLDER_FOR_SCREENSHOTS]
 *
 * The server has the bundle at /bundle/ and a damaged copy of it at /bundle/damaged/.
 */

import { chromium } from "playwright-core";

const [base, question, shots] = process.argv.slice(2);
const SLOW = 900_000; // ms; a self-test on a GPU that is software

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox", // containers run as root, where Chromium refuses its sandbox
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan",
    "--use-webgpu-adapter=swiftshader",
  ],
});

const strangers = [];
const troubles = [];
const watched = new Set();

/** A page; `inWorker` runs in its worker before all else. */
async function open(query, options = {}, inWorker = null) {
  const context = await browser.newContext({ viewport: { width: 1100, height: 760 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(SLOW);
  if (inWorker) {
    await page.route(/\/worker-[^/]*\.js$/, async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, body: `(${inWorker})();\n${await response.text()}` });
    });
  }
  page.on("request", (request) => {
    const { origin, protocol, pathname } = new URL(request.url());
    watched.add(pathname);
    if (protocol.startsWith("http") && origin !== new URL(base).origin) strangers.push(request.url());
  });
  page.on("pageerror", (error) => troubles.push(`${query}: ${error.message}`));
  page.on("console", (message) => message.type() === "error" && troubles.push(`${query}: ${message.text()}`));
  await page.goto(base + query);
  return page;
}

/** The first that appears: a page ready to be asked, or its error. */
async function loaded(page) {
  await page.locator("#message:enabled, #error:visible").first().waitFor();
  return (await page.locator("#error").isVisible()) ? await page.locator("#error").textContent() : null;
}

async function ask(page, text) {
  const answers = await page.locator(".assistant").count();
  await page.fill("#message", text);
  await page.press("#message", "Enter");
  const answer = page.locator(".assistant").nth(answers);
  await answer.locator(".figures:not(:empty)").waitFor();
  return { text: await answer.locator(".text").textContent(), figures: await answer.locator(".figures").textContent() };
}

/** Asks, and gives the text after every change of it; `stop`: presses Stop as soon as there is some. */
async function watch(page, text, { stop }) {
  await page.evaluate((stop) => {
    window.stages = [];
    window.observer?.disconnect();
    window.observer = new MutationObserver(() => {
      const answer = [...document.querySelectorAll(".assistant .text")].at(-1)?.textContent;
      if (!answer || answer === window.stages.at(-1)) return;
      window.stages.push(answer);
      if (stop) document.querySelector("#stop").click();
    });
    window.observer.observe(document.querySelector("#log"), { subtree: true, childList: true, characterData: true });
  }, stop);
  const answer = await ask(page, text);
  return { ...answer, stages: await page.evaluate(() => window.stages) };
}

async function selfTest(page) {
  await page.locator("#selftest-status[data-verdict]").waitFor();
  return {
    verdict: await page.locator("#selftest-status").textContent(),
    report: await page.evaluate(() => window.deviceReport ?? null),
  };
}

async function shot(page, name) {
  if (shots) await page.screenshot({ path: `${shots}/${name}.png` });
}

const seen = {};

{
  const page = await open("?provider=wasm");
  seen.wasm = { error: await loaded(page) };
  await shot(page, "desktop-light-welcome");
  seen.wasm.provider = await page.locator("#provider").textContent();
  seen.wasm.isolated = await page.evaluate(() => crossOriginIsolated);
  seen.wasm.workers = page.workers().length;
  seen.wasm.loadedByThePage = await page.evaluate(() => performance.getEntriesByType("resource").map(({ name }) => name));
  seen.wasm.answer = await watch(page, question, { stop: false });
  seen.wasm.second = await ask(page, "And what did he say to the king, my lord?");
  await shot(page, "desktop-light-chat");
  await page.click("#new-chat");
  seen.wasm.stopped = await watch(page, question, { stop: true });
  await page.click("#open-selftest");
  seen.wasm.selfTest = await selfTest(page);
  await shot(page, "desktop-light-selftest");
  const [download] = await Promise.all([page.waitForEvent("download"), page.click("#download")]);
  seen.wasm.download = download.suggestedFilename();
}

for (const colorScheme of ["light", "dark"]) {
  if (!shots) break;
  const phone = { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, colorScheme };
  const page = await open("", phone);
  await loaded(page);
  await shot(page, `phone-${colorScheme}-welcome`);
  await ask(page, question);
  await ask(page, "Tell me of the sea.");
  await shot(page, `phone-${colorScheme}-chat`);
  await page.click("#open-selftest");
  await selfTest(page);
  await shot(page, `phone-${colorScheme}-selftest`);
}

{
  const page = await open("?bundle=bundle/damaged/&provider=wasm");
  seen.damaged = await loaded(page);
  await shot(page, "desktop-light-damaged");
}

{
  const page = await open("?provider=wasm&threads=2");
  seen.threads = { error: await loaded(page), provider: await page.locator("#provider").textContent() };
  seen.threads.answer = await ask(page, question);
}

{
  const page = await open("");
  seen.byItself = { error: await loaded(page), provider: await page.locator("#provider").textContent() };
}

{
  // A GPU that looks well and gives no device: what a driver that is on the browser's block list does.
  const page = await open("", {}, () => {
    const requestDevice = () => Promise.reject(new Error("no device today"));
    const info = { vendor: "test", isFallbackAdapter: false };
    navigator.gpu.requestAdapter = async () => ({ requestDevice, info, features: new Set(), limits: {} });
  });
  seen.brokenGpu = { error: await loaded(page), provider: await page.locator("#provider").textContent() };
  if (!seen.brokenGpu.error) seen.brokenGpu.answer = await ask(page, question);
}

{
  const page = await open("?provider=webgpu&selftest=1");
  const error = await loaded(page);
  const provider = await page.locator("#provider").textContent();
  seen.webgpu = error ? { error } : { error, provider, ...(await selfTest(page)) };
}

console.log(JSON.stringify({ ...seen, watched: [...watched], strangers, troubles, browser: browser.version() }, null, 2));
await browser.close();
