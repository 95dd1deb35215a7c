//! Settings of a tuning run.

use edgellm_model::adapter::LoraConfig;

use crate::TuneError;
use crate::exits::ExitScale;
use crate::optimizer::{AdamWConfig, LrSchedule};
use crate::order::Order;

/// Settings of a tuning run.
#[derive(Clone, Debug)]
pub struct TuneConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Examples per step.
    pub batch_size: usize,
    /// Which examples a step takes.
    pub order: Order,
    /// Tokens that are run at once, unless an example has more; a step adds up the gradients of as many parts as it takes.
    pub micro_tokens: usize,
    /// What the window keeps of its forward pass.
    pub keep: Keep,
    /// Exits, as numbers of blocks, ascending; the last is the whole model.
    pub exits: Vec<usize>,
    /// Blocks that a step trains.
    pub window: usize,
    /// Rank, scale and targets of the adapter.
    pub lora: LoraConfig,
    /// Share of the inputs of the window's low-rank updates that a step sets to zero; on the CPU only.
    pub lora_dropout: f32,
    /// Whether the norms of the exits before the last are trained as well. The last exit keeps the model's final norm, so
    /// that the adapter means the same to PEFT, which knows nothing of exits.
    pub train_exit_norms: bool,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// How strongly the exits before the last are trained.
    pub exit_scale: ExitScale,
    /// How the learning rate moves.
    pub lr_schedule: LrSchedule,
    /// Steps of linear increase of the learning rate.
    pub warmup_steps: u64,
    /// Optimizer settings.
    pub adamw: AdamWConfig,
    /// Largest global norm of a step's gradients; 0 does not clip.
    pub max_grad_norm: f64,
    /// Seed of the adapter's start.
    pub seed: u64,
}

/// Tokens that are run at once if nothing else is asked for: enough to use a weight often, few enough that a block's
/// activations stay in the processor's caches.
pub const MICRO_TOKENS: usize = 512;

/// What a window keeps of its forward pass for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All activations: fastest.
    All,
    /// The inputs of the blocks; the rest is computed again, a block at a time: leanest.
    Inputs,
    /// All activations of the window's last blocks, so many of them, and the inputs of the others.
    Last(usize),
}

impl Keep {
    /// Blocks that keep all activations.
    pub fn blocks(self) -> usize {
        match self {
            Keep::All => usize::MAX,
            Keep::Inputs => 0,
            Keep::Last(blocks) => blocks,
        }
    }
}

impl TuneConfig {
    /// Checks the settings for a model of `n_blocks` blocks.
    pub(crate) fn validate(&self, n_blocks: usize) -> Result<(), TuneError> {
        let bad = |what, expected: String, found: String| Err(TuneError::Setting { what, expected, found });
        let ascending = self.exits.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.exits.first().is_none_or(|e| *e == 0) || self.exits.last() != Some(&n_blocks) {
            let expected = format!("ascending numbers of blocks that end with {n_blocks}");
            return bad("exits", expected, format!("{:?}", self.exits));
        }
        for (what, value) in
            [("window", self.window), ("batch size", self.batch_size), ("tokens at once", self.micro_tokens)]
        {
            if value == 0 {
                return bad(what, "at least 1".into(), "0".into());
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return bad("LoRA dropout", "from 0 to below 1".into(), self.lora_dropout.to_string());
        }
        if !self.learning_rate.is_finite() || self.learning_rate <= 0.0 {
            return bad("learning rate", "a positive number".into(), self.learning_rate.to_string());
        }
        if self.max_grad_norm < 0.0 || self.max_grad_norm.is_nan() {
            return bad("largest gradient norm", "at least 0".into(), self.max_grad_norm.to_string());
        }
        Ok(())
    }
}
