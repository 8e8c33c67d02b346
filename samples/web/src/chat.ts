/** A conversation as the text that the model was trained on, by chat_format.json: no template language is needed. */

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface ChatFormat {
  /** White space at both ends of each message is dropped. */
  trims: boolean;
  /** Around the user's first message, where there is no system message. */
  user: [string, string];
  /** Before the system message, between it and the user's first, after that; null: none is taken. */
  system_user: [string, string, string] | null;
  assistant: [string, string];
  next_user: [string, string];
  /** At the end, where the model goes on. */
  answer: string;
}

/**
 * The text of a system message or none, then user and assistant in turn, the user last. The begin token is in it.
 * Throws for any other order.
 */
export function render(format: ChatFormat, messages: readonly Message[]): string {
  const system = messages[0]?.role === "system" ? messages[0] : null;
  const turns = system ? messages.slice(1) : messages;
  if (system && !format.system_user) throw new Error("This model takes no system message: leave it out.");
  if (turns.length % 2 === 0 || turns.some((turn, at) => turn.role !== (at % 2 === 0 ? "user" : "assistant"))) {
    const found = messages.map((message) => message.role).join(", ") || "none";
    throw new Error(`The roles are ${found}, but user and assistant have to take turns, the user last.`);
  }
  const content = (message: Message) => (format.trims ? strip(message.content) : message.content);

  let text = system ? format.system_user![0] + content(system) : "";
  turns.forEach((turn, at) => {
    let around = turn.role === "assistant" ? format.assistant : format.next_user;
    if (at === 0) around = system ? [format.system_user![1], format.system_user![2]] : format.user;
    text += around[0] + content(turn) + around[1];
  });
  return text + format.answer;
}

/**
 * White space as Python's str.strip knows it, which templates are written with. JavaScript's trim differs: it drops
 * the byte order mark, and keeps the separators 1C to 1F and 85.
 */
export function strip(text: string): string {
  const space = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
  return text.replace(new RegExp(`^${space}`), "").replace(new RegExp(`${space}$`), "");
}
