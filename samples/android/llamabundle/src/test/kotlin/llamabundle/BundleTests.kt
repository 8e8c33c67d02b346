package llamabundle

import java.io.File
import java.io.RandomAccessFile

private fun File.flipLastByte() = RandomAccessFile(this, "rw").use {
    it.seek(length() - 1)
    val byte = it.read()
    it.seek(length() - 1)
    it.write(byte xor 1)
}

private fun File.edit(change: (String) -> String) {
    val before = readText()
    val after = change(before)
    check(before != after) { "the edit changed nothing" }
    writeText(after)
}

fun Suite.bundleTests() {
    test("a whole bundle opens, and says how far it is") {
        val seen = ArrayList<Pair<Long, Long>>()
        val bundle = Bundle.open(sample) { done, total -> seen += done to total }
        val total = bundle.manifest.files.sumOf { it.bytes }
        expect(seen.last(), total to total)
        expect(seen.map { it.first }, seen.map { it.first }.sorted())
        expect(bundle.artifact.isFile, true)
        expect(bundle.manifestSha256, sha256(File(sample, "manifest.json")))
    }
    test("the digest of abc is the one of FIPS 180-4") {
        inTemporaryFolder { folder ->
            val file = File(folder, "abc").apply { writeText("abc") }
            expect(sha256(file), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        }
    }
    test("a flipped byte names the file and both digests") {
        inCopy { folder ->
            val name = sampleBundle.artifact.name
            val written = sampleBundle.manifest.files.single { it.path == name }.sha256
            File(folder, name).flipLastByte()
            expectRefused(name, written, sha256(File(folder, name)), "copy the bundle again") { Bundle.open(folder) }
        }
    }
    test("a file cut short names both sizes") {
        inCopy { folder ->
            val file = File(folder, "tokenizer.json")
            val size = file.length()
            file.writeBytes(file.readBytes().copyOf(100))
            expectRefused("tokenizer.json has 100 bytes", "$size") { Bundle.open(folder) }
        }
    }
    test("a missing file is named") {
        inCopy { folder ->
            File(folder, "goldens.json").delete()
            expectRefused("lacks goldens.json") { Bundle.open(folder) }
        }
    }
    test("a file that the manifest does not list is named") {
        inCopy { folder ->
            File(folder, "extra").mkdir()
            File(folder, "extra/weights.bin").writeText("x")
            expectRefused("holds extra/weights.bin", "remove") { Bundle.open(folder) }
        }
    }
    test("no folder, and a folder without a manifest, are told apart") {
        inTemporaryFolder { folder ->
            expectRefused("no folder", "manifest.json") { Bundle.open(File(folder, "none")) }
            expectRefused("manifest.json cannot be read") { Bundle.open(folder) }
        }
    }
    for ((what, change, parts) in listOf(
        Triple("another schema", "bundle/1" to "bundle/2", listOf("\"llama-export/bundle/2\"", "\"llama-export/bundle/1\"")),
        Triple("an unknown target", "\"target\": \"" to "\"target\": \"x", listOf("target is", "executorch, onnxruntime")),
        Triple("a context of none", "\"context\": " to "\"context\": 0, \"was\": ", listOf("context is 0", "above 0")),
        Triple("a context in words", "\"context\": " to "\"context\": \"long\", \"was\": ", listOf("context is \"long\"")),
        Triple("a missing field", "\"vocab_size\"" to "\"size\"", listOf("model.vocab_size is missing", "whole number")),
        Triple("a path that leaves it", "\"path\": \"goldens.json\"" to "\"path\": \"../x\"", listOf("\"../x\"", "inside")),
        Triple("half a manifest", "\"model\"" to "\"model", listOf("manifest.json is no JSON")),
    )) {
        test("a manifest with $what is refused in a sentence") {
            inCopy { folder ->
                File(folder, "manifest.json").edit { it.replaceFirst(change.first, change.second) }
                expectRefused(*parts.toTypedArray()) { Bundle.open(folder) }
            }
        }
    }
    test("a manifest that lists no such file says so") {
        expectRefused("does not list adapter.bin") { sampleBundle.file("adapter.bin") }
    }
}
