package llamabundle

import java.io.File
import java.nio.file.Files
import kotlin.math.abs
import kotlin.system.exitProcess

/** The tests, one after the other: no test library is needed to build or run them. */
class Suite {
    private val tests = LinkedHashMap<String, () -> Unit>()

    fun test(name: String, body: () -> Unit) {
        check(tests.put(name, body) == null) { "two tests are called $name" }
    }

    /** Prints a line for each test; how many failed. */
    fun run(): Int = tests.count { (name, body) ->
        val failure = try {
            body()
            null
        } catch (error: Throwable) { // whatever it is, the other tests run
            error
        }
        println(if (failure == null) "ok      $name" else "FAILED  $name: $failure")
        failure?.stackTrace?.filter { it.className.startsWith("llamabundle") }?.take(4)?.forEach { println("          at $it") }
        failure != null
    }.also { println("${tests.size} tests, $it failed") }
}

fun main() {
    val suite = Suite()
    for (tests in listOf(
        Suite::bundleTests, Suite::chatFormatTests, Suite::goldensTests, Suite::textTests, Suite::samplerTests,
        Suite::generationTests, Suite::selfTestTests, Suite::deviceReportTests,
    )) {
        tests(suite)
    }
    if (suite.run() > 0) exitProcess(1)
}

fun <T> expect(found: T, wanted: T) = check(found == wanted) { "found <$found>, wanted <$wanted>" }

fun expectNear(found: Double, wanted: Double, within: Double) =
    check(abs(found - wanted) <= within) { "found $found, wanted $wanted within $within" }

/** The message must hold each of [parts]. */
fun expectRefused(vararg parts: String, body: () -> Unit) {
    val message = try {
        body()
        null
    } catch (error: BundleException) {
        error.message!!
    }
    check(message != null) { "nothing was refused" }
    for (part in parts) check(part in message) { "<$message> does not say <$part>" }
}

fun inTemporaryFolder(body: (File) -> Unit) {
    val folder = Files.createTempDirectory("llamabundle").toFile()
    try {
        body(folder)
    } finally {
        folder.deleteRecursively()
    }
}

/** The bundle that the environment names; tests that change one take [inCopy]. */
val sample: File by lazy {
    File(checkNotNull(System.getenv("LLAMA_BUNDLE")) { "set LLAMA_BUNDLE to the folder of a bundle" })
}

val sampleBundle: Bundle by lazy { Bundle.open(sample) }

fun inCopy(body: (File) -> Unit) = inTemporaryFolder { folder ->
    val copy = File(folder, "bundle")
    sample.copyRecursively(copy)
    body(copy)
}
