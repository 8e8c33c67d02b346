package llamabundle

import java.io.File
import java.util.PriorityQueue
import java.util.regex.Pattern

/**
 * The byte-level pair encoding of Llama 3, from its `tokenizer.json`: text is split by a pattern, and the bytes of each
 * part are joined pair by pair, the earliest learnt pair first.
 */
class BytePairTokenizer private constructor(
    private val vocabulary: Map<String, Long>,
    private val ranks: Map<Pair<String, String>, Int>,
    private val special: Map<String, Long>,
    private val split: Pattern,
    /** Whether a part that is a token is taken whole, however its bytes would join. */
    private val takesWholeParts: Boolean,
) : Tokenizer {
    private val pieces: Map<Long, String> = vocabulary.entries.associate { (piece, id) -> id to piece }
    private val specialIds = special.values.toSet()
    private val specialText = Pattern.compile(
        special.keys.sortedByDescending { it.length }.joinToString("|") { Pattern.quote(it) }.ifEmpty { "(?!)" },
    )

    override fun encode(text: String): LongArray {
        val ids = ArrayList<Long>()
        val matcher = specialText.matcher(text)
        var start = 0
        while (matcher.find()) {
            encodeOrdinary(text.substring(start, matcher.start()), ids)
            ids += special.getValue(matcher.group())
            start = matcher.end()
        }
        encodeOrdinary(text.substring(start), ids)
        return ids.toLongArray()
    }

    override fun bytes(id: Long): ByteArray {
        if (id in specialIds) return ByteArray(0)
        val piece = pieces[id] ?: throw BundleException(
            "token $id is none of the tokenizer's ${pieces.size + special.size}", COPY_AGAIN,
        )
        return ByteArray(piece.length) { BYTE_OF.getValue(piece[it]) }
    }

    /** Parts that the pattern does not match stand between those that it does, and are parts as well. */
    private fun encodeOrdinary(text: String, ids: MutableList<Long>) {
        val matcher = split.matcher(text)
        var start = 0
        while (matcher.find()) {
            if (matcher.start() > start) encodePart(text.substring(start, matcher.start()), ids)
            if (matcher.end() > matcher.start()) encodePart(matcher.group(), ids)
            start = matcher.end()
        }
        if (start < text.length) encodePart(text.substring(start), ids)
    }

    private fun encodePart(part: String, ids: MutableList<Long>) {
        val letters = part.encodeToByteArray().map { LETTER_OF[it.toInt() and 0xFF].toString() }
        val whole = letters.joinToString("")
        vocabulary[whole]?.takeIf { takesWholeParts }?.let {
            ids += it
            return
        }
        for (piece in join(letters)) {
            ids += vocabulary[piece] ?: throw BundleException("the vocabulary lacks \"$piece\"", COPY_AGAIN)
        }
    }

    private class Join(val rank: Int, val left: Int, val piece: String)

    /** Pieces in a linked list, its joins in a queue: a part of n bytes takes n log n steps, however long it is. */
    private fun join(letters: List<String>): List<String> {
        val pieces = letters.toTypedArray<String?>()
        val next = IntArray(pieces.size) { it + 1 }
        val previous = IntArray(pieces.size) { it - 1 }
        val queue = PriorityQueue<Join>(compareBy({ it.rank }, { it.left }))
        fun offer(left: Int) {
            if (left < 0 || next[left] >= pieces.size) return
            val pair = pieces[left]!! to pieces[next[left]]!!
            ranks[pair]?.let { queue += Join(it, left, pair.first + pair.second) }
        }
        for (left in pieces.indices) offer(left)
        while (queue.isNotEmpty()) {
            val found = queue.remove()
            val right = pieces[found.left]?.let { next[found.left] } ?: continue
            if (right >= pieces.size || pieces[found.left] + pieces[right] != found.piece) continue // joined since
            pieces[found.left] = found.piece
            pieces[right] = null
            next[found.left] = next[right]
            if (next[right] < pieces.size) previous[next[right]] = found.left
            offer(previous[found.left])
            offer(found.left)
        }
        return pieces.filterNotNull()
    }

    companion object {
        /** Throws [BundleException] for a tokenizer of another kind: bring a library of your own for it. */
        fun read(file: File): BytePairTokenizer {
            val json = Field.read(file)
            val model = json["model"]
            if (!json["normalizer"].isNull) json["normalizer"].wrong("null")
            if (model["type"].string() != "BPE") model["type"].wrong("BPE")
            for (name in listOf("byte_fallback", "fuse_unk")) {
                if (!model[name].isNull && model[name].boolean()) model[name].wrong("false")
            }
            val merges = model["merges"].list().map(::pair)
            return BytePairTokenizer(
                vocabulary = model["vocab"].entries().mapValues { (_, id) -> id.long() },
                ranks = merges.withIndex().associate { (rank, pair) -> pair to rank },
                special = json["added_tokens"].list().associate { it["content"].string() to it["id"].long() },
                split = pattern(json["pre_tokenizer"]),
                takesWholeParts = model["ignore_merges"].let { !it.isNull && it.boolean() },
            )
        }

        /** Older files hold a pair as one string with a blank in it. */
        private fun pair(merge: Field): Pair<String, String> {
            val parts = if (merge.json is kotlinx.serialization.json.JsonArray) {
                merge.strings(2)
            } else {
                merge.string().split(" ").also { if (it.size != 2) merge.wrong("two pieces") }
            }
            return parts[0] to parts[1]
        }

        private fun pattern(json: Field): Pattern {
            if (json["type"].string() != "Sequence") json["type"].wrong("Sequence (of Split and ByteLevel)")
            val steps = json["pretokenizers"].list()
            val kinds = steps.map { it["type"].string() }
            if (kinds != listOf("Split", "ByteLevel")) json["pretokenizers"].wrong("Split, then ByteLevel")
            val (split, byteLevel) = steps
            if (split["behavior"].string() != "Isolated") split["behavior"].wrong("Isolated")
            if (split["invert"].boolean()) split["invert"].wrong("false")
            if (byteLevel["use_regex"].boolean()) byteLevel["use_regex"].wrong("false")
            if (byteLevel["add_prefix_space"].boolean()) byteLevel["add_prefix_space"].wrong("false")
            return Pattern.compile(spellOutSpace(split["pattern"]["Regex"].string()))
        }

        /** Unicode's white space, which `\s` means to the tokenizer, and on Android, but not on the JVM. */
        private const val SPACE = "\\t-\\r\\u0085\\p{Z}"

        private fun spellOutSpace(pattern: String): String = buildString {
            var inClass = false
            var index = 0
            while (index < pattern.length) {
                val here = pattern[index]
                val escaped = pattern.getOrNull(index + 1)?.takeIf { here == '\\' }
                append(
                    when {
                        escaped == 's' -> if (inClass) SPACE else "[$SPACE]"
                        escaped == 'S' && !inClass -> "[^$SPACE]"
                        escaped != null -> "$here$escaped"
                        else -> here.toString()
                    },
                )
                if (escaped == null && here == '[') inClass = true
                if (escaped == null && here == ']') inClass = false
                index += if (escaped == null) 1 else 2
            }
        }

        /**
         * The letter that stands for each byte in a vocabulary: itself where it can be seen, else the next from U+0100
         * (GPT-2's table, https://github.com/openai/gpt-2/blob/master/src/encoder.py).
         */
        private val LETTER_OF: CharArray = CharArray(256).also { letters ->
            val visible = ('!'..'~') + ('\u00A1'..'\u00AC') + ('\u00AE'..'\u00FF')
            for (letter in visible) letters[letter.code] = letter
            var spare = '\u0100'
            for (byte in 0..255) if (byte.toChar() !in visible) letters[byte] = spare++
        }

        private val BYTE_OF: Map<Char, Byte> = LETTER_OF.withIndex().associate { (byte, letter) -> letter to byte.toByte() }
    }
}
