//! What a tuning step needs in memory, and the choice of tokens at once, kept activations and window for a budget.
//!
//! The sizes are those of the buffers of the CPU's step (`step/slices.rs` and the blocks on slices below it); with `T` tokens
//! in a micro-batch, hidden size `d`, `q` query, `k` key and `f` feed-forward dimensions, vocabulary `V`, in `f32` values:
//!
//! | what | values |
//! |---|---|
//! | hidden states, as they come in and as they go through | `2 T d` |
//! | a block's activations | `T (2 q + 2 k + d + 2 f)`, where norms of heads exist `T (q + k)` more |
//! | passing through it | `T (2 d + f)`, and 8-bit copies of at most `1.6 T f` bytes |
//! | the backward pass | `T (2 f + d + 2 q + 2 k)` |
//! | keys and values in the arrangement of attention | `2 T k`, rounded up |
//! | tapes | `T d` a block of the window, and the activations of those that keep them |
//! | the head | `C V` logits for `C` tokens at a time, and `5 R d` for `R` response tokens |
//! | gradients | one for each value that a step trains |
//! | moments | 2 for each value that some step trains (or 2 bytes) |

use std::ops::Range;

use edgellm_model::adapter::LoraConfig;
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::HEAD_CHUNK;

use crate::exits::window as window_of;
use crate::optimizer::StateType;
use crate::{Keep, MICRO_TOKENS, TuneConfig, TuneError};

/// Sizes that the memory of a step depends on.
#[derive(Clone, Debug)]
pub struct StepShape {
    /// Hidden size, query, key and feed-forward dimensions, vocabulary.
    hidden: u64,
    query: u64,
    key: u64,
    feed_forward: u64,
    vocabulary: u64,
    head_norms: bool,
    n_blocks: usize,
    /// Values of a block's low-rank updates.
    block_parameters: u64,
    exits: Vec<usize>,
    state: StateType,
}

/// How a step fits into a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Blocks that a step trains.
    pub window: usize,
    /// Tokens that are run at once.
    pub micro_tokens: usize,
    /// What the window keeps.
    pub keep: Keep,
    /// Bytes of the step's buffers.
    pub bytes: u64,
}

impl StepShape {
    /// The sizes of a model and a run.
    pub fn new(model: &ModelConfig, config: &TuneConfig) -> Self {
        let LoraConfig { rank, targets, .. } = &config.lora;
        let values = |[out, input]: [usize; 2]| (rank * (out + input)) as u64;
        StepShape {
            hidden: model.hidden_size as u64,
            query: (model.n_heads * model.head_dim) as u64,
            key: (model.n_kv_heads * model.head_dim) as u64,
            feed_forward: model.intermediate_size as u64,
            vocabulary: model.vocab_size as u64,
            head_norms: model.qk_norm,
            n_blocks: model.n_layers,
            block_parameters: targets.iter().map(|&p| values(model.projection_shape(p))).sum(),
            exits: config.exits.clone(),
            state: config.adamw.state,
        }
    }

    /// Bytes of a fresh adapter.
    pub fn adapter_bytes(&self) -> u64 {
        4 * (self.n_blocks as u64 * self.block_parameters + self.exits.len() as u64 * self.hidden)
    }

    /// Bytes of the buffers of steps with so many tokens at once, at most.
    pub fn bytes(&self, window: usize, tokens: usize, keep: Keep) -> u64 {
        let Self { hidden: d, query: q, key: k, feed_forward: f, .. } = *self;
        let t = tokens as u64;
        let norms = if self.head_norms { q + k } else { 0 };
        let activations = t * (2 * q + 2 * k + d + 2 * f + norms);
        let passing = t * (2 * d + f) + 4 * t * f / 10;
        let backward = t * (2 * f + d + 2 * q + 2 * k + norms);
        // The caches grow in steps of 64 positions.
        let caches = 2 * k * (t + 64);
        let blocks = self.exits.iter().map(|&exit| window_of(exit, window).len()).max().unwrap_or(0) as u64;
        let kept = (keep.blocks() as u64).min(blocks);
        let tapes = blocks * t * d + kept * activations;
        let chunk = t.min(HEAD_CHUNK as u64);
        let head = chunk * (self.vocabulary + 9 * d) + 5 * t * d;
        let gradients = blocks * self.block_parameters + d;
        let values = 2 * t * d + activations + passing + backward + caches + tapes + head + gradients;
        // What the allocator holds beside, and small buffers: measured with budgets from 180 to 400 MB.
        let sum = 4 * values + self.state_bytes(window);
        sum + sum / 8 + ALLOCATOR
    }

    /// Bytes of the optimizer's state after steps at every exit.
    fn state_bytes(&self, window: usize) -> u64 {
        let mut trained = vec![false; self.n_blocks];
        for &exit in &self.exits {
            trained[window_of(exit, window)].fill(true);
        }
        let blocks = trained.iter().filter(|t| **t).count() as u64;
        let each = match self.state {
            StateType::F32 => 8,
            StateType::Int8 => 3,
        };
        blocks * self.block_parameters * each + 8 * self.hidden * self.exits.len() as u64
    }

    /// The fastest way to run steps of `batch` tokens in examples of at most `longest` tokens in `budget` bytes.
    ///
    /// A step that keeps less computes more (a fifth, with a window of 8 blocks that keeps inputs only); a step of fewer
    /// tokens at once reads the weights more often, which costs little down to some hundred tokens. So the number of
    /// tokens is made smaller first, down to [`FEW_TOKENS`], then less is kept, then tokens fall to one example, and then,
    /// since that changes what is learned, the window, if `windows` has more than one value.
    ///
    /// # Errors
    /// The budget is too small: the message says what the least is.
    pub fn plan(
        &self,
        budget: u64,
        batch: usize,
        longest: usize,
        windows: Range<usize>,
    ) -> Result<MemoryPlan, TuneError> {
        let mut sizes: Vec<usize> =
            [MICRO_TOKENS, FEW_TOKENS, longest].map(|n| n.max(longest).min(batch.max(1))).into();
        sizes.dedup();
        let mut least = u64::MAX;
        for window in windows.rev() {
            let whole = sizes.iter().filter(|n| **n >= FEW_TOKENS).map(|&n| (n, Keep::Last(window)));
            let parts = sizes.iter().flat_map(|&n| (0..=window).rev().map(move |kept| (n, Keep::Last(kept))));
            for (micro_tokens, keep) in whole.chain(parts) {
                let bytes = self.bytes(window, micro_tokens, keep);
                least = least.min(bytes);
                if bytes <= budget {
                    return Ok(MemoryPlan { window, micro_tokens, keep, bytes });
                }
            }
        }
        Err(TuneError::Memory { least, budget })
    }
}

/// Bytes that the allocator holds beside what is asked for, and a part of the sum comes on top.
const ALLOCATOR: u64 = 8 << 20;
/// Tokens at once below which a step becomes slower.
const FEW_TOKENS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> StepShape {
        StepShape {
            hidden: 576,
            query: 576,
            key: 192,
            feed_forward: 1536,
            vocabulary: 49152,
            head_norms: false,
            n_blocks: 30,
            block_parameters: 81_408,
            exits: vec![8, 15, 23, 30],
            state: StateType::F32,
        }
    }

    #[test]
    fn less_memory_gives_fewer_tokens_then_less_kept_then_a_smaller_window() {
        let shape = shape();
        let all = shape.plan(u64::MAX, 1024, 256, 1..9).unwrap();
        assert_eq!((all.window, all.micro_tokens, all.keep), (8, 512, Keep::Last(8)));
        let mut last = all;
        let mut seen = vec![all];
        while let Ok(next) = shape.plan(last.bytes - 1, 1024, 256, 1..9) {
            assert!(next.bytes < last.bytes && next.window <= last.window, "{next:?} after {last:?}");
            (last, _) = (next, seen.push(next));
        }
        assert_eq!((last.window, last.micro_tokens, last.keep), (1, 256, Keep::Last(0)));
        assert!(seen.iter().any(|p| p.micro_tokens == 256 && p.keep == Keep::Last(8)));
        let error = shape.plan(last.bytes - 1, 1024, 256, 1..9).unwrap_err();
        assert!(matches!(error, TuneError::Memory { least, .. } if least == last.bytes), "{error}");
        assert!(shape.plan(last.bytes, 1024, 256, 4..5).is_err(), "a window that is asked for stays");
    }
}
