//! Layer-wise unified compression (LUC): how sensitive each part of a model is, which format each part should get
//! under a budget, and giving it that format.
//!
//! 1. [`measure`] tries every [option](option_grid) on every unit of a model and gives a
//!    [`Measurement`](edgellm_model::values::Measurement): a file that is reused for every budget.
//! 2. A policy solver turns it into a [`CompressionPolicy`](edgellm_model::values::CompressionPolicy): [`Uniform`] (the
//!    usual baseline), [`Paper`] (EDGE-LLM's rule) or [`Solve`] (the exact optimum of the summed sensitivities).
//! 3. [`compress_model`] applies a policy to a model's files, [`compress_decoder`] to a model in memory; a compressor
//!    such as [`Rtn`] does it for a single matrix.
//! 4. [`merge_adapter`] writes a model with an adapter merged into it.
//!
//! ```
//! use burn::tensor::Device;
//! use edgellm_luc::{Rtn, Solve, Trials, compress_decoder, measure, option_grid, policy_cost};
//! use edgellm_model::traits::PolicySolver;
//! use edgellm_model::values::{Budget, Granularity};
//!
//! let decoder = edgellm_model::testing::tiny_decoder(0, &Device::flex());
//! let calibration = vec![(0..64).collect::<Vec<u32>>()];
//! let options = option_grid(&[2, 4, 8], &[32], &[])?;
//! let trials = Trials {
//!     options: &options,
//!     granularity: Granularity::Block,
//!     compressor: &Rtn,
//!     calibration: &calibration,
//!     compared_windows: 1,
//!     compared_length: 64,
//! };
//! let measurement = measure(&decoder, &trials, &[], &mut |_| Ok(()), &mut |_| {})?;
//!
//! let budget = Budget { bits_per_weight: Some(5.0), ..Budget::default() };
//! let policy = Solve::default().solve(&measurement, &budget)?;
//! assert!(policy_cost(&measurement, &policy)?.bits_per_weight <= 5.0);
//!
//! let compressed = compress_decoder(&decoder, &policy, &Rtn, &[])?;
//! assert_eq!(compressed.forward(&[1, 2, 3], None, None)?.dims(), [3, 288]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

mod apply;
mod calibrate;
mod compressors;
mod cost;
mod digest;
mod error;
mod measure;
mod merge;
mod outputs;
mod policy;
mod progress;
mod rtn;
mod search;
mod weights;

pub use apply::{Applied, Compression, compress_decoder, compress_model, uniform_policy};
pub use compressors::{Gptq, ScaleSearch, Wanda};
pub use cost::{PolicyCost, bits_per_weight, matrices_bytes, policy_cost, total_weights};
pub use digest::{calibration_digest, measurement_digest, model_digest};
pub use error::{LucError, Result};
pub use measure::{Trials, beginnings, measure};
pub use merge::{Aim, InputMoments, MergeOptions, Merged, MergedMatrix, merge_adapter};
pub use policy::{
    Choice, Costs, DecodeDevice, Explained, Item, Neighbour, Paper, Resource, Selection, Sensitivity, Solution, Solve,
    Uniform, allocate_sparsity, decoder_shape, explain, option_grid, select,
};
pub use progress::Progress;
pub use rtn::{Rtn, pruned_per_row};
pub use search::{Search, Searched};
