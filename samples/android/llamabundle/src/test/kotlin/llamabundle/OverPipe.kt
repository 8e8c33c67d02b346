package llamabundle

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive

/** A process that answers each line of JSON with one: requests go to standard output, answers come on standard input. */
private class Peer {
    fun ask(request: JsonObject): Field {
        println(request)
        System.out.flush()
        val line = readlnOrNull() ?: error("the other side of the pipe has gone")
        val answer = Field.parse("answer", line)
        answer["error"].let { if (!it.isNull) error(it.string()) }
        return answer
    }
}

/** A runner of the other process: `{"rewind": n}`, and `{"feed": [...]}`, answered by little-endian float32. */
private class RunnerOverPipe(private val peer: Peer) : Runner {
    override fun rewind(position: Int) {
        peer.ask(JsonObject(mapOf("rewind" to JsonPrimitive(position))))
    }

    override fun feed(ids: LongArray): FloatArray {
        val answer = peer.ask(JsonObject(mapOf("feed" to JsonArray(ids.map { JsonPrimitive(it) }))))
        val bytes = ByteBuffer.wrap(Base64.getDecoder().decode(answer["logits"].string()))
        val floats = bytes.order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return FloatArray(floats.remaining()).also(floats::get)
    }
}

/** The self-test of a bundle on an artifact that another process runs: `SelfTestOverPipe BUNDLE REPORT RUNTIME`. */
object SelfTestOverPipe {
    @JvmStatic
    fun main(arguments: Array<String>) {
        val (folder, report, runtime) = arguments
        val bundle = Bundle.open(File(folder))
        val selfTest = SelfTest(bundle, RunnerOverPipe(Peer()))
        DeviceReport(
            manifestSha256 = bundle.manifestSha256,
            device = Device(model = "host", os = System.getProperty("os.name"), runtime = runtime, app = "SelfTestOverPipe"),
            parity = Measured.Value(selfTest.parity()),
            greedy = Measured.Value(selfTest.greedy()),
            chats = selfTest.chats(BytePairTokenizer.read(bundle.file("tokenizer.json"))),
            latency = selfTest.latency(loadSeconds = 0.0, threads = 1),
            peakMemoryBytes = peakMemoryBytes(),
        ).write(File(report))
    }
}

/** The tokens of each text on standard input, a JSON string a line: `EncodeOverPipe TOKENIZER`. */
object EncodeOverPipe {
    @JvmStatic
    fun main(arguments: Array<String>) {
        val tokenizer = BytePairTokenizer.read(File(arguments.single()))
        for (line in generateSequence(::readlnOrNull)) {
            println(tokenizer.encode(Field.parse("line", line).string()).toList())
        }
    }
}
