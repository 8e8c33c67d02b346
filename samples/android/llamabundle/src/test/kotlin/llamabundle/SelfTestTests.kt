package llamabundle

import java.nio.FloatBuffer
import java.nio.IntBuffer
import kotlin.math.exp
import kotlin.math.ln

/** Answers with what the goldens say, as far as they say it. [change] spoils each row. */
class Replaying(private val bundle: Bundle, private val change: (FloatArray) -> Unit = {}) : Runner {
    private val goldens = bundle.goldens()
    private val rowAt: Map<Int, Int>
    private val fed = ArrayList<Long>()

    init {
        val positions = Safetensors.open(bundle.file("goldens.safetensors")).ints("positions")
        rowAt = (0 until positions.limit()).associateBy { positions.get(it) }
    }

    override fun rewind(position: Int) {
        check(position <= fed.size)
        fed.subList(position, fed.size).clear()
    }

    override fun feed(ids: LongArray): FloatArray {
        fed += ids.toList()
        val row = rowAt[fed.size - 1].takeIf { fed == goldens.ids.take(fed.size) }
        return (if (row == null) greedy() else golden(row)).also(change)
    }

    private fun golden(row: Int): FloatArray {
        val logits = goldens.logits
        val vocabSize = bundle.manifest.model.vocabSize
        val kept = (0 until logits.kept).sumOf { exp(logits.logit(row, it) - logits.logSumExp(row).toDouble()) }
        val other = logits.logSumExp(row) + ln((1 - kept).coerceAtLeast(1e-30) / (vocabSize - logits.kept))
        return FloatArray(vocabSize) { other.toFloat() }.also {
            for (rank in 0 until logits.kept) it[logits.id(row, rank)] = logits.logit(row, rank)
        }
    }

    private fun greedy(): FloatArray {
        val prompt = goldens.prompts.find { fed.take(it.ids.size) == it.ids.toList() }
        val next = prompt?.greedyIds?.getOrNull(fed.size - prompt.ids.size) ?: 0L
        return FloatArray(bundle.manifest.model.vocabSize).also { it[next.toInt()] = 1f }
    }
}

private fun swapBestTwo(logits: FloatArray) {
    val best = argmax(logits)
    val value = logits[best]
    logits[best] = Float.NEGATIVE_INFINITY
    val second = argmax(logits)
    logits[best] = logits[second]
    logits[second] = value
}

/** One row over four tokens, two of them kept, with probabilities 1/2 and 1/4. */
private fun compare(vararg q: Double): Parity {
    val p = floatArrayOf(ln(0.5f), ln(0.25f))
    val goldens = GoldenLogits(2, IntBuffer.wrap(intArrayOf(2, 0)), FloatBuffer.wrap(p), FloatBuffer.wrap(floatArrayOf(0f)))
    return Comparison(goldens).apply { add(FloatArray(4) { ln(q[it]).toFloat() + 3f }) }.figures()
}

private fun decided(best: Float, second: Float): Int {
    val goldens = GoldenLogits(
        2, IntBuffer.wrap(intArrayOf(0, 1)), FloatBuffer.wrap(floatArrayOf(best, second)),
        FloatBuffer.wrap(floatArrayOf(best + 1)),
    )
    return Comparison(goldens).apply { add(floatArrayOf(best, second, 0f)) }.figures().decidedPositions
}

fun Suite.selfTestTests() {
    test("KL is what a pencil gives") {
        expectNear(compare(0.25, 0.125, 0.5, 0.125).meanKlNats, 0.0, within = 1e-7)
        // 1/2 ln 2 - 1/4 ln 2; the others' bin is the same
        expectNear(compare(0.5, 0.125, 0.25, 0.125).meanKlNats, 0.25 * ln(2.0), within = 1e-6)
        // 1/2 ln(5/4) + 1/4 ln(5/8) + 1/4 ln(5/4)
        expectNear(compare(0.4, 0.1, 0.4, 0.1).meanKlNats, 0.04985676, within = 1e-6)
    }
    test("the worst position has a bound of its own, and what is no number misses it") {
        val gate = Gate(meanKlNats = 1e-3, worstKlNats = 1e-2, decidedTop1Agreement = 0.0)
        fun faults(worst: Double) = gate.faults(Parity(2, 1e-4, worst, 1.0, 1.0, 2, 0f))
        expect(faults(1e-2), emptyList())
        check("worst position is 0.011 nats" in faults(0.011).single())
        expect(faults(Double.NaN).size, 1)
    }
    test("top-1 is where the largest logit lies") {
        expect(compare(0.25, 0.125, 0.5, 0.125).top1Agreement, 1.0)
        expect(compare(0.5, 0.125, 0.25, 0.125).top1Agreement, 0.0)
        expectNear(compare(0.25, 0.125, 0.5, 0.125).maxAbsLogitDiff.toDouble(), 3.0, within = 1e-6)
    }
    test("a row is decided from more than two fp16 spacings on") {
        expect(decided(16f, 16f - 0.03125f), 0) // the spacing at 16 is 2^-6
        expect(decided(16f, 16f - 0.0313f), 1)
        expect(decided(15.99f, 15.99f - 0.02f), 1) // and half of that below it
        expect(decided(-16f, -16.02f), 0)
        expect(decided(0f, -1e-7f), 0) // no spacing is less than 2^-24
        expect(decided(0f, -1.3e-7f), 1)
    }
    test("no decided row counts as agreement") {
        expect(compare(0.5, 0.125, 0.25, 0.125).decidedTop1Agreement, 0.0)
        val even = GoldenLogits(
            2, IntBuffer.wrap(intArrayOf(0, 1)), FloatBuffer.wrap(floatArrayOf(1f, 1f)), FloatBuffer.wrap(floatArrayOf(2f)),
        )
        expect(Comparison(even).apply { add(floatArrayOf(0f, 1f)) }.figures().decidedTop1Agreement, 1.0)
    }
    test("a runner that answers as the reference passes") {
        val selfTest = SelfTest(sampleBundle, Replaying(sampleBundle))
        val parity = selfTest.parity()
        expect(parity.positions, sampleBundle.goldens().logits.positions)
        check(parity.meanKlNats < 1e-9) { "mean KL is ${parity.meanKlNats}" }
        expect(parity.top1Agreement to parity.decidedTop1Agreement, 1.0 to 1.0)
        expect(parity.maxAbsLogitDiff, 0f)
        expect(sampleBundle.manifest.gate.faults(parity), emptyList())
        val greedy = selfTest.greedy()
        expect(greedy.agreeing, greedy.compared)
        val clear = sampleBundle.goldens().prompts.sumOf { p -> p.greedyMargins.takeWhile { it >= 0.25 }.size }
        expect(greedy.prompts to greedy.compared, sampleBundle.goldens().prompts.size to clear)
    }
    test("a runner that swaps its best two fails, and greedy stops at the first difference") {
        val selfTest = SelfTest(sampleBundle, Replaying(sampleBundle, ::swapBestTwo))
        val parity = selfTest.parity()
        check("mean KL" in sampleBundle.manifest.gate.faults(parity).first())
        expect(parity.decidedTop1Agreement, 0.0)
        val greedy = selfTest.greedy()
        val begun = sampleBundle.goldens().prompts.count { it.greedyMargins.first() >= 0.25 }
        expect(greedy.compared to greedy.agreeing, begun to 0)
    }
    test("logits that are no numbers, or too few, are refused") {
        expectRefused("a logit of NaN") {
            SelfTest(sampleBundle, Replaying(sampleBundle) { it[3] = Float.NaN }).parity()
        }
        val short = object : Runner {
            override fun rewind(position: Int) {}
            override fun feed(ids: LongArray) = FloatArray(5)
        }
        expectRefused("5 logits", "${sampleBundle.manifest.model.vocabSize}") { SelfTest(sampleBundle, short).parity() }
    }
    test("chats agree with and without a tokenizer, and disagree with a wrong one") {
        val selfTest = SelfTest(sampleBundle, Replaying(sampleBundle))
        fun agreeing(tokenizer: Tokenizer?) = (selfTest.chats(tokenizer) as Measured.Value).value.agreeing
        val count = sampleBundle.goldens().chats.size
        expect(agreeing(null), count)
        expect(agreeing(BytePairTokenizer.read(sampleBundle.file("tokenizer.json"))), count)
        val wrong = object : Tokenizer {
            override fun encode(text: String) = longArrayOf(1)
            override fun bytes(id: Long) = ByteArray(0)
        }
        expect(agreeing(wrong), 0)
    }
    test("latency gives medians of the runs after the first") {
        // Seconds at which the clock is read: begin, prefilled, decoded, of a warm-up and three runs.
        val readings = listOf(0, 50, 99, 100, 102, 110, 200, 204, 220, 300, 301, 305).map { it.toDouble() }.iterator()
        val measured = SelfTest(sampleBundle, Replaying(sampleBundle)).latency(1.5, 2) { readings.next() }
        val latency = (measured as Measured.Value).value
        expect(latency.timeToFirstTokenMs, 2000.0)
        expectNear(latency.prefillTokensPerSecond, latency.promptTokens / 2.0, within = 1e-9)
        expectNear(latency.decodeTokensPerSecond, latency.decodedTokens / 8.0, within = 1e-9)
        expect(latency.runs to latency.threads, 3 to 2)
        expect(readings.hasNext(), false)
        expect(median(listOf(4.0, 1.0, 3.0, 2.0)), 2.5)
    }
}
