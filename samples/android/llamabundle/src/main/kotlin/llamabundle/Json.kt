package llamabundle

import java.io.File
import java.io.IOException
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.double
import kotlinx.serialization.json.int
import kotlinx.serialization.json.long

/**
 * A value of a JSON file that knows where it stands, so that every complaint about it can say so.
 *
 * Each accessor throws a [BundleException] that names the file and the field for a value that is absent or of another
 * kind.
 */
internal class Field private constructor(private val file: String, private val path: String, val json: JsonElement?) {
    val isNull get() = json == null || json is JsonNull

    operator fun get(name: String) =
        Field(file, if (path.isEmpty()) name else "$path.$name", (json as? JsonObject ?: wrong("an object"))[name])

    fun list(): List<Field> =
        (json as? JsonArray ?: wrong("a list")).mapIndexed { index, item -> Field(file, "$path[$index]", item) }

    fun entries(): Map<String, Field> =
        (json as? JsonObject ?: wrong("an object")).mapValues { (name, _) -> get(name) }

    fun string(): String = (json as? JsonPrimitive)?.takeIf { it.isString }?.content ?: wrong("a string")

    fun int(): Int = number("a whole number") { int }

    fun long(): Long = number("a whole number") { long }

    fun double(): Double = number("a number") { double }

    fun boolean(): Boolean = number("true or false") { boolean }

    fun strings(size: Int): List<String> =
        list().map { it.string() }.also { if (it.size != size) wrong("$size strings") }

    fun longs(): LongArray = list().let { items -> LongArray(items.size) { items[it].long() } }

    fun wrong(wanted: String): Nothing {
        val found = if (json == null) "is missing" else "is ${json.toString().take(60)}"
        throw BundleException("$file: ${path.ifEmpty { "the whole" }} $found, $wanted was expected", COPY_AGAIN)
    }

    private fun <T> number(wanted: String, read: JsonPrimitive.() -> T): T {
        val primitive = (json as? JsonPrimitive)?.takeUnless { it.isString || it is JsonNull } ?: wrong(wanted)
        return try {
            primitive.read()
        } catch (_: IllegalArgumentException) { // NumberFormatException is one
            wrong(wanted)
        }
    }

    companion object {
        fun read(file: File): Field {
            val text = try {
                file.readText()
            } catch (error: IOException) {
                throw BundleException("${file.name} cannot be read from ${file.parent}", COPY_AGAIN, error)
            }
            return parse(file.name, text)
        }

        fun parse(file: String, text: String): Field = try {
            Field(file, "", Json.parseToJsonElement(text))
        } catch (error: SerializationException) {
            throw BundleException("$file is no JSON (${error.message?.lineSequence()?.first()})", COPY_AGAIN, error)
        }
    }
}
