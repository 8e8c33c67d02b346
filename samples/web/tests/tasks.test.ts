import { afterEach, expect, test, vi } from "vitest";

import { BundleError } from "../src/bundle";
import { Client, serve, TaskError, type Handlers } from "../src/tasks";

const open: MessagePort[] = [];
afterEach(() => open.splice(0).forEach((port) => port.close()));

/** A client whose worker has these tasks, at the other end of a channel. */
function clientOf(handlers: Partial<Handlers>): Client {
  const { port1, port2 } = new MessageChannel();
  open.push(port1, port2);
  port1.start();
  port2.start();
  serve(port2, handlers as Handlers);
  return new Client(port1);
}

const pace = { read: 3, readMs: 2, wrote: 2, wroteMs: 1, end: "" } as const;

test("a task tells of itself in order, and then gives its value", async () => {
  const told: string[] = [];
  const client = clientOf({
    async ask({ question, system }, tell) {
      for (const text of [question, `${question} ${system}`]) tell(text);
      return pace;
    },
  });
  expect(await client.run("ask", { question: "What", system: "news?" }, (text) => told.push(text))).toEqual(pace);
  expect(told).toEqual(["What", "What news?"]);
});

test("a task is heard while another goes on", async () => {
  let stop = () => {};
  const stopped = new Promise<void>((resolve) => (stop = resolve));
  const client = clientOf({ ask: () => stopped.then(() => pace), stop: async () => stop() });
  const asking = client.run("ask", { question: "", system: "" });
  await client.run("stop", null);
  expect(await asking).toEqual(pace);
});

test.each([
  [new BundleError("the file is cut off"), "the file is cut off", 0],
  [new TypeError("no such thing"), "no such thing", 1],
  [137, "137", 1],
])("%s fails one task, and is printed unless it is the bundle's", async (thrown, message, printed) => {
  const print = vi.spyOn(console, "error").mockImplementation(() => {});
  const client = clientOf({ ask: () => Promise.reject(thrown), restart: async () => {} });
  await expect(client.run("ask", { question: "", system: "" })).rejects.toThrow(new TaskError(message));
  expect(print).toHaveBeenCalledTimes(printed);
  print.mockRestore();
  await client.run("restart", null); // others go on
});

test("a worker that has died fails what waits, and what is asked later", async () => {
  const client = clientOf({ ask: () => new Promise(() => {}) });
  const waiting = client.run("ask", { question: "", system: "" });
  client.fail("The worker has failed: out of memory");
  await expect(waiting).rejects.toThrow("out of memory");
  await expect(client.run("restart", null)).rejects.toThrow("out of memory");
});
