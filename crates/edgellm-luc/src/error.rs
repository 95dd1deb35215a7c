//! The crate's one error type.

use edgellm_model::ModelError;

/// `Result` with [`LucError`].
pub type Result<T, E = LucError> = std::result::Result<T, E>;

/// What can go wrong when sensitivities are measured and policies are applied.
///
/// Policy solvers implement a trait of `edgellm-model` and return its [`ModelError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LucError {
    /// The model, its files or the kernels refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The packed kernels refused.
    #[error(transparent)]
    Kernel(#[from] edgellm_kernels::KernelError),
    /// There is nothing to measure with.
    #[error("measuring sensitivities: expected {expected}, found none")]
    Nothing {
        /// What was missing.
        expected: &'static str,
    },
    /// A weight of the model is NaN or infinite.
    #[error("tensor '{tensor}' holds {value} at element {at}; expected finite weights")]
    Weights {
        /// The tensor's Hugging Face name.
        tensor: String,
        /// Index of the element, row-major.
        at: usize,
        /// What it holds.
        value: f32,
    },
    /// A sensitivity came out as infinity or no number: the model's activations overflow.
    #[error("the sensitivity of {unit} in format {format} is {value}, not a finite number")]
    NotFinite {
        /// The unit.
        unit: String,
        /// The format that was tried.
        format: String,
        /// What came out.
        value: f64,
    },
    /// The policy says nothing about a part of the model.
    #[error("the policy has no format for {unit} (tensor '{tensor}')")]
    NotInPolicy {
        /// The unit that is missing.
        unit: String,
        /// The tensor that needs it.
        tensor: String,
    },
    /// The policy was made for another model.
    #[error("the policy names {unit}, which this model does not have")]
    NotInModel {
        /// The unit that the model lacks.
        unit: String,
    },
}
