package llamabundle

/** Why an answer ended. */
enum class End {
    /** The model ended it, by one of its stop tokens. */
    STOPPED,

    /** The cache has no position left. */
    CONTEXT_FULL,

    /** It has as many tokens as were asked for. */
    LIMIT,

    /** The listener wanted no more. */
    CANCELLED,
}

/** Answers with one runner, whose cache keeps what a prompt shares with the tokens before it. */
class Generation(private val runner: Runner, private val context: Int, private val stopTokens: Set<Long>) {
    private val cached = ArrayList<Long>()

    /**
     * Feeds what the cache lacks of [prompt] and gives each token of the answer to [onToken] until that returns false,
     * a stop token comes (which is not given), [limit] are given, or the context is full.
     *
     * Throws [BundleException] for a prompt that the context has no room for.
     */
    fun answer(prompt: LongArray, sampler: Sampler, limit: Int = Int.MAX_VALUE, onToken: (Long) -> Boolean): End {
        if (prompt.isEmpty() || prompt.size > context) {
            throw BundleException(
                "the conversation has ${prompt.size} tokens, the context takes 1 to $context",
                "start a new conversation, or export with a larger --context",
            )
        }
        var logits = feed(prompt.copyOfRange(keepShared(prompt), prompt.size))
        repeat(limit) {
            val token = sampler.choose(logits).toLong()
            if (token in stopTokens) return End.STOPPED
            if (!onToken(token)) return End.CANCELLED
            if (cached.size == context) return End.CONTEXT_FULL
            logits = feed(longArrayOf(token))
        }
        return End.LIMIT
    }

    /** Rewinds to where the cache and [prompt] part, short of its last token, whose logits are needed. */
    private fun keepShared(prompt: LongArray): Int {
        val most = minOf(cached.size, prompt.size - 1)
        val shared = (0 until most).firstOrNull { cached[it] != prompt[it] } ?: most
        runner.rewind(shared)
        cached.subList(shared, cached.size).clear()
        return shared
    }

    private fun feed(ids: LongArray): FloatArray {
        val logits = runner.feed(ids)
        ids.forEach(cached::add)
        return logits
    }
}
