package llamabundle.app

import java.io.File
import llamabundle.Bundle
import llamabundle.BundleException
import llamabundle.BytePairTokenizer
import llamabundle.ChatFormat
import llamabundle.Chats
import llamabundle.Device
import llamabundle.DeviceReport
import llamabundle.End
import llamabundle.Generation
import llamabundle.Measured
import llamabundle.Message
import llamabundle.Parity
import llamabundle.Role
import llamabundle.Runner
import llamabundle.Sampler
import llamabundle.SelfTest
import llamabundle.Utf8Stream
import llamabundle.peakMemoryBytes

/** What the self-test found: the report, and what of it misses its bounds. */
class Outcome(val report: DeviceReport, val faults: List<String>)

/** A bundle with its artifact loaded. Every call takes long: make none on the main thread, and one at a time. */
class LoadedBundle private constructor(
    val bundle: Bundle,
    private val runner: Runner,
    private val loadSeconds: Double,
    private val threads: Int,
) : AutoCloseable {
    private val tokenizer = BytePairTokenizer.read(bundle.file("tokenizer.json"))
    private val chatFormat: ChatFormat? = bundle.chatFormat()
    private var generation = newGeneration()
    private val conversation = ArrayList<Message>()

    /** Drives the goldens and writes the report to [to]. */
    fun test(device: Device, to: File): Outcome {
        val selfTest = SelfTest(bundle, runner)
        val parity = selfTest.parity()
        val chats: Measured<Chats> = selfTest.chats(tokenizer)
        val report = DeviceReport(
            manifestSha256 = bundle.manifestSha256,
            device = device,
            parity = Measured.Value(parity),
            greedy = Measured.Value(selfTest.greedy()),
            chats = chats,
            latency = selfTest.latency(loadSeconds, threads),
            peakMemoryBytes = peakMemoryBytes(),
        )
        report.write(to)
        generation = newGeneration() // the cache is no longer the conversation's
        return Outcome(report, faults(selfTest, parity))
    }

    private fun faults(selfTest: SelfTest, parity: Parity) = bundle.manifest.gate.faults(parity)

    /** Says [text] and hands over the answer as it comes, in whole characters, until [onText] returns false. */
    fun say(text: String, sampler: Sampler, onText: (String) -> Boolean): End {
        val format = chatFormat ?: throw BundleException(
            "this bundle has no chat_format.json", "take a model whose chat template can be told as text around messages",
        )
        val turns = conversation + Message(Role.USER, text)
        val stream = Utf8Stream()
        val answer = StringBuilder()
        val end = generation.answer(tokenizer.encode(format.render(turns)), sampler) { token ->
            val piece = stream.push(tokenizer.bytes(token))
            answer.append(piece)
            onText(piece)
        }
        val rest = stream.finish()
        answer.append(rest)
        onText(rest)
        conversation += turns.last()
        conversation += Message(Role.ASSISTANT, answer.toString())
        return end
    }

    fun startAnew() = conversation.clear()

    override fun close() = runner.close()

    private fun newGeneration() = Generation(runner, bundle.manifest.context, bundle.manifest.model.eosTokenIds)

    companion object {
        /** Checks the bundle in [folder] and loads its artifact with the runtime that its manifest names. */
        fun open(folder: File, threads: Int, progress: (Long, Long) -> Unit): LoadedBundle {
            val bundle = Bundle.open(folder, progress)
            val started = System.nanoTime()
            val runner = when (bundle.manifest.target) {
                "executorch" -> ExecuTorchRunner(bundle.artifact, bundle.manifest, threads)
                else -> OnnxRuntimeRunner(bundle.artifact, bundle.manifest, threads) // artifact refuses coreml
            }
            return LoadedBundle(bundle, runner, (System.nanoTime() - started) * 1e-9, threads)
        }
    }
}
