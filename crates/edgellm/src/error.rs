//! The error type of the facade: one sentence each, from whichever crate it came.

use std::path::PathBuf;

use edgellm_eval::EvalError;
use edgellm_luc::LucError;
use edgellm_model::ModelError;
use edgellm_sched::SchedError;
use edgellm_tune::TuneError;

/// What can go wrong between a command and its result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EdgeError {
    /// Reading, writing or running a model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Measuring or compressing failed.
    #[error(transparent)]
    Luc(#[from] LucError),
    /// Tuning or voting failed.
    #[error(transparent)]
    Tune(#[from] TuneError),
    /// Profiling or predicting failed.
    #[error(transparent)]
    Sched(#[from] SchedError),
    /// Evaluating failed.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The build has no such backend.
    #[error("device {device} is not in this build; build edgellm with `--features {device}`")]
    DeviceNotBuilt {
        /// The device, named as its Cargo feature.
        device: &'static str,
    },
    /// The backend is there, but no device for it.
    #[error("device {device}: expected at least one adapter, found none; use --device flex")]
    NoDevice {
        /// The device.
        device: &'static str,
    },
    /// Neither a path nor a stored model.
    #[error("'{name}' is no file, no folder and no stored model; {hint}")]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What there is, and what to do.
        hint: String,
    },
    /// A name that no model can have.
    #[error("model name: expected {expected}, found '{found}'")]
    ModelName {
        /// What a name may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A pinned model could not be fetched.
    #[error("cannot fetch {model}: {reason}")]
    Pull {
        /// The model's name.
        model: String,
        /// What failed, with what to do.
        reason: String,
    },
    /// The fetched file is not the one that is pinned.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Pinned {
        /// The file.
        path: PathBuf,
        /// What was compared.
        what: &'static str,
        /// The pinned value.
        expected: String,
        /// The value found.
        found: String,
    },
    /// Not even the least fits into the memory that may be used.
    #[error(
        "memory: expected at least {least} bytes, for buffers, embedding and one block at a time, found {limit}; give \
             more with --max-memory, a shorter context, or a model with fewer bits"
    )]
    Memory {
        /// What would do.
        least: u64,
        /// What there is.
        limit: u64,
    },
    /// The caller asked to stop.
    #[error("stopped before it was complete; nothing was changed")]
    Cancelled,
}
