//! Adaptive layer tuning and voting.
//!
//! [`Trainer`] tunes an adapter on a frozen, possibly packed base: each step trains only a window of blocks below one
//! exit, runs nothing above it and keeps nothing below it. [`voters`] combines the exits' distributions at inference,
//! with weights that [`vote`] fits.
//! After EDGE-LLM (DAC 2024, arXiv 2406.15758).
#![forbid(unsafe_code)]

mod batch;
mod calibrate;
pub mod checkpoint;
mod config;
pub mod control;
mod error;
pub mod exits;
pub mod full;
pub mod lens;
pub mod memory;
pub mod optimizer;
pub mod order;
pub mod recover;
mod step;
mod trainer;
pub mod vote;
pub mod voters;

pub use calibrate::calibrate_exit_norms;
pub use config::{Keep, MICRO_TOKENS, TuneConfig};
pub use error::TuneError;
pub use step::StageSeconds;
pub use trainer::{StepReport, Trainer};
