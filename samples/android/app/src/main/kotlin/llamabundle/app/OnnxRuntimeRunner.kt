package llamabundle.app

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.LongBuffer
import llamabundle.Manifest
import llamabundle.Runner

/** A `model.onnx`, whose past and present are the same buffers: each call writes its tokens in place. */
class OnnxRuntimeRunner(model: File, private val manifest: Manifest, threads: Int) : Runner {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession = OrtSession.SessionOptions().use {
        it.setIntraOpNumThreads(threads)
        environment.createSession(model.path, it)
    }
    private val caches: List<Cache> = (0 until manifest.model.layers).flatMap { layer ->
        listOf("past_key_values.$layer" to "present.$layer").flatMap { (past, present) ->
            listOf("key", "value").map { Cache("$past.$it", "$present.$it", emptyCache("$past.$it")) }
        }
    }
    private val presents = caches.associate { it.output to it.tensor }
    private var position = 0

    private class Cache(val input: String, val output: String, val tensor: OnnxTensor)

    /** `[1, KV, context, D]`, of float32 or int8 as the model wants it. */
    private fun emptyCache(input: String): OnnxTensor {
        val type = (session.inputInfo.getValue(input).info as TensorInfo).type
        val sizes = with(manifest.model) { intArrayOf(1, keyValueHeads, manifest.context, headDim) }
        val buffer = ByteBuffer.allocateDirect(sizes.fold(type.size, Math::multiplyExact)).order(ByteOrder.nativeOrder())
        return OnnxTensor.createTensor(environment, buffer, LongArray(sizes.size) { sizes[it].toLong() }, type)
    }

    override fun rewind(position: Int) {
        require(position in 0..this.position) { "cannot rewind to $position: the cache holds ${this.position} tokens" }
        this.position = position
    }

    override fun feed(ids: LongArray): FloatArray {
        val total = position + ids.size
        require(ids.isNotEmpty() && total <= manifest.context) {
            "${ids.size} tokens at position $position do not fit a context of ${manifest.context}"
        }
        return longs(ids).use { tokens -> // [1, T]
            longs(LongArray(total) { 1 }).use { mask -> // [1, past + T]
                val pasts = caches.associate { it.input to it.tensor }
                val inputs = pasts + mapOf("input_ids" to tokens, "attention_mask" to mask)
                session.run(inputs, setOf(LOGITS), presents, null).use { result ->
                    position = total
                    lastRow(result.get(0) as OnnxTensor)
                }
            }
        }
    }

    private fun longs(values: LongArray): OnnxTensor =
        OnnxTensor.createTensor(environment, LongBuffer.wrap(values), longArrayOf(1, values.size.toLong()))

    /** `[1, 1, V]`, or `[1, T, V]` from a bundle with all logits. */
    private fun lastRow(logits: OnnxTensor): FloatArray {
        val values = logits.floatBuffer
        values.position(values.limit() - manifest.model.vocabSize)
        return FloatArray(manifest.model.vocabSize).also(values::get)
    }

    override fun close() {
        session.close()
        for (cache in caches) cache.tensor.close()
    }

    private companion object {
        const val LOGITS = "logits"
    }
}
