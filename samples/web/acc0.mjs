import { chromium } from "playwright-core";
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox","--enable-unsafe-webgpu","--enable-features=Vulkan","--use-webgpu-adapter=swiftshader"] });
const page = await (await browser.newContext()).newPage(); page.setDefaultTimeout(900000);
await page.goto("http://localhost:4173/");
console.log(await page.evaluate(async () => { const a = await navigator.gpu.requestAdapter(); return JSON.stringify([[...a.features], [...navigator.gpu.wgslLanguageFeatures]]); }));
await page.goto("http://localhost:4173/?provider=webgpu&selftest=1&bundle=bundle/acc0/");
await page.locator("#selftest-status[data-verdict], #error:visible").first().waitFor();
console.log(JSON.stringify(await page.evaluate(() => [window.deviceReport, document.querySelector('#error').textContent])));
await browser.close();
