/** The folder that an export wrote, read over HTTP: nothing of it is used before its size and SHA-256 are right. */

export const SCHEMA = "llama-export/bundle/1";

export interface Manifest {
  schema: string;
  target: string;
  precision: string;
  context: number;
  logits: "last" | "all";
  scheme: { compute_dtype: string; kv_dtype: string };
  parity: { gate_mean_kl_nats: number; gate_worst_kl_nats: number; gate_decided_top1_agreement: number };
  model: {
    name: string;
    vocab_size: number;
    num_hidden_layers: number;
    num_key_value_heads: number;
    head_dim: number;
    bos_token_id: number;
    eos_token_ids: number[];
    parameters: number;
  };
  files: { path: string; bytes: number; sha256: string }[];
}

/** What is wrong with a bundle, in a sentence for the person who made or copied it. */
export class BundleError extends Error {}

/** How many bytes of a file have come in. */
export type Progress = (path: string, bytes: number, total: number) => void;

export class Bundle {
  private constructor(
    private readonly folder: URL,
    readonly manifest: Manifest,
    readonly manifestSha256: string,
  ) {}

  static async open(folder: URL): Promise<Bundle> {
    if (!crypto.subtle) {
      // Browsers give their hash functions only to pages that nobody could have changed on the way.
      throw new BundleError(
        `This page came over ${location.protocol}//${location.hostname}, where a browser computes no checksums: ` +
          "serve it over https or from localhost.",
      );
    }
    const response = await request(new URL("manifest.json", folder));
    const bytes = new Uint8Array(await response.arrayBuffer());
    const manifest = parseJson<Manifest>("manifest.json", bytes);
    refuse(manifest);
    return new Bundle(folder, manifest, await sha256(bytes));
  }

  has(path: string): boolean {
    return this.manifest.files.some((file) => file.path === path);
  }

  /** A file, checked. Throws BundleError with the value found and the value wanted. */
  async read(path: string, progress?: Progress): Promise<Uint8Array<ArrayBuffer>> {
    const wanted = this.entry(path);
    const response = await request(new URL(path, this.folder));
    const bytes = await download(response, wanted, progress);
    const found = await sha256(bytes);
    if (found !== wanted.sha256) {
      throw new BundleError(
        `${path} has the SHA-256 ${short(found)}, but the manifest says ${short(wanted.sha256)}: ` +
          "the file is damaged or of another export; copy the bundle again.",
      );
    }
    return bytes;
  }

  async readJson<T>(path: string): Promise<T> {
    return parseJson<T>(path, await this.read(path));
  }

  private entry(path: string): Manifest["files"][number] {
    const found = this.manifest.files.find((file) => file.path === path);
    if (!found) throw new BundleError(`The manifest lists no ${path}, which this page needs: export the model again.`);
    return found;
  }
}

/** Size of the artifact's files: what takes the time to load. */
export function weightBytes(manifest: Manifest): number {
  const files = manifest.files.filter(({ path }) => path === "model.onnx" || path === "model.onnx.data");
  return files.reduce((sum, file) => sum + file.bytes, 0);
}

/** Throws BundleError for a manifest that this page cannot run. */
export function refuse(manifest: Manifest): void {
  if (manifest.schema !== SCHEMA) {
    throw new BundleError(`The manifest's schema is ${manifest.schema}, but this page reads ${SCHEMA}.`);
  }
  if (manifest.target !== "onnxruntime") {
    throw new BundleError(
      `The bundle is for ${manifest.target}, but this page runs onnxruntime: export with --target onnxruntime.`,
    );
  }
  if (manifest.scheme.kv_dtype !== "fp32") {
    throw new BundleError(`The cache of this bundle holds ${manifest.scheme.kv_dtype}, but this page keeps fp32.`);
  }
  const sizes = {
    context: manifest.context,
    "model.vocab_size": manifest.model.vocab_size,
    "model.num_hidden_layers": manifest.model.num_hidden_layers,
    "model.num_key_value_heads": manifest.model.num_key_value_heads,
    "model.head_dim": manifest.model.head_dim,
  };
  for (const [name, value] of Object.entries(sizes)) {
    if (!Number.isInteger(value) || value < 1) {
      throw new BundleError(`${name} in the manifest is ${value}, but it has to be a positive whole number.`);
    }
  }
}

/** The body of a response, straight into memory of the size that it should have. */
async function download(
  response: Response,
  wanted: { path: string; bytes: number },
  progress?: Progress,
): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(wanted.bytes);
  let found = 0;
  for (const reader = response.body!.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (found + value.length > wanted.bytes) {
      await reader.cancel(); // what is too long may be endless
      throw wrongSize(wanted, `at least ${(found + value.length).toLocaleString("en")}`);
    }
    bytes.set(value, found);
    found += value.length;
    progress?.(wanted.path, found, wanted.bytes);
  }
  if (found !== wanted.bytes) throw wrongSize(wanted, found.toLocaleString("en"));
  return bytes;
}

function wrongSize(wanted: { path: string; bytes: number }, found: string): BundleError {
  return new BundleError(
    `${wanted.path} has ${found} bytes, but the manifest says ${wanted.bytes.toLocaleString("en")}: ` +
      "the file is cut off or of another export; copy the bundle again.",
  );
}

async function request(url: URL): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(url);
  } catch (error) {
    throw new BundleError(`${url} cannot be reached: ${(error as Error).message}.`);
  }
  if (!response.ok) throw new BundleError(`${url} answers ${response.status}, but a file was expected there.`);
  return response;
}

function parseJson<T>(path: string, bytes: Uint8Array): T {
  try {
    return JSON.parse(new TextDecoder().decode(bytes)) as T;
  } catch (error) {
    throw new BundleError(`${path} is not JSON: ${(error as Error).message}.`);
  }
}

async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function short(hash: string): string {
  return `${hash.slice(0, 12)}…`;
}
