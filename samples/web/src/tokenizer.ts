/** Text to token ids and back, by the checkpoint's own tokenizer.json. */

import { Tokenizer as Reader } from "@huggingface/tokenizers";

import type { Bundle } from "./bundle";

export class Tokenizer {
  private readonly reader: Reader;

  constructor(tokenizer: object, config: object) {
    this.reader = new Reader(tokenizer, config);
  }

  static async load(bundle: Bundle): Promise<Tokenizer> {
    return new Tokenizer(
      await bundle.readJson<object>("tokenizer.json"),
      await bundle.readJson<object>("tokenizer_config.json"),
    );
  }

  /** Of a rendered conversation, whose begin token is in the text. */
  encode(text: string): number[] {
    return this.reader.encode(text, { add_special_tokens: false }).ids;
  }

  /** Of a bare text, to be continued as it stands: the begin token comes first. */
  encodeBare(text: string): number[] {
    return this.reader.encode(text, { add_special_tokens: true }).ids;
  }

  decode(ids: readonly number[]): string {
    // Some checkpoints ask for the space before punctuation to be dropped: made for words, wrong for bytes.
    return this.reader.decode([...ids], { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  /**
   * Text of an answer that is still being written. A character may be spread over tokens, and until the last of them
   * decodes to U+FFFD: it is held back.
   */
  decodeSoFar(ids: readonly number[]): string {
    return this.decode(ids).replace(/\uFFFD+$/, "");
  }
}
