package llamabundle.app

import android.content.Intent
import android.os.Build
import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.safeDrawingPadding
import androidx.compose.foundation.rememberScrollState
import androidx.compose.foundation.verticalScroll
import androidx.compose.material3.Button
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.runtime.Composable
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.dp
import java.io.File
import java.util.concurrent.Executors
import llamabundle.Device
import llamabundle.Sampler

/** Tests the bundle when it is first seen on this device, shows what was found, and chats. */
class MainActivity : ComponentActivity() {
    /** All that touches the artifact, one after the other. */
    private val worker = Executors.newSingleThreadExecutor()
    private var loaded: LoadedBundle? = null

    private var status by mutableStateOf("")
    private var figures by mutableStateOf("")
    private var chat by mutableStateOf("")
    private var busy by mutableStateOf(true)

    @Volatile
    private var wanted = true

    private val files: File get() = getExternalFilesDir(null) ?: filesDir
    private val reportFile: File get() = File(files, "device-report.json")

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContent { MaterialTheme { Screen() } }
        work { open() }
    }

    override fun onDestroy() {
        wanted = false
        worker.execute { loaded?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun open() {
        val threads = Runtime.getRuntime().availableProcessors().coerceAtMost(MOST_THREADS)
        val opened = LoadedBundle.open(File(files, "bundle"), threads) { done, total ->
            show { status = "checking ${100 * done / total} %" }
        }
        loaded = opened
        show { status = "${opened.bundle.manifest.model.name}, ${opened.bundle.manifest.target}" }
        val known = reportFile.takeIf { it.isFile }?.readText()
        if (known != null && opened.bundle.manifestSha256 in known) show { figures = known } else test(opened)
    }

    private fun test(bundle: LoadedBundle) {
        show { figures = "testing" }
        val device = Device(
            model = "${Build.MANUFACTURER} ${Build.MODEL}",
            os = "Android ${Build.VERSION.RELEASE}",
            runtime = RUNTIMES.getValue(bundle.bundle.manifest.target),
            app = "llama-export sample 0.1.0",
        )
        val outcome = bundle.test(device, reportFile)
        val verdict = if (outcome.faults.isEmpty()) "passed" else outcome.faults.joinToString("; ")
        show { figures = "$verdict\n${reportFile.readText()}" }
    }

    private fun say(text: String) = work {
        show { chat += "\n\n> $text\n" }
        loaded?.say(text, Sampler(temperature = 0.6, topP = 0.9)) { piece ->
            show { chat += piece }
            wanted
        }
    }

    /** On the worker; what goes wrong is shown. */
    private fun work(action: () -> Unit) {
        busy = true
        worker.execute {
            try {
                action()
            } catch (error: Exception) { // of the bundle, or of a runtime: a person has to read it either way
                show { status = error.message ?: error.toString() }
            } finally {
                show { busy = false }
            }
        }
    }

    private fun show(change: () -> Unit) = runOnUiThread(change)

    private fun share() {
        val report = Intent(Intent.ACTION_SEND).setType("application/json")
        report.putExtra(Intent.EXTRA_TEXT, reportFile.readText())
        startActivity(Intent.createChooser(report, "device-report.json"))
    }

    @Composable
    private fun Screen() {
        var question by remember { mutableStateOf("") }
        Column(
            Modifier.fillMaxSize().safeDrawingPadding().padding(16.dp).verticalScroll(rememberScrollState()),
            verticalArrangement = Arrangement.spacedBy(12.dp),
        ) {
            Text(status, style = MaterialTheme.typography.titleMedium)
            OutlinedTextField(question, { question = it }, Modifier.fillMaxWidth(), label = { Text("Message") })
            Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
                Button(enabled = !busy && question.isNotBlank(), onClick = { say(question); question = "" }) { Text("Send") }
                Button(enabled = !busy, onClick = { work { loaded?.startAnew(); show { chat = "" } } }) { Text("New") }
                Button(enabled = !busy, onClick = { work { loaded?.let(::test) } }) { Text("Test") }
                Button(enabled = !busy && figures.isNotEmpty(), onClick = ::share) { Text("Share") }
            }
            Text(chat)
            Text(figures, style = MaterialTheme.typography.bodySmall)
        }
    }

    private companion object {
        const val MOST_THREADS = 4

        /** As in gradle/libs.versions.toml: a report names the runtime that it was made with. */
        val RUNTIMES = mapOf("executorch" to "executorch 1.4.0, xnnpack", "onnxruntime" to "onnxruntime 1.27.0, cpu")
    }
}
