import { describe, expect, test } from "vitest";

import { render, strip, type ChatFormat, type Message } from "../src/chat";
import type { Goldens } from "../src/selftest";
import { Tokenizer } from "../src/tokenizer";
import { bundleJson } from "./goldens";

const FORMAT: ChatFormat = {
  trims: true,
  user: ["<s>[", "]"],
  system_user: ["<s>{", "}[", "]"],
  assistant: ["", "</s>"],
  next_user: ["<s>[", "]"],
  answer: ">",
};
const user = (content: string): Message => ({ role: "user", content });
const assistant = (content: string): Message => ({ role: "assistant", content });
const system = (content: string): Message => ({ role: "system", content });

describe("a conversation as text", () => {
  test("one message", () => expect(render(FORMAT, [user(" a ")])).toBe("<s>[a]>"));

  test("a system message changes what stands around the first message, and nothing later", () =>
    expect(render(FORMAT, [system("s"), user("a"), assistant("b"), user("c")])).toBe("<s>{s}[a]b</s><s>[c]>"));

  test("white space stays where the template keeps it", () =>
    expect(render({ ...FORMAT, trims: false }, [user(" a ")])).toBe("<s>[ a ]>"));

  test("a system message that the model does not take is refused", () =>
    expect(() => render({ ...FORMAT, system_user: null }, [system("s"), user("a")])).toThrow("takes no system message"));

  test.each([[[]], [[assistant("b")]], [[user("a"), assistant("b")]], [[user("a"), user("b"), user("c")]]])(
    "roles out of turn are refused: %j",
    (messages) => expect(() => render(FORMAT, messages)).toThrow("the user last"),
  );

  test("white space is what Python's strip takes for it", () =>
    expect(strip("\x1c\x85\u3000 a\ufeff \n")).toBe("a\ufeff")); // Python: "\x1c\x85\u3000 a\ufeff \n".strip()
});

describe("the bundle's golden chats", () => {
  const format = bundleJson<ChatFormat>("chat_format.json");
  const goldens = bundleJson<Goldens>("goldens.json");
  const tokenizer = new Tokenizer(bundleJson("tokenizer.json"), bundleJson("tokenizer_config.json"));

  test.each(goldens.chats)("text and tokens of $text", ({ messages, text, ids }) => {
    expect(render(format, messages)).toBe(text);
    expect(tokenizer.encode(text)).toEqual(ids);
  });

  test.each(goldens.prompts)("greedy text of $text", ({ greedy_ids, greedy_text }) =>
    expect(tokenizer.decode(greedy_ids)).toBe(greedy_text));

  test("a character that is spread over tokens appears when it is whole", () => {
    const text = "naïve, 東京 🙂.";
    const ids = tokenizer.encode(text);
    expect(ids.length).toBeGreaterThan([...text].length); // some are spread, or this tests nothing
    const stages = ids.map((_, at) => tokenizer.decodeSoFar(ids.slice(0, at + 1)));
    expect(stages.filter((stage) => !text.startsWith(stage))).toEqual([]);
    expect(stages.at(-1)).toBe(text);
  });
});
