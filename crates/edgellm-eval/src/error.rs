//! The crate's one error type.

use edgellm_model::ModelError;

/// `Result` with [`EvalError`].
pub type Result<T, E = EvalError> = std::result::Result<T, E>;

/// What can go wrong in an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A chart has nothing to show, or its library refused.
    #[error("the chart could not be drawn: {0}")]
    Chart(String),
    /// There is not enough to evaluate on.
    #[error("{what}: expected at least {needed}, found {found}")]
    TooLittle {
        /// What there is too little of.
        what: &'static str,
        /// How much is needed.
        needed: usize,
        /// How much there is.
        found: usize,
    },
    /// A setting makes no sense for this model.
    #[error("{what}: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A result is infinite or no number: the model's activations overflow.
    #[error("{what} is {value}, not a finite number")]
    NotFinite {
        /// The result.
        what: &'static str,
        /// Its value.
        value: f64,
    },
}

/// `value`, if it is finite.
pub(crate) fn finite(what: &'static str, value: f64) -> Result<f64> {
    if value.is_finite() { Ok(value) } else { Err(EvalError::NotFinite { what, value }) }
}
