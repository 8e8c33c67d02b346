package llamabundle

/** One loaded artifact with one key-value cache. */
interface Runner : AutoCloseable {
    /** Forgets every token from [position] on; 0 starts anew. */
    fun rewind(position: Int)

    /** Appends tokens to the cache; the logits over the vocabulary after the last of them. */
    fun feed(ids: LongArray): FloatArray

    override fun close() {}
}

/** Text to tokens and back. */
interface Tokenizer {
    /** The tokens of [text], special ones found in it, none added to it. */
    fun encode(text: String): LongArray

    /** The bytes of one token; of a special one none, since it is no text. */
    fun bytes(id: Long): ByteArray
}
