//! Adaptive layer tuning and voting.
//!
//! [`Trainer`] tunes an adapter on a frozen, possibly packed base: each step trains only a window of blocks below one
//! exit, runs nothing above it and keeps nothing below it. [`voters`] combines the exits' distributions at inference.
//! After EDGE-LLM (DAC 2024, arXiv 2406.15758).
#![forbid(unsafe_code)]

mod batch;
mod calibrate;
mod error;
pub mod exits;
pub mod full;
pub mod lens;
pub mod optimizer;
mod trainer;
pub mod voters;

pub use calibrate::calibrate_exit_norms;
pub use error::TuneError;
pub use trainer::{StepReport, Trainer, TuneConfig};
