import { expect, test } from "vitest";

import { Conversation, type Loaded } from "../src/conversation";
import type { Cache, Step } from "../src/model";

const END = 0;

/** A model that says what it is given to say, and writes down what it reads. Its tokens are letters' codes. */
function loadedOf(says: string, context = 99) {
  const reads: string[] = [];
  const released: Cache[] = [];
  const told = [...says].map((letter) => letter.charCodeAt(0));
  const empty: Cache = { ids: [], tensors: {} };
  const model = {
    empty,
    release: (cache: Cache) => void (cache !== empty && released.push(cache)),
    async advance(past: Cache, ids: readonly number[]): Promise<Step> {
      reads.push(String.fromCharCode(...ids));
      const logits = new Float32Array(128);
      logits[told.shift() ?? END] = 1;
      return { logits, cache: { ids: [...past.ids, ...ids], tensors: {} } };
    },
  };
  const decode = (ids: readonly number[]) => String.fromCharCode(...ids);
  const encode = (text: string) => [...text].map((letter) => letter.charCodeAt(0));
  const format = { trims: false, user: ["<", ">"], system_user: ["[", "]<", ">"], assistant: ["", ""] };
  const loaded = {
    bundle: { manifest: { context, model: { eos_token_ids: [END] } } },
    model,
    tokenizer: { encode, encodeBare: encode, decode, decodeSoFar: decode },
    format: { ...format, next_user: ["<", ">"], answer: "" },
  };
  return { loaded: loaded as unknown as Loaded, reads, released };
}

const never = new AbortController().signal;

test("an answer is shown letter by letter, and told how long it is", async () => {
  const { loaded, reads } = loadedOf("yes");
  const shown: string[] = [];
  const pace = await new Conversation(loaded).ask("is it?", "", never, (text) => shown.push(text));
  expect(shown).toEqual(["y", "ye", "yes", "yes"]);
  expect(reads).toEqual(["<is it?>", "y", "e", "s"]);
  expect(pace).toMatchObject({ read: 8, wrote: 3, end: "" });
});

test("of the next question only what is new is read, and of a changed system message all", async () => {
  const { loaded, reads } = loadedOf("a");
  const conversation = new Conversation(loaded);
  await conversation.ask("1", "", never, () => {});
  await conversation.ask("2", "", never, () => {});
  await conversation.ask("3", "be brief", never, () => {});
  expect(reads).toEqual(["<1>", "a", "<2>", "[be brief]<1>a<2><3>"]);
});

test("after a restart nothing is left", async () => {
  const { loaded, reads, released } = loadedOf("ab");
  const conversation = new Conversation(loaded);
  await conversation.ask("1", "", never, () => {});
  conversation.restart();
  expect(released.map((cache) => cache.ids.length)).toEqual([5]);
  await conversation.ask("2", "", never, () => {});
  expect(reads.at(-1)).toBe("<2>");
});

test("who stops gets no more than the token that was in the making", async () => {
  const { loaded } = loadedOf("endless");
  const stopping = new AbortController();
  const conversation = new Conversation(loaded);
  const pace = await conversation.ask("1", "", stopping.signal, (text) => text === "en" && stopping.abort());
  expect(pace).toMatchObject({ wrote: 2, end: "stopped" });
});

test("a wish to stop that comes as a message is heard between two tokens", async () => {
  const { loaded } = loadedOf("x".repeat(90));
  const stopping = new AbortController();
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => stopping.abort();
  let asked = false;
  const pace = await new Conversation(loaded).ask("1", "", stopping.signal, () => {
    if (!asked) port2.postMessage(null);
    asked = true;
  });
  port1.close();
  expect(pace.end).toBe("stopped");
  expect(pace.wrote).toBeLessThan(90);
});

test("an answer ends where the cache is full, and a question that fills it is refused", async () => {
  const { loaded } = loadedOf("abcdef", 6);
  expect(await new Conversation(loaded).ask("12", "", never, () => {})).toMatchObject({
    wrote: 3,
    end: "the cache is full",
  });
  const refused = new Conversation(loaded).ask("1234", "", never, () => {});
  await expect(refused).rejects.toThrow("The conversation has 6 tokens, but the cache holds 6: start a new chat.");
});
