//! The names under which figures leave the libraries as `tracing` events, for whoever aggregates them.
//!
//! Spans are told apart by name and level. At `DEBUG`: stages (`load`, `tokenize`, `prefill`, `decode`, `evaluate`,
//! `tune_step` with `forward`, `backward` and `optimizer`, `measure_unit`, `calibrate`, `compress_block`, `plan`,
//! `stream_read`), with the field `tokens` where there are some, and blocks (`block`, `block_backward`), with `index` and
//! `bytes`, the bytes of packed weights that are read. At `TRACE`: operators (`norm`, `qkv`, `attention`, `o`, `gate_up`,
//! `down`, and the same with `_backward`; outside of blocks `embed`, `norm`, `head` and `sample`). On a device that
//! computes asynchronously an operator's time is that of its submission.
//!
//! Events of these targets are at `TRACE`. Their figures cost time to compute, so they are computed only while somebody
//! asked for the target by its name.

/// Ranges of hidden states behind blocks: `index`, `min`, `max`, `rms`.
pub const ACTIVATIONS: &str = "edgellm::figures::activations";

/// Votes: `chosen`, an exit that gave a token alone; `won`, the exit that gave a voted token the most probability;
/// `exit` with its `temperature`.
pub const VOTES: &str = "edgellm::figures::votes";

/// Norms of the gradients of a tuning step: `index` of the block, `norm`.
pub const GRADIENTS: &str = "edgellm::figures::gradients";

/// What all these targets begin with.
pub const FIGURES: &str = "edgellm::figures";
