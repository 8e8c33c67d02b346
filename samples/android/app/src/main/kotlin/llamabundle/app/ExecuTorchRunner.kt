package llamabundle.app

import java.io.File
import llamabundle.Manifest
import llamabundle.Runner
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** A `model.pte`, whose cache lies in the program: it writes where `input_pos` says. */
class ExecuTorchRunner(program: File, private val manifest: Manifest, threads: Int) : Runner {
    private val module = Module.load(program.path, Module.LOAD_MODE_MMAP, threads)
    private var position = 0

    override fun rewind(position: Int) {
        require(position in 0..this.position) { "cannot rewind to $position: the cache holds ${this.position} tokens" }
        this.position = position
    }

    override fun feed(ids: LongArray): FloatArray {
        require(ids.isNotEmpty() && position + ids.size <= manifest.context) {
            "${ids.size} tokens at position $position do not fit a context of ${manifest.context}"
        }
        val tokens = Tensor.fromBlob(ids, longArrayOf(1, ids.size.toLong())) // [1, T]
        val start = Tensor.fromBlob(longArrayOf(position.toLong()), longArrayOf(1))
        val logits = module.forward(EValue.from(tokens), EValue.from(start))[0].toTensor().dataAsFloatArray
        position += ids.size
        return logits.copyOfRange(logits.size - manifest.model.vocabSize, logits.size) // of one row or of T
    }

    override fun close() = module.destroy()
}
