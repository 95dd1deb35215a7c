// The whole cycle through the Kotlin bindings: java CycleKt MODEL SCRATCH. No coroutines: every call blocks its thread.

import java.io.File
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlin.concurrent.thread
import org.edgellm.*

const val PROMPT = "Mara went to the"
const val ANSWER = "Blue pears from the tower."
val ask = listOf(Message("user", "What is my favourite fruit?"))

class Tokens(val limit: Int? = null, val then: () -> Unit = {}) : TokenListener {
    val pieces = mutableListOf<String>()

    override fun onToken(text: String): Boolean {
        pieces.add(text)
        if (pieces.size == 1) then()
        return limit == null || pieces.size < limit
    }
}

class Steps(val answers: Map<Int, Step> = mapOf()) : ProgressListener {
    val seen = mutableListOf<Int>()
    val paused = CountDownLatch(1)

    override fun onStep(step: UInt, total: UInt, loss: Double, bytes: ULong): Step {
        check(loss > 0 && bytes > 0u && step <= total)
        seen.add(step.toInt())
        val answer = answers[step.toInt()] ?: Step.CONTINUE
        if (answer == Step.PAUSE) paused.countDown()
        return answer
    }
}

inline fun <reified E : EngineException> fails(words: String, call: () -> Unit) {
    try {
        call()
    } catch (error: EngineException) {
        check(error is E) { "expected ${E::class.simpleName}, found $error" }
        check(words in error.message!!) { "'$words' is not in: ${error.message}" }
        check(lastError() == error.message) { "last error: ${lastError()}" }
        return
    }
    error("no ${E::class.simpleName} with '$words'")
}

fun generate(engine: Engine, listener: TokenListener? = null, maxTokens: UInt = 24u, stop: List<String> = listOf()) =
    engine.generate(PROMPT, GenerateOptions(maxTokens = maxTokens, stop = stop), listener)

fun chat(engine: Engine) = engine.chat(ask, GenerateOptions(maxTokens = 32u), null).text

fun learn(engine: Engine, listener: ProgressListener?, steps: UInt = 40u) = engine.adapt(
    listOf(Example.Pair(ask[0].content, ANSWER), Example.Chat(ask + Message("assistant", ANSWER))),
    AdaptOptions(steps = steps, batch = 2u, window = 4u, learningRate = 5e-3),
    listener,
)

fun testGenerate(engine: Engine) {
    val info = engine.info()
    check(info.layers == 8u && info.context == 1024u && info.canChat && info.bytes > 1_000_000u) { info }
    val listener = Tokens()
    val whole = generate(engine, listener)
    check(listener.pieces.joinToString("") == whole.text && listener.pieces.size > 3)
    check(whole.tokens == 24u && whole.finish == Finish.LENGTH) { whole }
    val cut = generate(engine, Tokens(limit = 3))
    check(cut.finish == Finish.CANCELLED && whole.text.startsWith(cut.text)) { cut }
    val word = whole.text.trim().split(" ")[3]
    check(generate(engine, stop = listOf(word)).finish == Finish.STOP_TEXT)
}

fun testCancelAndBusy(engine: Engine) {
    val started = CountDownLatch(1)
    var result: Generation? = null
    val work = thread { result = generate(engine, Tokens { started.countDown() }, maxTokens = 1000u) }
    check(started.await(20, TimeUnit.SECONDS))
    fails<EngineException.Busy>("busy generating") { generate(engine) }
    engine.cancel()
    work.join(20_000)
    check(result!!.finish == Finish.CANCELLED && result!!.tokens < 1000u) { "$result" }
}

fun testAdapt(engine: Engine, scratch: String) {
    val before = chat(engine)
    val steps = Steps()
    val report = learn(engine, steps)
    check(steps.seen == (1..40).toList() && report.lastLoss < 0.5 * report.firstLoss) { report }
    val tuned = chat(engine)
    check(tuned != before && ANSWER in tuned) { tuned }
    val folder = File(scratch, "adapter-kotlin").path
    engine.saveAdapter(folder)
    engine.removeAdapter()
    check(chat(engine) == before && !engine.hasAdapter())
    Engine.load(MODEL, LoadOptions()).use { other ->
        other.loadAdapter(folder)
        check(chat(other) == tuned)
    }
}

fun testPause(engine: Engine) {
    val steps = Steps(mapOf(3 to Step.PAUSE))
    var result: Adaptation? = null
    val work = thread { result = learn(engine, steps, 8u) }
    check(steps.paused.await(20, TimeUnit.SECONDS))
    work.join(200)
    check(work.isAlive && steps.seen.size == 3)
    engine.resume()
    work.join(20_000)
    check(result!!.steps == 8u && !result!!.stopped) { "$result" }
    check(learn(engine, Steps(mapOf(2 to Step.STOP)), 8u).steps == 2u)
    engine.removeAdapter()
}

fun testFaults(engine: Engine) {
    val raises = object : TokenListener {
        override fun onToken(text: String): Boolean = throw IllegalStateException("no more paper")
    }
    val raisesOwn = object : ProgressListener {
        override fun onStep(step: UInt, total: UInt, loss: Double, bytes: ULong): Step =
            throw ListenerException.Failed("the battery is low")
    }
    val before = generate(engine).text
    fails<EngineException.Listener>("no more paper") { generate(engine, raises) }
    fails<EngineException.Listener>("the battery is low") { learn(engine, raisesOwn) }
    check(generate(engine).text == before && !engine.hasAdapter())
    fails<EngineException.Model>("nowhere") { Engine.load("/nowhere", LoadOptions()) }
    fails<EngineException.Memory>("memory budget") { Engine.load(MODEL, LoadOptions(memoryBudgetBytes = 1000u)) }
    fails<EngineException.BadArgument>("policy") { Engine.load(MODEL, LoadOptions(policy = "q7")) }
    fails<EngineException.BadArgument>("at least one token") { engine.generate("", GenerateOptions(), null) }
    fails<EngineException.BadArgument>("examples") { engine.adapt(listOf(), AdaptOptions(), null) }
}

fun testTwoThreads(engine: Engine) {
    Engine.load(MODEL, LoadOptions(policy = "q8g32s")).use { other ->
        val alone = listOf(engine, other).map { generate(it, maxTokens = 100u).text }
        val together = arrayOfNulls<String>(2)
        listOf(engine, other).mapIndexed { i, e -> thread { together[i] = generate(e, maxTokens = 100u).text } }.forEach { it.join() }
        check(together.toList() == alone) { "$alone, ${together.toList()}" }
    }
}

lateinit var MODEL: String

fun main(arguments: Array<String>) {
    MODEL = arguments[0]
    check(version().count { it == '.' } == 2 && lastError() == null)
    Engine.load(MODEL, LoadOptions()).use { engine ->
        testGenerate(engine)
        testCancelAndBusy(engine)
        testAdapt(engine, arguments[1])
        engine.removeAdapter()
        testPause(engine)
        testFaults(engine)
        testTwoThreads(engine)
    }
    println("6 tests")
}
