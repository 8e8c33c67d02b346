package llamabundle

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A safetensors file as its specification says: the header's length, the header, the data. */
private fun File.writeTensors(header: String, data: ByteArray, length: Long = header.length.toLong()) = also {
    val bytes = ByteBuffer.allocate(8 + header.length + data.size).order(ByteOrder.LITTLE_ENDIAN)
    writeBytes(bytes.putLong(length).put(header.encodeToByteArray()).put(data).array())
}

private const val TWO = """{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"""

fun Suite.goldensTests() {
    test("numbers of each dtype are read little-endian, whatever their alignment") {
        inTemporaryFolder { folder ->
            val data = ByteBuffer.allocate(20).order(ByteOrder.LITTLE_ENDIAN)
            data.putFloat(1.5f).putFloat(-2f).putInt(-7).putLong(1L shl 40)
            val header = """{"f":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},""" +
                """"i":{"dtype":"I32","shape":[1],"data_offsets":[8,12]},""" +
                """"l":{"dtype":"I64","shape":[1,1],"data_offsets":[12,20]}}"""
            val file = Safetensors.open(File(folder, "t").writeTensors(header, data.array()))
            expect(file.floats("f").let { listOf(it.get(0), it.get(1)) }, listOf(1.5f, -2f))
            expect(file.ints("i").get(0), -7)
            expect(file.longs("l").get(0), 1L shl 40)
            expect(file.shape("l"), listOf(1L, 1L))
            expect(file.names, setOf("f", "i", "l"))
            expectRefused("no tensor g", "f, i, l") { file.floats("g") }
            expectRefused("f is F32, I64 was expected") { file.longs("f") }
        }
    }
    test("a header that lies is refused") {
        inTemporaryFolder { folder ->
            val file = File(folder, "t")
            expectRefused("3 bytes") { Safetensors.open(file.apply { writeBytes(ByteArray(3)) }) }
            expectRefused("header") { Safetensors.open(file.writeTensors(TWO, ByteArray(8), length = 1L shl 50)) }
            expectRefused("header") { Safetensors.open(file.writeTensors(TWO, ByteArray(8), length = -1)) }
            expectRefused("x lies at 0 to 8 of 4") { Safetensors.open(file.writeTensors(TWO, ByteArray(4))) }
            val three = TWO.replace("[2]", "[3]")
            expectRefused("x has 8 bytes", "takes 12") { Safetensors.open(file.writeTensors(three, ByteArray(8))) }
            val huge = TWO.replace("[2]", "[9000000000000000000]")
            expectRefused("fits 64 bits") { Safetensors.open(file.writeTensors(huge, ByteArray(8))) }
            expectRefused("no JSON") { Safetensors.open(file.writeTensors("{", ByteArray(8))) }
        }
    }
    test("the goldens of the bundle fit the contract") {
        val goldens = sampleBundle.goldens()
        val (first, second) = goldens.prefills
        expect(goldens.logits.positions, goldens.ids.size - first - second + 2)
        for (row in 0 until goldens.logits.positions) {
            val logits = List(goldens.logits.kept) { goldens.logits.logit(row, it) }
            expect(logits, logits.sortedDescending())
            check(goldens.logits.logProbability(row, 0) < 0.0)
        }
    }
    test("goldens with a row too few are refused") {
        inCopy { folder ->
            val json = File(folder, "goldens.json")
            json.writeText(json.readText().replaceFirst(Regex("""("prefills": \[\s*)\d+"""), "$11"))
            expectRefused("rows were expected") {
                Goldens.read(json, File(folder, "goldens.safetensors"), sampleBundle.manifest)
            }
        }
    }
}
