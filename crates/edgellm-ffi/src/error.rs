//! The error of the interface, and the guard around every call: one sentence each, no panic outside, and the sentence kept
//! for [`last_error`](crate::last_error).

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use edgellm::EdgeError;
use edgellm::model::ModelError;
use edgellm::tune::TuneError;

/// `Result` with [`EngineError`].
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

/// What can go wrong in a call. Each is one sentence that says what was expected and what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, uniffi::Error)]
#[uniffi(flat_error)]
#[non_exhaustive]
pub enum EngineError {
    /// An argument or an option is out of range, or does not go with the model.
    #[error("{0}")]
    BadArgument(String),
    /// A model, policy or adapter cannot be read, written or run.
    #[error("{0}")]
    Model(String),
    /// It does not fit into the memory budget.
    #[error("{0}")]
    Memory(String),
    /// The engine is doing something else.
    #[error("{0}")]
    Busy(String),
    /// A listener raised an error.
    #[error("{0}")]
    Listener(String),
    /// A fault of this library.
    #[error("{0}")]
    Internal(String),
}

/// What a listener may raise. Any other exception that leaves it is turned into this one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, uniffi::Error)]
#[non_exhaustive]
pub enum ListenerError {
    /// The listener failed; the call that it listens to ends with an error.
    #[error("{reason}")]
    Failed {
        /// Why.
        reason: String,
    },
}

impl From<uniffi::UnexpectedUniFFICallbackError> for ListenerError {
    fn from(error: uniffi::UnexpectedUniFFICallbackError) -> Self {
        Self::Failed { reason: error.reason }
    }
}

impl From<ListenerError> for EngineError {
    fn from(ListenerError::Failed { reason }: ListenerError) -> Self {
        Self::Listener(format!("the listener failed: {reason}"))
    }
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Value { .. } => Self::BadArgument(error.to_string()),
            other => Self::Model(other.to_string()),
        }
    }
}

impl From<EdgeError> for EngineError {
    fn from(error: EdgeError) -> Self {
        match error {
            EdgeError::Model(error) => error.into(),
            EdgeError::Tune(error) => error.into(),
            other => Self::Model(other.to_string()),
        }
    }
}

impl From<TuneError> for EngineError {
    fn from(error: TuneError) -> Self {
        match error {
            TuneError::Model(error) => error.into(),
            TuneError::Setting { .. } | TuneError::EmptyBatch { .. } => Self::BadArgument(error.to_string()),
            TuneError::Memory { .. } => Self::Memory(error.to_string()),
            other => Self::Model(other.to_string()),
        }
    }
}

impl EngineError {
    /// A value that does not do.
    pub(crate) fn argument(what: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Self {
        Self::BadArgument(format!("{what}: expected {expected}, found {found}"))
    }
}

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The sentence of the last error on this thread.
pub(crate) fn last() -> Option<String> {
    LAST.with(|last| last.borrow().clone())
}

/// Runs a call: a panic becomes an error, and an error is noted for this thread.
pub(crate) fn guard<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(from_panic(panic.as_ref())));
    if let Err(error) = &result {
        LAST.with(|last| *last.borrow_mut() = Some(error.to_string()));
    }
    result
}

/// What a panic said.
fn from_panic(panic: &(dyn Any + Send)) -> EngineError {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    EngineError::Internal(format!("a fault inside the library, please report it: {}", text.unwrap_or("no message")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_and_errors_are_kept_by_thread() {
        let error = guard(|| -> Result<()> { panic!("at {}", 7) }).unwrap_err();
        assert_eq!(error, EngineError::Internal("a fault inside the library, please report it: at 7".into()));
        assert_eq!(last(), Some(error.to_string()));
        assert_eq!(std::thread::spawn(last).join().unwrap(), None);
        assert_eq!(guard(|| Ok(1)), Ok(1));
        assert_eq!(last(), Some(error.to_string()), "a call that works does not erase what failed");
    }
}
