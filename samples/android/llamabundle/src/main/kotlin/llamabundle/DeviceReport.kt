package llamabundle

import java.io.File
import java.io.FileOutputStream
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.buildJsonObject
import kotlinx.serialization.json.put

/** What was tested, as a person would name it. */
class Device(val model: String, val os: String, val runtime: String, val app: String)

/** The findings of one self-test, for `llama-export validate BUNDLE --device-report F`. */
class DeviceReport(
    val manifestSha256: String,
    val device: Device,
    val parity: Measured<Parity>,
    val greedy: Measured<Greedy>,
    val chats: Measured<Chats>,
    val latency: Measured<Latency>,
    val peakMemoryBytes: Long?,
) {
    fun toJson(): JsonObject = buildJsonObject {
        put("schema", SCHEMA)
        put("manifest_sha256", manifestSha256)
        put("device", section("model" to device.model, "os" to device.os, "runtime" to device.runtime, "app" to device.app))
        put("parity", parity.section(PARITY) {
            listOf(
                it.positions, it.meanKlNats, it.worstKlNats, it.top1Agreement, it.decidedTop1Agreement,
                it.decidedPositions,
                it.maxAbsLogitDiff.toDouble(), // digit for digit as the exporter writes a float32
            )
        })
        put("greedy", greedy.section(GREEDY) { listOf(it.prompts, it.compared, it.agreeing) })
        put("chats", chats.section(CHATS) { listOf(it.compared, it.agreeing) })
        put("latency", latency.section(LATENCY) {
            listOf(
                it.loadSeconds, it.timeToFirstTokenMs, it.prefillTokensPerSecond, it.decodeTokensPerSecond,
                it.promptTokens, it.decodedTokens, it.threads, it.runs,
            )
        })
        put("peak_memory_bytes", peakMemoryBytes)
    }

    /** Writes the report whole or not at all: beside [file], to the disk, and only then in its place. */
    fun write(file: File) {
        val whole = File(file.absoluteFile.parentFile, ".${file.name}.part")
        try {
            FileOutputStream(whole).use {
                it.write((PRETTY.encodeToString(JsonElement.serializer(), toJson()) + "\n").encodeToByteArray())
                it.fd.sync()
            }
            Files.move(
                whole.toPath(), file.toPath(), StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING,
            )
        } finally {
            whole.delete() // nothing is there unless something failed
        }
    }

    companion object {
        const val SCHEMA = "llama-export/device-report/1"

        private val PARITY = listOf(
            "positions", "mean_kl_nats", "worst_kl_nats", "top1_agreement", "decided_top1_agreement",
            "decided_positions", "max_abs_logit_diff",
        )
        private val GREEDY = listOf("prompts", "compared", "agreeing")
        private val CHATS = listOf("compared", "agreeing")
        private val LATENCY = listOf(
            "load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "prompt_tokens",
            "decoded_tokens", "threads", "runs",
        )
        private val PRETTY = Json { prettyPrint = true }

        private fun section(vararg fields: Pair<String, Any?>) =
            JsonObject(fields.associate { (name, value) -> name to value.toJson() })

        private fun <T> Measured<T>.section(names: List<String>, values: (T) -> List<Any>): JsonObject = when (this) {
            is Measured.Value -> section(*names.zip(values(value)).toTypedArray())
            is Measured.Absent -> section(*names.map { it to null }.toTypedArray(), "reason" to reason)
        }

        private fun Any?.toJson(): JsonElement = when (this) {
            null -> JsonNull
            is Number -> JsonPrimitive(this)
            else -> JsonPrimitive(toString())
        }
    }
}

/** The most memory that this process has held, where the system tells (Linux and Android); null elsewhere. */
fun peakMemoryBytes(status: File = File("/proc/self/status")): Long? {
    if (!status.canRead()) return null
    val line = status.readLines().find { it.startsWith("VmHWM:") } ?: return null
    return line.removePrefix("VmHWM:").removeSuffix("kB").trim().toLongOrNull()?.times(1024)
}
