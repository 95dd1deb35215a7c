//! EdgeLLM for apps: a small, stable interface for Kotlin, Swift and Python, made by uniffi from the definitions here, and
//! the same in plain C (`include/edgellm.h`).
//!
//! An [`Engine`] is a loaded model. It generates, chats, learns an adapter from examples, and saves and loads adapters.
//! All calls block the calling thread; listeners are called on it. So nothing here needs an asynchronous runtime: an app
//! calls from a thread of its own.
//!
//! An engine does one thing at a time: a call that comes while another runs fails at once with [`EngineError::Busy`]
//! instead of waiting, so that a listener that calls back into its engine gets an answer, not a deadlock. Asking for
//! [`Engine::info`], cancelling, pausing and going on are possible at any time, from any thread. Several engines work side
//! by side.
//!
//! No panic crosses the border: one inside becomes [`EngineError::Internal`], and the engine can be used on.
#![deny(unsafe_code)]

mod adapt;
mod c;
mod control;
mod engine;
mod error;
mod generate;
mod load;
mod stop;
mod types;

pub use self::engine::{Engine, ProgressListener, TokenListener};
pub use self::error::{EngineError, ListenerError, Result};
pub use self::types::{
    AdaptOptions, Adaptation, Example, Finish, GenerateOptions, Generation, LoadOptions, Message, ModelInfo, Step,
};

use edgellm::sched::{ProfileRequest, measure_profile};

uniffi::setup_scaffolding!("edgellm");

/// The version of this library.
#[uniffi::export]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// What the last call on this thread that failed said, until a later one fails. Errors carry the same sentence; this is for
/// callers that only see a code.
#[uniffi::export]
pub fn last_error() -> Option<String> {
    error::last()
}

/// Measures this device for about half a minute, in which nothing else should run, and returns its profile as JSON: cores,
/// bandwidth of memory by threads, time of each format, and memory that a process may use.
///
/// # Errors
/// The system does not tell how much memory there is, or a thread cannot be started.
#[uniffi::export]
pub fn profile() -> Result<String> {
    error::guard(|| {
        let profile = measure_profile(&ProfileRequest::default(), &mut |_, _| {}).map_err(edgellm::EdgeError::from)?;
        serde_json::to_string(&profile).map_err(|e| EngineError::Internal(e.to_string()))
    })
}
