/** One conversation with the model: what was said, and the cache of what the model has read of it. */

import type { Bundle } from "./bundle";
import { render, type ChatFormat, type Message } from "./chat";
import { argmax, nextTask, type Cache, type Model } from "./model";
import type { Tokenizer } from "./tokenizer";

/** Everything that a question needs; made once, when the bundle is loaded. */
export interface Loaded {
  bundle: Bundle;
  model: Model;
  tokenizer: Tokenizer;
  /** Null: the bundle's template cannot be told as text around messages, and a message is continued as it stands. */
  format: ChatFormat | null;
}

/** How many tokens were read and written, how long it took, and why it ended where the model did not end it. */
export interface Pace {
  read: number;
  readMs: number;
  wrote: number;
  wroteMs: number;
  end: "" | "stopped" | "the cache is full";
}

export class Conversation {
  private messages: Message[] = [];
  private cache: Cache;

  constructor(private readonly loaded: Loaded) {
    this.cache = loaded.model.empty;
  }

  restart(): void {
    this.messages = [];
    this.forget();
  }

  /** Asks, and calls `show` with the answer so far. */
  async ask(question: string, system: string, stopped: AbortSignal, show: (text: string) => void): Promise<Pace> {
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
    let end: Pace["end"] = "";
    for (;;) {
      this.cache = step.cache;
      const token = argmax(step.logits);
      if (spec.eos_token_ids.includes(token)) break;
      answer.push(token);
      show(tokenizer.decodeSoFar(answer));
      await nextTask(); // so that a wish to stop is heard
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

    return { read: unread.length, readMs: read - started, wrote: answer.length, wroteMs: written - read, end };
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
