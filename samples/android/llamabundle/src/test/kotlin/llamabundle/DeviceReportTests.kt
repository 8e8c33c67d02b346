package llamabundle

import java.io.File
import java.io.IOException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonObject

private fun report(parity: Measured<Parity>) = DeviceReport(
    manifestSha256 = "ab".repeat(32),
    device = Device(model = "Phone", os = "Android 16", runtime = "none", app = "Tests"),
    parity = parity,
    greedy = Measured.Value(Greedy(3, 21, 20)),
    chats = Measured.Absent("no \"tokenizer\""),
    latency = Measured.Value(Latency(1.0, 410.0, 312.0, 25.0, 128, 32, 2, 3)),
    peakMemoryBytes = 1_700_000_000,
)

private val whole = report(Measured.Value(Parity(194, 1.6e-4, 2.1e-3, 0.995, 1.0, 192, 0.16f)))

private fun JsonObject.fields(name: String) = getValue(name).jsonObject.keys.toList()

fun Suite.deviceReportTests() {
    test("a report has the fields of the contract, in its order") {
        val json = whole.toJson()
        expect(
            json.keys.toList(),
            "schema manifest_sha256 device parity greedy chats latency peak_memory_bytes".split(" "),
        )
        expect(json.fields("device"), listOf("model", "os", "runtime", "app"))
        expect(
            json.fields("parity"),
            ("positions mean_kl_nats worst_kl_nats top1_agreement decided_top1_agreement decided_positions " +
                "max_abs_logit_diff").split(" "),
        )
        expect(json.fields("greedy"), listOf("prompts", "compared", "agreeing"))
        expect(
            json.fields("latency"),
            ("load_s time_to_first_token_ms prefill_tokens_per_s decode_tokens_per_s prompt_tokens decoded_tokens " +
                "threads runs").split(" "),
        )
    }
    test("what was not measured is null, with its reason") {
        val chats = whole.toJson().getValue("chats").jsonObject
        expect(chats["compared"], JsonNull)
        expect(chats["reason"], JsonPrimitive("no \"tokenizer\""))
        val parity = report(Measured.Absent("the runtime failed")).toJson().getValue("parity").jsonObject
        expect(parity["mean_kl_nats"], JsonNull)
    }
    test("a report is read back as it was written") {
        inTemporaryFolder { folder ->
            val file = File(folder, "device-report.json")
            whole.write(file)
            expect(Json.parseToJsonElement(file.readText()).toString(), whole.toJson().toString())
            report(Measured.Absent("again")).write(file)
            check("again" in file.readText())
            expect(folder.list()!!.toList(), listOf("device-report.json"))
        }
    }
    test("a report that cannot be written leaves the one before as it was, and nothing beside it") {
        inTemporaryFolder { folder ->
            val file = File(folder, "device-report.json").apply { writeText("before") }
            File(folder, ".device-report.json.part").mkdir()
            File(folder, ".device-report.json.part/x").writeText("in the way")
            expectIoError { whole.write(file) }
            expect(file.readText(), "before")
        }
        inTemporaryFolder { folder ->
            val taken = File(folder, "device-report.json").apply { mkdir() }
            File(taken, "x").writeText("a folder of that name")
            expectIoError { whole.write(taken) }
            expect(folder.list()!!.toList(), listOf("device-report.json"))
        }
    }
    test("the most memory held is read where the system tells it") {
        inTemporaryFolder { folder ->
            val status = File(folder, "status")
            expect(peakMemoryBytes(status), null)
            status.writeText("Name:\tapp\nVmPeak:\t  9000 kB\nVmHWM:\t   1234 kB\nVmRSS:\t 1000 kB\n")
            expect(peakMemoryBytes(status), 1234L * 1024)
        }
    }
}

private fun expectIoError(body: () -> Unit) {
    val failed = try {
        body()
        false
    } catch (_: IOException) {
        true
    }
    check(failed) { "nothing failed" }
}
