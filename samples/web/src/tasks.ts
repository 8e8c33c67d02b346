/**
 * How the page and the worker talk. A task is asked for by its name, tells of itself while it goes on, and ends with a
 * value or an error; several may be under way.
 */

import { BundleError, type Manifest } from "./bundle";
import type { Pace } from "./conversation";
import type { Forced, Provider } from "./model";
import type { Check, DeviceReport } from "./selftest";

/** What was loaded, as far as the page has to know. */
export interface Running {
  provider: Provider;
  threads: number;
  fallbackReason: string;
  tokensPerCall: number;
  /** Whether messages are put into a chat format; else each is continued as it stands. */
  chats: boolean;
  takesSystem: boolean;
}

/** Of all bytes that are loaded, the share that has come, `path` being the file in hand, and whether it is whole. */
type Loading = { manifest: Manifest } | { path: string; share: number; whole: boolean };

/** Each task: what it wants, what it tells meanwhile, and what it gives. */
export interface Tasks {
  load: { wants: { folder: string; forced: Forced }; tells: Loading; gives: Running };
  ask: { wants: { question: string; system: string }; tells: string; gives: Pace };
  stop: { wants: null; tells: never; gives: void };
  restart: { wants: null; tells: never; gives: void };
  selfTest: { wants: null; tells: string; gives: { report: DeviceReport; checks: Check[] } };
}

type Name = keyof Tasks;

export type Handlers = {
  [N in Name]: (wants: Tasks[N]["wants"], tell: (part: Tasks[N]["tells"]) => void) => Promise<Tasks[N]["gives"]>;
};

interface Request {
  id: number;
  name: Name;
  wants: unknown;
}

type Reply = { id: number } & ({ part: unknown } | { value: unknown } | { error: string });

/** A worker, the inside of one, or an end of a MessageChannel. */
interface Port {
  postMessage(message: unknown): void;
  addEventListener(type: "message", listener: (event: MessageEvent) => void): void;
}

/** What a task has failed with, in the words of the worker. */
export class TaskError extends Error {}

interface Waiting {
  tell: (part: never) => void;
  resolve: (value: never) => void;
  reject: (error: TaskError) => void;
}

/** The page's end. */
export class Client {
  private readonly waiting = new Map<number, Waiting>();
  private asked = 0;
  private failed: TaskError | null = null;

  constructor(private readonly port: Port) {
    port.addEventListener("message", ({ data }: MessageEvent<Reply>) => this.hear(data));
  }

  /** Rejects with a TaskError where the task fails. */
  run<N extends Name>(
    name: N,
    wants: Tasks[N]["wants"],
    tell: (part: Tasks[N]["tells"]) => void = () => {},
  ): Promise<Tasks[N]["gives"]> {
    const id = (this.asked += 1);
    return new Promise((resolve, reject) => {
      if (this.failed) return reject(this.failed);
      this.waiting.set(id, { tell, resolve, reject });
      this.port.postMessage({ id, name, wants } satisfies Request);
    });
  }

  /** End every task, those to come as well: there is nobody left to do them. */
  fail(reason: string): void {
    const failed = (this.failed = new TaskError(reason));
    this.waiting.forEach(({ reject }) => reject(failed));
    this.waiting.clear();
  }

  private hear(reply: Reply): void {
    const task = this.waiting.get(reply.id);
    if (!task) return;
    if ("part" in reply) return task.tell(reply.part as never);
    this.waiting.delete(reply.id);
    if ("error" in reply) task.reject(new TaskError(reply.error));
    else task.resolve(reply.value as never);
  }
}

/** The worker's end. */
export function serve(port: Port, handlers: Handlers): void {
  port.addEventListener("message", ({ data }: MessageEvent<Request>) => {
    const { id, name, wants } = data;
    const reply = (rest: object) => port.postMessage({ id, ...rest });
    const handler = handlers[name] as (wants: unknown, tell: (part: unknown) => void) => Promise<unknown>;
    handler(wants, (part) => reply({ part })).then(
      (value) => reply({ value }),
      (error) => {
        if (!(error instanceof BundleError)) console.error(error); // where it came from can be read there
        reply({ error: error instanceof Error ? error.message : String(error) });
      },
    );
  });
}
