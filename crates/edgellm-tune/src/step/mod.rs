//! Loss and gradients of a batch at one exit: on slices where the CPU can, on tensors of any device otherwise.

mod slices;
mod tensors;

use std::ops::Range;

use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::{BlockGradients, Decoder, Dropout, LoraGradient};
use edgellm_model::values::Projection;

use crate::{TuneConfig, TuneError};

pub(crate) use slices::Slices;
pub(crate) use tensors::Tensors;

/// Wall time of a step's stages, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StageSeconds {
    /// Embedding, and the blocks below the window.
    pub prefix: f64,
    /// The window's forward pass. On devices that tune on tensors, everything forward and the loss.
    pub window: f64,
    /// The exit's head: loss and its gradient.
    pub head: f64,
    /// The window's backward pass.
    pub backward: f64,
    /// Clipping and the optimizer.
    pub update: f64,
}

/// What a step trains.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The exit, as a number of blocks.
    pub(crate) exit: usize,
    /// The blocks that are trained.
    pub(crate) window: Range<usize>,
    /// Whether the exit's norm is trained.
    pub(crate) norm: bool,
    /// Dropout of the low-rank updates' inputs; another seed for each part of a step.
    pub(crate) dropout: Option<Dropout>,
}

/// The gradients of a step, summed over its micro-batches.
#[derive(Debug, Default)]
pub(crate) struct Gradients {
    /// Of the window's blocks.
    pub(crate) blocks: Vec<BlockGradients>,
    /// Of the exit's norm, `[d]`; empty if it is not trained.
    pub(crate) norm: Vec<f32>,
}

impl Gradients {
    /// Zeros for what `place` trains, in the buffers that are there.
    pub(crate) fn reset(&mut self, adapter: &Adapter, place: &Place, d: usize) {
        self.blocks.resize_with(place.window.len(), BlockGradients::default);
        for (gradients, index) in self.blocks.iter_mut().zip(place.window.clone()) {
            for (slot, projection) in gradients.linears.iter_mut().zip(Projection::ALL) {
                match adapter.block(index).and_then(|block| block.get(projection)) {
                    None => *slot = None,
                    Some(lora) => {
                        let slot = slot.get_or_insert_with(LoraGradient::default);
                        zero(&mut slot.a, lora.a.shape().num_elements());
                        zero(&mut slot.b, lora.b.shape().num_elements());
                    }
                }
            }
        }
        zero(&mut self.norm, if place.norm { d } else { 0 });
    }

    /// `sqrt(sum |g|^2)`.
    pub(crate) fn norm(&self) -> f64 {
        let of_norm: f64 = self.norm.iter().map(|v| f64::from(*v).powi(2)).sum();
        (self.blocks.iter().map(squares).sum::<f64>() + of_norm).sqrt()
    }
}

/// `sqrt(sum |g|^2)` of one block.
pub(crate) fn block_norm(block: &BlockGradients) -> f64 {
    squares(block).sqrt()
}

fn squares(block: &BlockGradients) -> f64 {
    let all = block.linears.iter().flatten().flat_map(|gradient| [&gradient.a, &gradient.b]);
    all.map(|values| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sum()
}

fn zero(values: &mut Vec<f32>, len: usize) {
    values.clear();
    values.resize(len, 0.0);
}

/// Computes loss and gradients.
pub(crate) trait Engine {
    /// Adds the gradients of `weight * sum of the response tokens' losses` of some examples, and returns that sum. Examples
    /// have response tokens.
    ///
    /// # Errors
    /// Weights cannot be read, or a token id is outside the vocabulary.
    fn accumulate(
        &mut self,
        decoder: &Decoder,
        adapter: &Adapter,
        examples: &[Example],
        place: &Place,
        weight: f32,
        gradients: &mut Gradients,
    ) -> Result<f64, TuneError>;

    /// Seconds of the stages since the last call.
    fn take_seconds(&mut self) -> StageSeconds;

    /// Bytes of the buffers that are kept from step to step.
    fn bytes(&self) -> usize;
}

/// The engine for a decoder.
///
/// # Errors
/// Weights cannot be read, or dropout is asked for where there is none.
pub(crate) fn engine(decoder: &Decoder, config: &TuneConfig) -> Result<Box<dyn Engine>, TuneError> {
    if decoder.runs_on_slices(0..decoder.n_blocks())? {
        return Ok(Box::new(Slices::new(config.keep)));
    }
    if config.lora_dropout > 0.0 {
        let expected = "0 on this device (packed weights on the CPU have dropout)".into();
        return Err(TuneError::Setting { what: "LoRA dropout", expected, found: config.lora_dropout.to_string() });
    }
    Ok(Box::new(Tensors::default()))
}
