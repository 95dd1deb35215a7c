//! Blocks on plain slices, forward and backward: how the CPU tunes.
//!
//! Sequences of different lengths lie one after the other, so that nothing is computed for padding.

use std::borrow::Cow;
use std::ops::Range;

use burn::tensor::Device;
use edgellm_kernels::{
    BlockGradients, BlockScratch, BlockTape, BlockView, Dropout, HeadLoss, HeadView, decoder_block_backward,
    decoder_block_recorded, decoder_block_uncached, head_divergence, head_loss,
};

use super::activations::activation_range;
use super::block::BlockContext;
use super::rope::RopeSlice;
use super::{Decoder, Weight};
use crate::ModelError;
use crate::adapter::Adapter;
use crate::generate::to_vec;

/// Passes through blocks on slices, for one batch.
pub struct SlicePass<'a> {
    decoder: &'a Decoder,
    adapter: Option<&'a Adapter>,
    lengths: &'a [usize],
    rope: RopeSlice,
    scratch: &'a mut BlockScratch,
    dropout: Option<Dropout>,
}

impl Decoder {
    /// Whether blocks `range` and the head can run on slices: on the CPU device, with packed weights, and head dimensions that
    /// its kernels have.
    ///
    /// # Errors
    /// The weights of a block cannot be read.
    pub fn runs_on_slices(&self, range: Range<usize>) -> Result<bool, ModelError> {
        let head = matches!(self.head(), Weight::Packed(_)) && self.head.as_ref().is_none_or(|h| h.bias.is_none());
        if self.device != Device::flex() || !head {
            return Ok(false);
        }
        let rope = self.rope.slice(0, 1);
        for index in range {
            let block = self.store.block(index)?;
            if block.view(self.context(index, &rope), None).is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn context<'a>(&'a self, index: usize, rope: &'a RopeSlice) -> BlockContext<'a> {
        let rope = self.config.uses_rope(index).then_some(rope);
        BlockContext { config: &self.config, index, rope, observer: None }
    }

    /// Embeddings of sequences, one after the other, `[tokens of all sequences, d]`.
    ///
    /// # Errors
    /// See [`Decoder::embed`].
    pub fn embed_slices(&self, sequences: &[&[u32]]) -> Result<Vec<f32>, ModelError> {
        let ids: Vec<u32> = sequences.iter().flat_map(|ids| ids.iter().copied()).collect();
        to_vec(self.embed(&[&ids])?)
    }

    /// The cross entropy at the exit after `exit` blocks, `weight * sum_t -log p(targets[t])`, and its gradients.
    ///
    /// # Shapes
    /// `hidden`: `[tokens, d]`; `targets`: a token id for each token.
    ///
    /// # Panics
    /// If shapes disagree, or the head [does not run on slices](Decoder::runs_on_slices).
    pub fn loss_on_slices(
        &self,
        hidden: &[f32],
        exit: usize,
        adapter: &Adapter,
        targets: &[u32],
        weight: f32,
    ) -> HeadLoss {
        let _span = tracing::trace_span!("head").entered();
        let norm = adapter.exit_norm(exit).unwrap_or(&self.final_norm);
        let Weight::Packed(head) = self.head() else { panic!("a head that is not packed") };
        head_loss(hidden, norm, self.config.rms_norm_eps, head, targets, weight)
    }

    /// How far this model's next-token distributions are from `base`'s, `weight * sum_t KL(base | this)`, behind the last
    /// blocks, and the gradients with respect to this model's hidden states and final norm.
    ///
    /// # Shapes
    /// `base_hidden`: `[tokens, d of the base]`; `hidden`: `[tokens, d]`.
    ///
    /// # Panics
    /// If shapes disagree, or a head is not packed or not on the CPU device.
    pub fn divergence_on_slices(&self, base: &Decoder, base_hidden: &[f32], hidden: &[f32], weight: f32) -> HeadLoss {
        let _span = tracing::trace_span!("head").entered();
        head_divergence(&base.head_view(base_hidden), &self.head_view(hidden), weight)
    }

    fn head_view<'a>(&'a self, hidden: &'a [f32]) -> HeadView<'a> {
        let Weight::Packed(head) = self.head() else { panic!("a head that is not packed") };
        HeadView { hidden, norm: &self.final_norm, head, eps: self.config.rms_norm_eps }
    }
}

impl<'a> SlicePass<'a> {
    /// Passes for sequences of these lengths.
    pub fn new(
        decoder: &'a Decoder,
        adapter: impl Into<Option<&'a Adapter>>,
        lengths: &'a [usize],
        scratch: &'a mut BlockScratch,
    ) -> Self {
        let rope = decoder.rope.slice(0, lengths.iter().copied().max().unwrap_or(0).max(1));
        SlicePass { decoder, adapter: adapter.into(), lengths, rope, scratch, dropout: None }
    }

    /// The same passes with dropout of the low-rank updates' inputs in recorded blocks, forward and backward.
    #[must_use]
    pub fn with_dropout(mut self, dropout: Option<Dropout>) -> Self {
        self.dropout = dropout;
        self
    }

    /// Runs blocks `range` on `x`, `[tokens of all sequences, d]`, in place, and keeps nothing.
    ///
    /// # Errors
    /// The weights of a block cannot be read.
    ///
    /// # Panics
    /// If shapes disagree, or a block [does not run on slices](Decoder::runs_on_slices).
    pub fn forward(&mut self, x: &mut [f32], range: Range<usize>) -> Result<(), ModelError> {
        for index in range {
            let span = tracing::debug_span!("block", index, bytes = self.decoder.block_bytes(index)).entered();
            self.with(index, None, |view, lengths, scratch| decoder_block_uncached(x, lengths, view, scratch))?;
            drop(span);
            activation_range(index, || Some(Cow::Borrowed(&*x)));
        }
        Ok(())
    }

    /// As [`SlicePass::forward`], and leaves a tape for each block; `keep` says for which blocks all activations stay.
    ///
    /// # Errors
    /// The weights of a block cannot be read.
    ///
    /// # Panics
    /// As [`SlicePass::forward`].
    pub fn record(
        &mut self,
        x: &mut [f32],
        range: Range<usize>,
        keep: impl Fn(usize) -> bool,
        tapes: &mut Vec<BlockTape>,
    ) -> Result<(), ModelError> {
        tapes.resize_with(range.len().max(tapes.len()), BlockTape::default);
        for (index, tape) in range.zip(tapes) {
            let span = tracing::debug_span!("block", index, bytes = self.decoder.block_bytes(index)).entered();
            self.with(index, self.dropout, |view, lengths, scratch| {
                decoder_block_recorded(x, lengths, view, keep(index), tape, scratch);
            })?;
            drop(span);
            activation_range(index, || Some(Cow::Borrowed(&*x)));
        }
        Ok(())
    }

    /// Takes `dy`, the gradient of the last block's output, back through the blocks; adds the gradients of parameters to
    /// `gradients`, one for each block of the range. The gradient of the first block's input is not computed.
    ///
    /// # Errors
    /// The weights of a block cannot be read.
    ///
    /// # Panics
    /// If shapes disagree with the recorded pass.
    pub fn backward(
        &mut self,
        dy: &mut [f32],
        range: Range<usize>,
        tapes: &mut [BlockTape],
        gradients: &mut [BlockGradients],
    ) -> Result<(), ModelError> {
        let first = range.start;
        for ((index, tape), gradients) in range.zip(tapes).zip(gradients).rev() {
            self.backward_block(dy, index, tape, index > first, gradients)?;
        }
        Ok(())
    }

    /// As [`SlicePass::backward`], through block `index` alone; `dy` becomes the gradient of its input if `input_gradient`.
    ///
    /// # Errors
    /// The weights of the block cannot be read.
    ///
    /// # Panics
    /// If shapes disagree with the recorded pass.
    pub fn backward_block(
        &mut self,
        dy: &mut [f32],
        index: usize,
        tape: &mut BlockTape,
        input_gradient: bool,
        gradients: &mut BlockGradients,
    ) -> Result<(), ModelError> {
        let _span = tracing::debug_span!("block_backward", index, bytes = self.decoder.block_bytes(index)).entered();
        self.with(index, self.dropout, |view, lengths, scratch| {
            decoder_block_backward(dy, lengths, view, tape, input_gradient, gradients, scratch);
        })
    }

    /// Calls `f` with block `index`.
    fn with<R>(
        &mut self,
        index: usize,
        dropout: Option<Dropout>,
        f: impl FnOnce(&BlockView<'_>, &[usize], &mut BlockScratch) -> R,
    ) -> Result<R, ModelError> {
        let block = self.decoder.store.block(index)?;
        let view =
            block.view(self.decoder.context(index, &self.rope), self.adapter.and_then(|adapter| adapter.block(index)));
        let mut view = view.expect("a block that runs on slices");
        let mixed = |dropout: Dropout| Dropout { seed: dropout.seed.wrapping_add((index as u64) << 32), ..dropout };
        view.dropout = dropout.map(mixed);
        Ok(f(&view, self.lengths, self.scratch))
    }
}
