/** Serves the page and a bundle from one server, which is all that the page ever talks to. */

import { createReadStream, readFileSync, statSync } from "node:fs";
import type { ServerResponse, IncomingMessage } from "node:http";
import path from "node:path";

import { defaultClientConditions, defineConfig, type Plugin } from "vite";

// A page that is isolated so may share memory between threads: WebAssembly computes on several cores only there.
const ISOLATED = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
};

/** The folder named in BUNDLE, at /bundle/. */
function bundleFolder(): Plugin {
  const folder = path.resolve(process.env.BUNDLE ?? "../../out/demo/onnxruntime");
  const serve = (request: IncomingMessage, response: ServerResponse, next: () => void) => {
    const file = path.join(folder, decodeURIComponent(new URL(request.url!, "http://page").pathname));
    const stat = file.startsWith(folder + path.sep) ? statSync(file, { throwIfNoEntry: false }) : undefined;
    if (!stat?.isFile()) return next();
    response.writeHead(200, { ...ISOLATED, "Content-Length": stat.size, "Content-Type": "application/octet-stream" });
    createReadStream(file).pipe(response);
  };
  return {
    name: "bundle-folder",
    configureServer: (server) => void server.middlewares.use("/bundle/", serve),
    configurePreviewServer: (server) => void server.middlewares.use("/bundle/", serve),
  };
}

export default defineConfig({
  define: { __VERSION__: JSON.stringify(JSON.parse(readFileSync("package.json", "utf8")).version) },
  base: "./", // the built page works in any folder of any server
  appType: "mpa", // a file that is not there is a 404, not the page again
  plugins: [bundleFolder()],
  // ONNX Runtime without its .wasm inside: src/model.ts says where that lies, so that the build has it once.
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions] },
  optimizeDeps: { exclude: ["onnxruntime-web/wasm", "onnxruntime-web/webgpu"] },
  worker: { format: "es" }, // it imports one of two builds of the runtime, when it knows which
  build: { target: "es2022", assetsInlineLimit: 0 },
  server: { headers: ISOLATED },
  preview: { headers: ISOLATED },
});
