package llamabundle

import java.io.File
import java.io.InputStream
import java.security.MessageDigest

/** What an app needs of a `manifest.json`. */
class Manifest(
    val target: String,
    val context: Int,
    val logits: Logits,
    val model: Model,
    val files: List<BundleFile>,
    /** What the export itself had to keep, and `llama-export validate` holds a report to. */
    val gate: Gate,
) {
    /** Which rows an artifact answers with: the last token's, or one for each token fed. */
    enum class Logits { LAST, ALL }

    class Model(
        val name: String,
        val vocabSize: Int,
        val layers: Int,
        val keyValueHeads: Int,
        val headDim: Int,
        val bosTokenId: Long?,
        /** Each of them ends an answer. */
        val eosTokenIds: Set<Long>,
    )

    companion object {
        const val SCHEMA = "llama-export/bundle/1"
        val TARGETS = listOf("executorch", "onnxruntime", "coreml")

        /** Throws [BundleException] for a manifest that is not as an export writes it. */
        fun read(file: File): Manifest {
            val json = Field.read(file)
            val schema = json["schema"].string()
            if (schema != SCHEMA) {
                throw BundleException(
                    "${file.name}: schema is \"$schema\", \"$SCHEMA\" was expected",
                    "export the bundle with the version of llama-export that this app was made for",
                )
            }
            val model = json["model"]
            val parity = json["parity"]
            return Manifest(
                target = json["target"].oneOf(TARGETS),
                context = json["context"].positive(),
                logits = Logits.valueOf(json["logits"].oneOf(listOf("last", "all")).uppercase()),
                model = Model(
                    name = model["name"].string(),
                    vocabSize = model["vocab_size"].positive(),
                    layers = model["num_hidden_layers"].positive(),
                    keyValueHeads = model["num_key_value_heads"].positive(),
                    headDim = model["head_dim"].positive(),
                    bosTokenId = model["bos_token_id"].let { if (it.isNull) null else it.long() },
                    eosTokenIds = model["eos_token_ids"].longs().toSet(),
                ),
                files = json["files"].list().map(BundleFile::read),
                gate = Gate(
                    meanKlNats = parity["gate_mean_kl_nats"].double(),
                    worstKlNats = parity["gate_worst_kl_nats"].double(),
                    decidedTop1Agreement = parity["gate_decided_top1_agreement"].double(),
                ),
            )
        }
    }
}

/** One file that a manifest accounts for; [path] has forward slashes and stays inside the bundle. */
class BundleFile(val path: String, val bytes: Long, val sha256: String) {
    companion object {
        private val DIGEST = Regex("[0-9a-f]{64}")

        internal fun read(entry: Field): BundleFile {
            val path = entry["path"].string()
            if (path.startsWith("/") || '\\' in path || path.split("/").any { it in setOf("", ".", "..") }) {
                entry["path"].wrong("a path inside the bundle")
            }
            val sha256 = entry["sha256"].string()
            if (!DIGEST.matches(sha256)) entry["sha256"].wrong("64 hexadecimal digits")
            return BundleFile(path, entry["bytes"].long(), sha256)
        }
    }
}

/** A bundle whose every file was there and whole when it was opened. */
class Bundle private constructor(val folder: File, val manifest: Manifest, val manifestSha256: String) {
    /** The file called [path], which the manifest must list. */
    fun file(path: String): File {
        if (!has(path)) {
            throw BundleException("the bundle's manifest does not list $path", "export a bundle that has it")
        }
        return File(folder, path)
    }

    fun has(path: String): Boolean = manifest.files.any { it.path == path }

    /** The one file that the runtime loads. */
    val artifact: File
        get() = when (manifest.target) {
            "executorch" -> file("model.pte")
            "onnxruntime" -> file("model.onnx")
            else -> throw BundleException(
                "the bundle is for ${manifest.target}, which does not run on Android",
                "export with --target executorch or --target onnxruntime",
            )
        }

    /** The text around messages; null where the chat template cannot be told so. */
    fun chatFormat(): ChatFormat? = if (has("chat_format.json")) ChatFormat.read(file("chat_format.json")) else null

    fun goldens(): Goldens = Goldens.read(file("goldens.json"), file("goldens.safetensors"), manifest)

    companion object {
        /**
         * Opens a bundle and hashes each of its files, which takes about a second per gigabyte.
         *
         * [progress] hears how many bytes of how many are done. Throws [BundleException] for the first file that is
         * missing, unlisted, of another size or of another content.
         */
        fun open(folder: File, progress: (Long, Long) -> Unit = { _, _ -> }): Bundle {
            if (!folder.isDirectory) {
                throw BundleException("there is no folder $folder", "name the folder that holds manifest.json")
            }
            val file = File(folder, MANIFEST)
            val manifest = Manifest.read(file)
            refuseStrangers(folder, manifest)
            checkSizes(folder, manifest)
            checkDigests(folder, manifest, progress)
            return Bundle(folder, manifest, sha256(file))
        }

        private const val MANIFEST = "manifest.json"

        private fun refuseStrangers(folder: File, manifest: Manifest) {
            val listed = manifest.files.map { it.path }.toSet() + MANIFEST
            val present = folder.walkTopDown().filter { it.isFile }.map { it.relativeTo(folder).invariantSeparatorsPath }
            val stranger = present.filter { it !in listed }.minOrNull() ?: return
            throw BundleException("the bundle holds $stranger, which its manifest does not list", "remove that file")
        }

        /** Before any hash, so that a copy that was cut short is told at once. */
        private fun checkSizes(folder: File, manifest: Manifest) {
            for (entry in manifest.files) {
                val file = File(folder, entry.path)
                if (!file.isFile) {
                    throw BundleException("the bundle lacks ${entry.path}, which its manifest lists", COPY_AGAIN)
                }
                if (file.length() != entry.bytes) {
                    throw BundleException(
                        "${entry.path} has ${file.length()} bytes, its manifest says ${entry.bytes}", COPY_AGAIN,
                    )
                }
            }
        }

        private fun checkDigests(folder: File, manifest: Manifest, progress: (Long, Long) -> Unit) {
            val total = manifest.files.sumOf { it.bytes }
            var done = 0L
            for (entry in manifest.files) {
                val found = sha256(File(folder, entry.path)) { count ->
                    done += count
                    progress(done, total)
                }
                if (found != entry.sha256) {
                    throw BundleException(
                        "${entry.path} has SHA-256 $found, its manifest says ${entry.sha256}", COPY_AGAIN,
                    )
                }
            }
        }
    }
}

/** The digest in hexadecimal, read in blocks of 1 MiB; [counted] hears the size of each. */
internal fun sha256(file: File, counted: (Int) -> Unit = {}): String {
    val digest = MessageDigest.getInstance("SHA-256")
    file.inputStream().use { it.blocks { block, count -> digest.update(block, 0, count); counted(count) } }
    return digest.digest().joinToString("") { "%02x".format(it) }
}

private inline fun InputStream.blocks(take: (ByteArray, Int) -> Unit) {
    val block = ByteArray(1 shl 20)
    while (true) {
        val count = read(block)
        if (count < 0) return
        take(block, count)
    }
}

private fun Field.oneOf(known: List<String>): String =
    string().also { if (it !in known) wrong("one of ${known.joinToString()}") }

private fun Field.positive(): Int = int().also { if (it <= 0) wrong("a number above 0") }
