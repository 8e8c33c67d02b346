package llamabundle

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import java.nio.channels.FileChannel

/** The tensors of a safetensors file, each mapped into memory when it is asked for. */
class Safetensors private constructor(private val file: File, private val tensors: Map<String, Entry>) {
    private class Entry(val dtype: String, val shape: List<Long>, val start: Long, val bytes: Long)

    val names: Set<String> get() = tensors.keys

    /** Throws [BundleException] for a tensor that is not there; so do the accessors below, also for another dtype. */
    fun shape(name: String): List<Long> = entry(name).shape

    fun longs(name: String): LongBuffer = map(name, "I64").asLongBuffer()

    fun ints(name: String): IntBuffer = map(name, "I32").asIntBuffer()

    fun floats(name: String): FloatBuffer = map(name, "F32").asFloatBuffer()

    private fun entry(name: String): Entry = tensors[name]
        ?: throw BundleException("${file.name} has no tensor $name, but ${names.sorted().joinToString()}", COPY_AGAIN)

    private fun map(name: String, dtype: String): ByteBuffer {
        val entry = entry(name)
        if (entry.dtype != dtype) broken(file, "$name is ${entry.dtype}, $dtype was expected")
        return RandomAccessFile(file, "r").use { // a mapping outlives its channel
            it.channel.map(FileChannel.MapMode.READ_ONLY, entry.start, entry.bytes).order(ByteOrder.LITTLE_ENDIAN)
        }
    }

    companion object {
        private const val LENGTH_BYTES = 8L

        /** Bytes of one number of each dtype that a bundle's goldens have. */
        private val SIZES = mapOf("I64" to 8L, "I32" to 4L, "F32" to 4L)

        /** Throws [BundleException] for a file whose header and size do not agree. */
        fun open(file: File): Safetensors {
            val (header, dataStart) = header(file)
            val data = file.length() - dataStart
            val tensors = header.entries().filterKeys { it != "__metadata__" }.mapValues { (name, field) ->
                val shape = field["shape"].longs().toList()
                val (begin, end) = field["data_offsets"].longs().also { if (it.size != 2) field.wrong("two offsets") }
                val dtype = field["dtype"].string()
                val wanted = try {
                    SIZES[dtype]?.let { size -> shape.fold(size, Math::multiplyExact) }
                } catch (_: ArithmeticException) {
                    field["shape"].wrong("a shape whose product fits 64 bits")
                }
                if (begin < 0 || end < begin || end > data) {
                    broken(file, "$name lies at $begin to $end of $data bytes")
                }
                if (wanted != null && wanted != end - begin) {
                    broken(file, "$name has ${end - begin} bytes, its shape $shape of $dtype takes $wanted")
                }
                Entry(dtype, shape, dataStart + begin, end - begin)
            }
            return Safetensors(file, tensors)
        }

        private fun header(file: File): Pair<Field, Long> = RandomAccessFile(file, "r").use {
            if (it.length() < LENGTH_BYTES) broken(file, "it has ${it.length()} bytes, at least $LENGTH_BYTES were expected")
            val length = java.lang.Long.reverseBytes(it.readLong())
            if (length !in 0..it.length() - LENGTH_BYTES || length > Int.MAX_VALUE) {
                broken(file, "its header is to have $length bytes, the file has ${it.length()}")
            }
            val text = ByteArray(length.toInt()).also(it::readFully).decodeToString()
            Field.parse(file.name, text) to LENGTH_BYTES + length
        }

        private fun broken(file: File, reason: String): Nothing =
            throw BundleException("${file.name} is broken: $reason", COPY_AGAIN)
    }
}
