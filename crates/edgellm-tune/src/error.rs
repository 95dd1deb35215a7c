//! The error type of this crate.

use edgellm_model::ModelError;

/// What can go wrong while tuning.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TuneError {
    /// Reading or running the model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A setting is out of range.
    #[error("{what}: expected {expected}, found {found}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A step does not fit in memory.
    #[error(
        "memory for a step: expected at least {least} bytes, found {budget}; raise the budget or shorten the examples"
    )]
    Memory {
        /// What the leanest step needs.
        least: u64,
        /// What there is.
        budget: u64,
    },
    /// There is nothing to learn from.
    #[error("the batch of step {step} has no response token to learn from; check the data and --max-len")]
    EmptyBatch {
        /// The step, counted from 0.
        step: u64,
    },
    /// The loss was not finite for many steps in a row.
    #[error("the loss was not finite in {steps} steps in a row, last at step {step}; lower the learning rate")]
    Diverged {
        /// Skipped steps in a row.
        steps: u32,
        /// The last of them, counted from 0.
        step: u64,
    },
}
