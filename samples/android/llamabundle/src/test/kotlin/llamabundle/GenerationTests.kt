package llamabundle

private const val CONTEXT = 8
private const val STOP = 9L

/** Answers n with n + 1, and keeps what it was asked. */
private class Counting : Runner {
    val cache = ArrayList<Long>()
    val calls = ArrayList<List<Long>>()

    override fun rewind(position: Int) {
        check(position <= cache.size) { "rewound to $position of ${cache.size}" }
        cache.subList(position, cache.size).clear()
    }

    override fun feed(ids: LongArray): FloatArray {
        calls += ids.toList()
        cache += ids.toList()
        check(cache.size <= CONTEXT) { "fed beyond the context" }
        return FloatArray(20) { if (it.toLong() == ids.last() + 1) 1f else 0f }
    }
}

fun Suite.generationTests() {
    fun answer(prompt: LongArray, limit: Int = 100, runner: Runner = Counting(), upTo: Long = 100): Pair<List<Long>, End> {
        val tokens = ArrayList<Long>()
        val generation = Generation(runner, CONTEXT, setOf(STOP))
        val end = generation.answer(prompt, Sampler(), limit) { tokens += it; it < upTo }
        return tokens to end
    }
    test("an answer ends at a stop token, which is not given") {
        expect(answer(longArrayOf(5, 6)), listOf(7L, 8L) to End.STOPPED)
    }
    test("an answer ends when the context is full, with the token that its last position gave") {
        expect(answer(longArrayOf(10, 10, 10, 10, 10, 10)), listOf(11L, 12L, 13L) to End.CONTEXT_FULL)
        expect(answer(LongArray(CONTEXT) { 10 }), listOf(11L) to End.CONTEXT_FULL)
    }
    test("an answer ends at its limit, and when nobody listens") {
        expect(answer(longArrayOf(1), limit = 2), listOf(2L, 3L) to End.LIMIT)
        expect(answer(longArrayOf(1), upTo = 3), listOf(2L, 3L) to End.CANCELLED)
    }
    test("a prompt that does not fit names both sizes") {
        expectRefused("9 tokens", "1 to 8", "--context") { answer(LongArray(9)) }
        expectRefused("0 tokens") { answer(LongArray(0)) }
    }
    test("what a prompt shares with the cache is not fed again") {
        val runner = Counting()
        val generation = Generation(runner, CONTEXT, setOf(STOP))
        generation.answer(longArrayOf(1, 7), Sampler()) { true }
        expect(runner.calls, listOf(listOf(1L, 7L), listOf(8L)))
        runner.calls.clear()
        generation.answer(longArrayOf(1, 7, 8, 9, 2, 8), Sampler()) { true }
        expect(runner.calls, listOf(listOf(9L, 2L, 8L)))
        runner.calls.clear()
        generation.answer(longArrayOf(1, 7, 8), Sampler()) { true } // the last token is always fed
        expect(runner.calls, listOf(listOf(8L)))
        expect(runner.cache, listOf(1L, 7L, 8L))
    }
}
