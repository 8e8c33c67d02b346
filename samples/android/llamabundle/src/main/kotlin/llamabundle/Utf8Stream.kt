package llamabundle

import java.nio.ByteBuffer
import java.nio.CharBuffer
import java.nio.charset.CodingErrorAction

/**
 * Bytes as tokens give them, to whole characters: a character that is split over tokens is held back until it is whole.
 *
 * Bytes that are no UTF-8 become U+FFFD.
 */
class Utf8Stream {
    private val decoder = Charsets.UTF_8.newDecoder()
        .onMalformedInput(CodingErrorAction.REPLACE)
        .onUnmappableCharacter(CodingErrorAction.REPLACE)
    private var held = ByteArray(0)

    /** The characters that [bytes] complete. */
    fun push(bytes: ByteArray): String = decode(held + bytes, last = false)

    /** What is left at the end: nothing, or U+FFFD for a character that was never completed. */
    fun finish(): String = decode(held, last = true)

    private fun decode(bytes: ByteArray, last: Boolean): String {
        val input = ByteBuffer.wrap(bytes)
        val output = CharBuffer.allocate(bytes.size + 1)
        decoder.decode(input, output, last)
        if (last) {
            decoder.flush(output)
            decoder.reset()
        }
        held = bytes.copyOfRange(input.position(), bytes.size)
        return output.flip().toString()
    }
}
