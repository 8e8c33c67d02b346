package llamabundle

import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.max

/** How the artifact's logits compare to the reference's. */
class Parity(
    val positions: Int,
    val meanKlNats: Double,
    /** At any one position. */
    val worstKlNats: Double,
    val top1Agreement: Double,
    val decidedTop1Agreement: Double,
    val decidedPositions: Int,
    val maxAbsLogitDiff: Float,
)

class Greedy(val prompts: Int, val compared: Int, val agreeing: Int)

class Chats(val compared: Int, val agreeing: Int)

/** Medians of [runs], after one that warms up. [loadSeconds] is the app's to measure. */
class Latency(
    val loadSeconds: Double,
    val timeToFirstTokenMs: Double,
    val prefillTokensPerSecond: Double,
    val decodeTokensPerSecond: Double,
    val promptTokens: Int,
    val decodedTokens: Int,
    val threads: Int,
    val runs: Int,
)

/** A figure, or why there is none. */
sealed interface Measured<out T> {
    class Value<T>(val value: T) : Measured<T>

    class Absent(val reason: String) : Measured<Nothing>
}

/** Bounds of parity. */
class Gate(val meanKlNats: Double, val worstKlNats: Double, val decidedTop1Agreement: Double) {
    /** What [parity] misses, in sentences; none where it passes. */
    fun faults(parity: Parity): List<String> = buildList {
        if (!(parity.meanKlNats <= meanKlNats)) {
            add("mean KL is ${parity.meanKlNats} nats, at most $meanKlNats was expected")
        }
        if (!(parity.worstKlNats <= worstKlNats)) {
            add("KL at the worst position is ${parity.worstKlNats} nats, at most $worstKlNats was expected")
        }
        if (!(parity.decidedTop1Agreement >= decidedTop1Agreement)) {
            add(
                "top-1 agreement where the reference is decided is ${parity.decidedTop1Agreement}, " +
                    "at least $decidedTop1Agreement was expected",
            )
        }
    }
}

/** Drives a runner over the goldens of its bundle. */
class SelfTest(private val bundle: Bundle, private val runner: Runner) {
    private val goldens = bundle.goldens()
    private val context = bundle.manifest.context

    /** Two prefills, the second after a rewind, then one token at a time: all that a cache can do wrong shows here. */
    fun parity(): Parity {
        val comparison = Comparison(goldens.logits)
        val (first, second) = goldens.prefills
        val next = goldens.ids.copyOfRange(first, first + second)
        runner.rewind(0)
        comparison.add(feed(goldens.ids.copyOfRange(0, first)))
        feed(next)
        runner.rewind(first)
        comparison.add(feed(next))
        for (index in first + second until goldens.ids.size) comparison.add(feed(longArrayOf(goldens.ids[index])))
        return comparison.figures()
    }

    /** Each golden prompt continued, as far as the reference's choices are clear. */
    fun greedy(): Greedy {
        var compared = 0
        var agreeing = 0
        for (prompt in goldens.prompts) {
            val clear = prompt.greedyMargins.indexOfFirst { it < CLEAR_MARGIN }
            val count = minOf(if (clear < 0) prompt.greedyIds.size else clear, context - prompt.ids.size + 1)
            if (count <= 0) continue
            runner.rewind(0)
            var logits = feed(prompt.ids)
            for (step in 0 until count) {
                compared += 1
                if (argmax(logits).toLong() != prompt.greedyIds[step]) break
                agreeing += 1
                if (step + 1 < count) logits = feed(longArrayOf(prompt.greedyIds[step]))
            }
        }
        return Greedy(goldens.prompts.size, compared, agreeing)
    }

    /** The golden renders by `chat_format.json`, and their tokens where the app has a [tokenizer]. */
    fun chats(tokenizer: Tokenizer?): Measured<Chats> {
        if (goldens.chats.isEmpty()) return Measured.Absent("the bundle has no golden renders")
        val format = bundle.chatFormat()
        if (format == null && tokenizer == null) {
            return Measured.Absent("the bundle has no chat_format.json, and the app no tokenizer")
        }
        val agreeing = goldens.chats.count { chat ->
            val sameText = format == null || try {
                format.render(chat.messages) == chat.text
            } catch (_: BundleException) {
                false
            }
            sameText && (tokenizer == null || tokenizer.encode(chat.text).contentEquals(chat.ids))
        }
        return Measured.Value(Chats(goldens.chats.size, agreeing))
    }

    /** [clock] gives seconds. */
    fun latency(
        loadSeconds: Double, threads: Int, runs: Int = 3, clock: () -> Double = { System.nanoTime() * 1e-9 },
    ): Measured<Latency> {
        val promptTokens = minOf(PROMPT_TOKENS, context / 2, goldens.ids.size - 1)
        val decodedTokens = minOf(DECODED_TOKENS, goldens.ids.size - promptTokens)
        if (promptTokens < 1) return Measured.Absent("the goldens have ${goldens.ids.size} tokens, 2 are needed")
        val prompt = goldens.ids.copyOfRange(0, promptTokens)
        val decoded = goldens.ids.copyOfRange(promptTokens, promptTokens + decodedTokens)
        val prefills = ArrayList<Double>()
        val decodes = ArrayList<Double>()
        for (run in 0..runs) {
            runner.rewind(0)
            val started = clock()
            runner.feed(prompt)
            val prefilled = clock()
            for (token in decoded) runner.feed(longArrayOf(token))
            val ended = clock()
            if (run > 0) {
                prefills += prefilled - started
                decodes += ended - prefilled
            }
        }
        return Measured.Value(
            Latency(
                loadSeconds = loadSeconds,
                timeToFirstTokenMs = 1e3 * median(prefills),
                prefillTokensPerSecond = promptTokens / median(prefills),
                decodeTokensPerSecond = decodedTokens / median(decodes),
                promptTokens = promptTokens,
                decodedTokens = decodedTokens,
                threads = threads,
                runs = runs,
            ),
        )
    }

    /** A runner's answer, refused where it cannot be compared. */
    private fun feed(ids: LongArray): FloatArray {
        val logits = runner.feed(ids)
        if (logits.size != bundle.manifest.model.vocabSize) {
            throw BundleException(
                "the runner gave ${logits.size} logits, ${bundle.manifest.model.vocabSize} were expected",
                "check that the runner gives the last token's alone",
            )
        }
        logits.firstOrNull { !it.isFinite() }?.let {
            throw BundleException(
                "the artifact answered with a logit of $it, a finite one was expected",
                "report this with the device's name: its arithmetic overflows, or a kernel of its is broken",
            )
        }
        return logits
    }

    companion object {
        /** In logits: below it another processor may rightly choose otherwise. */
        private const val CLEAR_MARGIN = 0.25
        private const val PROMPT_TOKENS = 128
        private const val DECODED_TOKENS = 32
    }
}

/** Rows of logits against the goldens', one after the other. */
internal class Comparison(private val goldens: GoldenLogits) {
    private var rows = 0
    private var klNats = 0.0
    private var worstKlNats = 0.0
    private var same = 0
    private var decided = 0
    private var decidedSame = 0
    private var maxAbsDiff = 0f

    fun add(logits: FloatArray) {
        val row = rows++
        val kl = kl(row, logits)
        klNats += kl
        worstKlNats = max(worstKlNats, kl) // NaN stays
        val agrees = argmax(logits) == goldens.id(row, 0)
        if (agrees) same++
        if (isDecided(row)) {
            decided++
            if (agrees) decidedSame++
        }
        for (rank in 0 until goldens.kept) {
            maxAbsDiff = max(maxAbsDiff, abs(logits[goldens.id(row, rank)] - goldens.logit(row, rank)))
        }
    }

    fun figures(): Parity {
        check(rows == goldens.positions) { "$rows rows were compared, the goldens have ${goldens.positions}" }
        return Parity(
            positions = rows,
            meanKlNats = klNats / rows,
            worstKlNats = worstKlNats,
            top1Agreement = same.toDouble() / rows,
            decidedTop1Agreement = if (decided == 0) 1.0 else decidedSame.toDouble() / decided,
            decidedPositions = decided,
            maxAbsLogitDiff = maxAbsDiff,
        )
    }

    /** Over the kept tokens and one bin for all others. */
    private fun kl(row: Int, logits: FloatArray): Double {
        val normalizer = logSumExp(logits)
        var sum = 0.0
        var keptP = 0.0
        var keptQ = 0.0
        for (rank in 0 until goldens.kept) {
            val logP = goldens.logProbability(row, rank)
            val logQ = logits[goldens.id(row, rank)] - normalizer
            sum += exp(logP) * (logP - logQ)
            keptP += exp(logP)
            keptQ += exp(logQ)
        }
        val restP = max(1.0 - keptP, LEAST_REST)
        val restQ = max(1.0 - keptQ, LEAST_REST)
        return max(sum + restP * (ln(restP) - ln(restQ)), 0.0)
    }

    /** Whether the best logit is further ahead than fp16 can confuse: more than two of its spacings. */
    private fun isDecided(row: Int): Boolean {
        val best = goldens.logit(row, 0)
        val exponent = Math.getExponent(max(abs(best), LEAST_NORMAL_FP16)) // floor(log2)
        return best - goldens.logit(row, 1) > 2 * Math.scalb(1f, exponent - FP16_FRACTION_BITS)
    }

    private companion object {
        const val LEAST_REST = 1e-12
        const val LEAST_NORMAL_FP16 = 6.1035156e-5f // 2^-14
        const val FP16_FRACTION_BITS = 10
    }
}

internal fun logSumExp(logits: FloatArray): Double {
    val best = logits[argmax(logits)].toDouble()
    return best + ln(logits.sumOf { exp(it - best) })
}

/** The mean of the middle two where their number is even. */
internal fun median(values: List<Double>): Double {
    val sorted = values.sorted()
    return (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2
}
