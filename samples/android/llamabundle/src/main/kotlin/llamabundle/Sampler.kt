package llamabundle

import kotlin.math.exp
import kotlin.random.Random

/**
 * Chooses the next token: the likeliest at [temperature] 0, else at random among the [topK] likeliest, and of those
 * among the fewest whose probabilities reach [topP].
 */
class Sampler(
    private val temperature: Double = 0.0,
    private val topK: Int = Int.MAX_VALUE,
    private val topP: Double = 1.0,
    private val random: Random = Random.Default,
) {
    init {
        refuseUnless(temperature >= 0.0, "the temperature is $temperature", "0 (greedy) or more")
        refuseUnless(topK >= 1, "top-k is $topK", "1 or more")
        refuseUnless(topP > 0.0 && topP <= 1.0, "top-p is $topP", "a number above 0, at most 1")
    }

    fun choose(logits: FloatArray): Int {
        if (temperature == 0.0 || topK == 1) return argmax(logits)
        val candidates = candidates(logits)
        val kept = nucleus(candidates)
        var left = random.nextDouble() * kept.sumOf { it.weight }
        for (candidate in kept) {
            left -= candidate.weight
            if (left < 0.0) return candidate.id
        }
        return kept.last().id // rounding alone leads here
    }

    private class Candidate(val id: Int, val weight: Double)

    /** The [topK] likeliest tokens, best first; the lower id first where two are alike. */
    private fun candidates(logits: FloatArray): List<Candidate> {
        val best = logits[argmax(logits)]
        val all = logits.indices.map { Candidate(it, exp((logits[it] - best) / temperature)) }
        return all.sortedByDescending { it.weight }.take(topK)
    }

    private fun nucleus(candidates: List<Candidate>): List<Candidate> {
        if (topP == 1.0) return candidates
        val wanted = topP * candidates.sumOf { it.weight }
        var reached = 0.0
        return candidates.takeWhile { candidate -> (reached < wanted).also { reached += candidate.weight } }
    }

    private fun refuseUnless(holds: Boolean, found: String, wanted: String) {
        if (!holds) throw BundleException("$found, $wanted was expected", "change the settings of the sampler")
    }
}

/** The first of the largest. */
internal fun argmax(logits: FloatArray): Int {
    var best = 0
    for (index in logits.indices) if (logits[index] > logits[best]) best = index
    return best
}
