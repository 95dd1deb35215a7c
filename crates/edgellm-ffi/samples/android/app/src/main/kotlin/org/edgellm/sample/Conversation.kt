package org.edgellm.sample

import android.content.Context
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateListOf
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import java.io.File
import java.util.concurrent.Executors
import org.edgellm.*

/** The conversation and the engine behind it. The engine works on a thread of its own, which calls the listeners. */
class Conversation(private val context: Context) {
    val messages = mutableStateListOf<Message>()
    var status by mutableStateOf("loading the model")
    var busy by mutableStateOf(true)
    private var engine: Engine? = null
    private val worker = Executors.newSingleThreadExecutor()
    private val ui get() = context.mainExecutor
    private val adapter get() = File(context.filesDir, "adapter")

    init {
        work {
            val loaded = Engine.load(model().path, LoadOptions(memoryBudgetBytes = 1_500_000_000u))
            if (adapter.exists()) loaded.loadAdapter(adapter.path)
            engine = loaded
            "${loaded.info().name}: ${loaded.info().bytes / 1_000_000u} MB, ${loaded.info().kernels}"
        }
    }

    /** The model's folder among the app's assets, copied to a place from which it can be mapped. */
    private fun model(): File {
        val folder = File(context.filesDir, "model")
        if (!File(folder, "complete").exists()) {
            folder.mkdirs()
            for (name in context.assets.list("model").orEmpty()) {
                context.assets.open("model/$name").use { from -> File(folder, name).outputStream().use(from::copyTo) }
            }
            File(folder, "complete").createNewFile()
        }
        return folder
    }

    fun send(text: String) {
        messages.add(Message("user", text))
        val asked = messages.toList()
        messages.add(Message("assistant", ""))
        val at = messages.lastIndex
        work {
            var answer = ""
            val result = engine!!.chat(asked, GenerateOptions(), object : TokenListener {
                override fun onToken(text: String): Boolean {
                    answer += text
                    val shown = answer
                    ui.execute { messages[at] = Message("assistant", shown) }
                    return true
                }
            })
            "%.1f tokens/s".format(result.tokens.toDouble() / result.seconds)
        }
    }

    /** Learns an adapter from the conversation; it is in use from then on, and loaded at the next start. */
    fun learn() {
        val example = Example.Chat(messages.toList())
        work {
            engine!!.adapt(listOf(example), AdaptOptions(batch = 1u), object : ProgressListener {
                override fun onStep(step: UInt, total: UInt, loss: Double, bytes: ULong): Step {
                    ui.execute { status = "learning: step $step of $total, loss %.2f".format(loss) }
                    return Step.CONTINUE
                }
            })
            engine!!.saveAdapter(adapter.path)
            "learned"
        }
    }

    fun stop() {
        engine?.cancel()
    }

    /** Runs on the engine's thread; shows what it returns, or why it failed. */
    private fun work(run: () -> String) {
        busy = true
        worker.execute {
            val text = try { run() } catch (error: Exception) { error.message ?: "$error" }
            ui.execute {
                status = text
                busy = false
            }
        }
    }
}
