package llamabundle

import java.io.File
import java.nio.FloatBuffer
import java.nio.IntBuffer

/** What the model answers, to test an artifact with nothing else at hand. */
class Goldens(
    /** The tokens to feed. */
    val ids: LongArray,
    /** How many of them the first and the second call take. */
    val prefills: Pair<Int, Int>,
    val logits: GoldenLogits,
    /** The mean KL that noise of 1e-6 on each linear of the reference gives. */
    val prompts: List<Prompt>,
    val chats: List<Chat>,
) {
    /** A prompt, the reference's greedy continuation, and by how many logits each choice was ahead of the next. */
    class Prompt(
        val text: String,
        val ids: LongArray,
        val greedyIds: LongArray,
        val greedyText: String,
        val greedyMargins: DoubleArray,
    )

    /** A golden render: what `chat_format.json` and the tokenizer have to give for [messages]. */
    class Chat(val messages: List<Message>, val text: String, val ids: LongArray)

    companion object {
        /** Throws [BundleException] for goldens that do not fit each other or the model. */
        fun read(json: File, tensors: File, manifest: Manifest): Goldens {
            val field = Field.read(json)
            val (first, second) = field["prefills"].longs().also { if (it.size != 2) field["prefills"].wrong("two") }
            val file = Safetensors.open(tensors)
            val ids = file.longs("ids").let { buffer -> LongArray(buffer.remaining()) { buffer.get(it) } }
            val (rows, kept) = file.shape("top_ids").also { if (it.size != 2) broken(tensors, "top_ids is $it") }
            val expected = ids.size - first - second + 2
            if (first < 1 || second < 1 || rows != expected || file.shape("logsumexp") != listOf(rows) ||
                file.shape("top_logits") != listOf(rows, kept) || kept < 2 || ids.size > manifest.context
            ) {
                broken(tensors, "$rows rows of $kept logits for ${ids.size} tokens, $expected rows were expected")
            }
            val vocabulary = 0L until manifest.model.vocabSize
            ids.firstOrNull { it !in vocabulary }?.let { broken(tensors, "token $it is none of $vocabulary") }
            val logits = GoldenLogits(
                kept.toInt(), file.ints("top_ids"), file.floats("top_logits"), file.floats("logsumexp"),
            )
            logits.checkIds(manifest.model.vocabSize)
            return Goldens(
                ids = ids,
                prefills = first.toInt() to second.toInt(),
                logits = logits,
                prompts = field["prompts"].list().map(::prompt),
                chats = field["chats"].let { if (it.isNull) emptyList() else it.list().map(::chat) },
            )
        }

        private fun prompt(field: Field): Prompt {
            val greedy = field["greedy_ids"].longs()
            val margins = field["greedy_margins"].list().map { it.double() }.toDoubleArray()
            if (margins.size != greedy.size) field["greedy_margins"].wrong("one margin for each of ${greedy.size} tokens")
            return Prompt(
                field["text"].string(), field["ids"].longs(), greedy, field["greedy_text"].string(), margins,
            )
        }

        private fun chat(field: Field): Chat {
            val messages = field["messages"].list().map {
                val name = it["role"].string()
                val role = Role.entries.find { role -> role.name.lowercase() == name }
                Message(role ?: it["role"].wrong("system, user or assistant"), it["content"].string())
            }
            return Chat(messages, field["text"].string(), field["ids"].longs())
        }

        private fun broken(file: File, reason: String): Nothing =
            throw BundleException("${file.name} is broken: $reason", COPY_AGAIN)
    }
}

/** The reference's [kept] most likely tokens at each position, best first, and what all of its logits sum up to. */
class GoldenLogits(
    val kept: Int,
    private val topIds: IntBuffer,
    private val topLogits: FloatBuffer,
    private val logSumExp: FloatBuffer,
) {
    val positions: Int get() = logSumExp.limit()

    fun id(row: Int, rank: Int): Int = topIds.get(row * kept + rank)

    fun logit(row: Int, rank: Int): Float = topLogits.get(row * kept + rank)

    fun logSumExp(row: Int): Float = logSumExp.get(row)

    /** Log of the reference's probability. */
    fun logProbability(row: Int, rank: Int): Double = logit(row, rank).toDouble() - logSumExp(row)

    internal fun checkIds(vocabSize: Int) {
        for (index in 0 until topIds.limit()) {
            if (topIds.get(index) !in 0 until vocabSize) {
                throw BundleException(
                    "the goldens hold token ${topIds.get(index)}, the vocabulary has $vocabSize", COPY_AGAIN,
                )
            }
        }
    }
}
