package llamabundle

import kotlin.math.ln
import kotlin.random.Random

private const val DRAWS = 20_000
private val probabilities = listOf(0.05, 0.5, 0.15, 0.3)
private val logits = FloatArray(4) { ln(probabilities[it]).toFloat() }

private fun shares(sampler: Sampler): List<Double> {
    val counts = IntArray(4)
    repeat(DRAWS) { counts[sampler.choose(logits)]++ }
    return counts.map { it.toDouble() / DRAWS }
}

private fun expectShares(found: List<Double>, wanted: List<Double>) =
    found.zip(wanted).forEach { (a, b) -> if (b == 0.0) expect(a, 0.0) else expectNear(a, b, within = 0.02) }

fun Suite.samplerTests() {
    test("greedy takes the first of the likeliest") {
        expect(Sampler().choose(logits), 1)
        expect(Sampler().choose(floatArrayOf(0f, 2f, 2f)), 1)
    }
    test("top-k of one is greedy at any temperature") {
        repeat(100) { expect(Sampler(temperature = 5.0, topK = 1, random = Random(it)).choose(logits), 1) }
    }
    test("the same seed gives the same tokens") {
        fun draw(seed: Int) = Sampler(temperature = 1.0, random = Random(seed)).let { s -> List(50) { s.choose(logits) } }
        expect(draw(7), draw(7))
        check(draw(7) != draw(8))
    }
    test("at temperature 1 tokens come as often as they are likely") {
        expectShares(shares(Sampler(temperature = 1.0, random = Random(1))), probabilities)
    }
    test("temperature 2 takes the square root of each probability") {
        // square roots 0.2236, 0.7071, 0.3873, 0.5477; their sum 1.8657
        expectShares(shares(Sampler(temperature = 2.0, random = Random(2))), listOf(0.1198, 0.3790, 0.2076, 0.2936))
    }
    test("top-k leaves the k likeliest") {
        expectShares(shares(Sampler(temperature = 1.0, topK = 2, random = Random(3))), listOf(0.0, 0.625, 0.0, 0.375))
    }
    test("top-p leaves the fewest that reach it") {
        fun kept(topP: Double) = shares(Sampler(temperature = 1.0, topP = topP, random = Random(4)))
        expectShares(kept(0.49), listOf(0.0, 1.0, 0.0, 0.0))
        expectShares(kept(0.6), listOf(0.0, 0.625, 0.0, 0.375))
        expectShares(kept(0.9), listOf(0.0, 0.5263, 0.1579, 0.3158))
        expectShares(kept(1.0), probabilities)
        expectShares(kept(1e-9), listOf(0.0, 1.0, 0.0, 0.0))
    }
    test("logits far apart or far from zero do no harm") {
        val sampler = Sampler(temperature = 0.01, topP = 0.99, random = Random(5))
        expect(sampler.choose(floatArrayOf(-3e38f, 1e30f, -1e30f)), 1)
    }
    test("settings that mean nothing are refused with their value") {
        expectRefused("temperature is -1.0") { Sampler(temperature = -1.0) }
        expectRefused("top-k is 0") { Sampler(topK = 0) }
        expectRefused("top-p is 0.0") { Sampler(topP = 0.0) }
        expectRefused("top-p is NaN") { Sampler(topP = Double.NaN) }
    }
}
