//! The crate's one error type.

use edgellm_model::ModelError;

/// `Result` with [`SchedError`].
pub type Result<T, E = SchedError> = std::result::Result<T, E>;

/// What can go wrong when a device is measured or a profile is used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchedError {
    /// The model crate refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A figure of a profile makes no sense.
    #[error("device profile '{profile}': {field}: expected {expected}, found {found}")]
    Profile {
        /// Name of the profile.
        profile: String,
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The system does not tell something, and the caller did not either.
    #[error("this system does not tell {what}; give it")]
    Unknown {
        /// The figure.
        what: &'static str,
    },
    /// Threads for a measurement could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// How many.
        threads: usize,
        /// The system's answer.
        reason: String,
    },
    /// A measurement came out as zero or infinite time.
    #[error("measuring {what} gave {found}, which is no rate")]
    Measurement {
        /// What was measured.
        what: &'static str,
        /// What came out.
        found: f64,
    },
}
