//! What no binding can test: listeners that panic, and that a cache that is used again changes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use edgellm_ffi::{
    AdaptOptions, Engine, EngineError, Example, Finish, GenerateOptions, ListenerError, LoadOptions, Message,
    ProgressListener, Step, TokenListener, last_error,
};

fn engine() -> Arc<Engine> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/model");
    Engine::load(path.into(), LoadOptions::default()).unwrap()
}

fn options(max_tokens: u32) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

fn examples() -> Vec<Example> {
    vec![Example::Pair { prompt: "What is my boat called?".into(), response: "The Pear.".into() }]
}

/// Panics at its `0`th call.
struct Panics(AtomicUsize);

impl Panics {
    fn at(call: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(call)))
    }

    fn call(&self) {
        assert!(self.0.fetch_sub(1, Ordering::Relaxed) != 1, "the listener is broken");
    }
}

impl TokenListener for Panics {
    fn on_token(&self, _text: String) -> Result<bool, ListenerError> {
        self.call();
        Ok(true)
    }
}

impl ProgressListener for Panics {
    fn on_step(&self, _step: u32, _total: u32, _loss: f64, _bytes: u64) -> Result<Step, ListenerError> {
        self.call();
        Ok(Step::Continue)
    }
}

#[test]
fn a_panic_becomes_an_error_and_the_engine_goes_on() {
    let engine = engine();
    let text = |engine: &Engine| engine.generate("The boat".into(), options(12), None).unwrap().text;
    let before = text(&engine);
    for call in [1, 3] {
        let error = engine.generate("The boat".into(), options(12), Some(Panics::at(call))).unwrap_err();
        assert!(matches!(&error, EngineError::Internal(m) if m.contains("the listener is broken")), "{error}");
        assert_eq!(last_error(), Some(error.to_string()));
        let adapt = AdaptOptions { steps: 4, ..AdaptOptions::default() };
        let error = engine.adapt(examples(), adapt, Some(Panics::at(call))).unwrap_err();
        assert!(matches!(error, EngineError::Internal(_)), "{error}");
        assert!(!engine.has_adapter().unwrap(), "nothing of a failed run is kept");
        assert_eq!(text(&engine), before);
    }
}

#[test]
fn a_cache_that_is_used_again_changes_nothing() {
    let engine = engine();
    let mut messages = vec![Message { role: "user".into(), content: "Where does Mara live?".into() }];
    for turn in 0..3 {
        let kept = engine.chat(messages.clone(), options(20), None).unwrap();
        let fresh = self::engine().chat(messages.clone(), options(20), None).unwrap();
        assert_eq!((&kept.text, kept.tokens), (&fresh.text, fresh.tokens), "turn {turn}");
        assert_eq!(fresh.reused_tokens, 0);
        assert!(turn != 1 || kept.reused_tokens > 0, "the conversation so far is known");
        // Another text in between leaves less to use, not something wrong.
        if turn == 1 {
            engine.generate("The boat".into(), options(5), None).unwrap();
        }
        messages.push(Message { role: "assistant".into(), content: kept.text });
        messages.push(Message { role: "user".into(), content: "And what does she like?".into() });
    }
    let long = "The boat is on the water. ".repeat(60);
    let kept = engine.generate(long.clone(), options(8), None).unwrap();
    assert!(kept.prompt_tokens > 300, "a prompt of several parts: {kept:?}");
    let again = engine.generate(long, options(8), None).unwrap();
    assert_eq!((again.text, again.reused_tokens), (kept.text, kept.prompt_tokens - 1));
}

#[test]
fn an_adapter_ends_what_the_cache_knows() {
    let engine = engine();
    let first = engine.generate("The boat".into(), options(8), None).unwrap();
    assert_eq!(first.finish, Finish::Length);
    engine.adapt(examples(), AdaptOptions { steps: 2, window: Some(2), ..AdaptOptions::default() }, None).unwrap();
    assert!(engine.has_adapter().unwrap());
    assert_eq!(engine.generate("The boat".into(), options(8), None).unwrap().reused_tokens, 0);
    engine.remove_adapter().unwrap();
    let last = engine.generate("The boat".into(), options(8), None).unwrap();
    assert_eq!((last.text, last.reused_tokens), (first.text, 0));
}
