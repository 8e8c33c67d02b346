/** The model's own thread: everything that computes, so that the page can draw and hear clicks meanwhile. */

import { Bundle, weightBytes } from "./bundle";
import type { ChatFormat } from "./chat";
import { Conversation, type Loaded } from "./conversation";
import { Model } from "./model";
import { judge, selfTest } from "./selftest";
import { serve, type Handlers } from "./tasks";
import { Tokenizer } from "./tokenizer";

let loaded: Loaded;
let conversation: Conversation;
let stopping = new AbortController();

/** The page asks for nothing else before `load` has given its answer. */
const handlers: Handlers = {
  async load({ folder, forced }, tell) {
    const bundle = await Bundle.open(new URL(folder));
    tell({ manifest: bundle.manifest });
    const received = new Map<string, number>();
    const all = weightBytes(bundle.manifest);
    const progress = (path: string, bytes: number, total: number) => {
      received.set(path, bytes);
      const share = [...received.values()].reduce((sum, part) => sum + part, 0) / all;
      tell({ path, share, whole: bytes === total });
    };
    const tokenizer = await Tokenizer.load(bundle);
    const format = bundle.has("chat_format.json") ? await bundle.readJson<ChatFormat>("chat_format.json") : null;
    const model = await Model.load(bundle, forced, progress);
    loaded = { bundle, model, tokenizer, format };
    conversation = new Conversation(loaded);
    const { provider, threads, fallbackReason, tokensPerCall } = model;
    const takesSystem = Boolean(format?.system_user);
    return { provider, threads, fallbackReason, tokensPerCall, chats: format !== null, takesSystem };
  },

  async ask({ question, system }, tell) {
    stopping = new AbortController();
    return conversation.ask(question, system, stopping.signal, tell);
  },

  async stop() {
    stopping.abort();
  },

  async restart() {
    conversation.restart();
  },

  async selfTest(_, tell) {
    const { bundle, model, tokenizer, format } = loaded;
    const report = await selfTest(bundle, model, tokenizer, format, tell);
    return { report, checks: judge(report, bundle.manifest) };
  },
};

serve(self, handlers);
