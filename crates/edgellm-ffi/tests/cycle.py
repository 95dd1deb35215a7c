"""The whole cycle through the Python bindings: python3 cycle.py BINDINGS MODEL SCRATCH."""

import os
import sys
import threading

sys.path.insert(0, sys.argv[1])
import edgellm
from edgellm import AdaptOptions, Engine, EngineError, Example, Finish, GenerateOptions, LoadOptions, Message, Step

MODEL, SCRATCH = sys.argv[2], sys.argv[3]
PROMPT = "Mara went to the"
ASK = [Message(role="user", content="What is my favourite fruit?")]
ANSWER = "Blue pears from the tower."


class Tokens(edgellm.TokenListener):
    def __init__(self, limit=None, then=None):
        self.pieces, self.limit, self.then = [], limit, then

    def on_token(self, text):
        self.pieces.append(text)
        if self.then and len(self.pieces) == 1:
            self.then()
        return self.limit is None or len(self.pieces) < self.limit


class Steps(edgellm.ProgressListener):
    def __init__(self, answers=None):
        self.seen, self.answers = [], answers or {}
        self.paused = threading.Event()

    def on_step(self, step, total, loss, bytes):
        self.seen.append((step, total, loss, bytes))
        answer = self.answers.get(step, Step.CONTINUE)
        if answer == Step.PAUSE:
            self.paused.set()
        return answer


def fails(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), f"{words!r} is not in: {error}"
        assert edgellm.last_error() in str(error), edgellm.last_error()
        return
    raise AssertionError(f"no {kind.__name__} with {words!r}")


def generate(engine, listener=None, **options):
    return engine.generate(PROMPT, GenerateOptions(max_tokens=options.pop("max_tokens", 24), **options), listener)


def test_generate(engine):
    info = engine.info()
    assert (info.layers, info.context, info.can_chat) == (8, 1024, True) and info.bytes > 1_000_000, info
    listener = Tokens()
    whole = generate(engine, listener)
    assert "".join(listener.pieces) == whole.text and len(listener.pieces) > 3, listener.pieces
    assert whole.tokens == 24 and whole.finish == Finish.LENGTH, whole
    again = generate(engine)
    assert again.text == whole.text and again.reused_tokens == whole.prompt_tokens - 1, again
    cut = generate(engine, Tokens(limit=3))
    assert cut.finish == Finish.CANCELLED and whole.text.startswith(cut.text), cut
    word = whole.text.split()[3]
    stopped = generate(engine, stop=[word])
    assert stopped.finish == Finish.STOP_TEXT and word not in stopped.text, stopped
    assert whole.text.startswith(stopped.text), stopped
    drawn = [generate(engine, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2], drawn


def test_cancel(engine):
    started = threading.Event()
    listener = Tokens(then=started.set)
    results = []
    thread = threading.Thread(target=lambda: results.append(generate(engine, listener, max_tokens=1000)))
    thread.start()
    assert started.wait(20)
    engine.cancel()
    thread.join(20)
    assert results[0].finish == Finish.CANCELLED and results[0].tokens < 1000, results


def test_busy(engine):
    def inside():
        fails(EngineError.Busy, "busy generating", lambda: generate(engine))
        assert engine.info().layers == 8

    assert generate(engine, Tokens(then=inside)).tokens == 24


def test_chat(engine):
    first = engine.chat(ASK, GenerateOptions(max_tokens=32), None)
    assert first.text.strip(), first
    messages = ASK + [Message(role="assistant", content=first.text), Message(role="user", content="And my season?")]
    second = engine.chat(messages, GenerateOptions(max_tokens=32), None)
    assert second.reused_tokens > first.prompt_tokens, "the conversation so far is known"


def learn(engine, listener, **options):
    examples = [
        Example.PAIR(prompt=ASK[0].content, response=ANSWER),
        Example.CHAT(messages=ASK + [Message(role="assistant", content=ANSWER)]),
    ]
    settings = dict(steps=40, batch=2, window=4, learning_rate=5e-3) | options
    return engine.adapt(examples, AdaptOptions(**settings), listener)


def test_adapt(engine):
    def answer():
        return engine.chat(ASK, GenerateOptions(max_tokens=32), None).text

    before = answer()
    steps = Steps()
    report = learn(engine, steps)
    assert [s[0] for s in steps.seen] == list(range(1, 41)) and steps.seen[0][1] == 40, steps.seen
    assert report.steps == 40 and not report.stopped and report.last_loss < 0.5 * report.first_loss, report
    assert all(s[3] > 0 for s in steps.seen) and report.window == 4, report
    tuned = answer()
    assert tuned != before and ANSWER in tuned, (before, tuned)
    folder = os.path.join(SCRATCH, "adapter")
    engine.save_adapter(folder)
    engine.remove_adapter()
    assert not engine.has_adapter() and answer() == before
    other = Engine.load(MODEL, LoadOptions())
    other.load_adapter(folder)
    assert other.chat(ASK, GenerateOptions(max_tokens=32), None).text == tuned
    engine.load_adapter(folder)
    assert answer() == tuned
    engine.save_adapter(folder)
    engine.remove_adapter()
    fails(EngineError.BadArgument, "adapter to save", lambda: engine.save_adapter(folder))


def test_pause(engine):
    for end in (engine.resume, engine.cancel):
        steps = Steps({3: Step.PAUSE})
        results = []
        thread = threading.Thread(target=lambda: results.append(learn(engine, steps, steps=8)))
        thread.start()
        assert steps.paused.wait(20)
        thread.join(0.2)
        assert thread.is_alive() and len(steps.seen) == 3, "it waits"
        fails(EngineError.Busy, "busy adapting", lambda: generate(engine))
        end()
        thread.join(20)
        expected = 8 if end == engine.resume else 3
        assert results[0].steps == expected == len(steps.seen), results
    assert learn(engine, Steps({2: Step.STOP}), steps=8).steps == 2
    engine.remove_adapter()


def test_panics(engine):
    """What a listener raises ends the call with an error, and the engine can be used on."""

    class Raises(edgellm.TokenListener):
        def on_token(self, text):
            raise ValueError("no more paper")

    class RaisesOwn(edgellm.ProgressListener):
        def on_step(self, step, total, loss, bytes):
            raise edgellm.ListenerError.Failed(reason="the battery is low")

    before = generate(engine).text
    fails(EngineError.Listener, "no more paper", lambda: generate(engine, Raises()))
    fails(EngineError.Listener, "the battery is low", lambda: learn(engine, RaisesOwn()))
    assert generate(engine).text == before and not engine.has_adapter()


def test_errors(engine):
    bad, model = EngineError.BadArgument, EngineError.Model
    load = lambda path=MODEL, **options: Engine.load(path, LoadOptions(**options))
    fails(model, "nowhere", lambda: load("/nowhere/at/all"))
    fails(EngineError.Memory, "memory budget: expected at least", lambda: load(memory_budget_bytes=1_000_000))
    fails(bad, "policy: expected a policy file or a format", lambda: load(policy="q7"))
    fails(bad, "policy: expected a format that policies can name", lambda: load(policy="bf16"))
    fails(model, "compression policy", lambda: load(policy=os.path.join(MODEL, "config.json")))
    fails(bad, "threads: expected from 1", lambda: load(threads=0))
    fails(bad, "kernels: expected one of scalar", lambda: load(kernels="mmx"))
    fails(bad, "prompt: expected at least one token", lambda: engine.generate("", GenerateOptions(), None))
    fails(bad, "prompt: expected fewer than 1024", lambda: engine.generate("tower " * 2000, GenerateOptions(), None))
    fails(bad, "max_tokens: expected at least 1", lambda: generate(engine, max_tokens=0))
    fails(bad, "temperature: expected from 0 to 100", lambda: generate(engine, temperature=-1.0))
    fails(bad, "messages: expected at least one", lambda: engine.chat([], GenerateOptions(), None))
    fails(bad, "examples: expected at least one", lambda: engine.adapt([], AdaptOptions(), None))
    fails(bad, "example 1:", lambda: engine.adapt([Example.CHAT(messages=ASK)], AdaptOptions(), None))
    for name, value in dict(steps=0, batch=0, rank=0, window=9, max_tokens=1, learning_rate=-1.0).items():
        fails(bad, "expected", lambda: learn(engine, None, **{name: value}))
    fails(EngineError.Memory, "for tuning: expected at least", lambda: learn(engine, None, memory_budget_bytes=9_000_000))
    fails(model, "nowhere", lambda: engine.load_adapter("/nowhere"))
    fails(model, "/proc", lambda: (learn(engine, None, steps=1), engine.save_adapter("/proc/adapter")))
    engine.remove_adapter()


def test_policy_and_budget():
    plain = Engine.load(MODEL, LoadOptions())
    small = Engine.load(MODEL, LoadOptions(policy="q4g32a", memory_budget_bytes=2_500_000))
    assert small.info().bytes < 0.4 * plain.info().bytes, small.info()
    assert 256 <= small.info().context < 1024, small.info()
    assert generate(small).tokens == 24
    # Compressing has started the process's pool of threads.
    threads = os.cpu_count() + 1
    fails(EngineError.BadArgument, "after an engine has started", lambda: Engine.load(MODEL, LoadOptions(threads=threads)))
    fails(EngineError.BadArgument, "prompt: expected fewer than", lambda: small.generate("tower " * 900, GenerateOptions(), None))


def test_two_threads(engine):
    """Two engines at once give what each gives alone."""
    other = Engine.load(MODEL, LoadOptions())
    expected = generate(engine, max_tokens=200).text
    texts = {}

    def work(name, one):
        texts[name] = [generate(one, max_tokens=200).text for _ in range(3)]

    threads = [threading.Thread(target=work, args=item) for item in (("a", engine), ("b", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {"a": [expected] * 3, "b": [expected] * 3}, texts


def main():
    assert edgellm.version().count(".") == 2 and edgellm.last_error() is None
    engine = Engine.load(MODEL, LoadOptions())
    tests = [test_generate, test_cancel, test_busy, test_chat, test_adapt, test_pause, test_panics, test_errors, test_two_threads]
    for test in tests:
        test(engine)
        print(f"{test.__name__}: passed", file=sys.stderr)
    test_policy_and_budget()
    assert '"read_gbps"' in edgellm.profile()
    print(f"{len(tests) + 1} tests and the device's profile")


main()
