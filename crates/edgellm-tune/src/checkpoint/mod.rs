//! Checkpoints of a training run.

mod buffer;

pub use buffer::{Buffer, NamedBuffer};
