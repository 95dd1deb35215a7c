//! Compressing a model's matrices in the order in which it runs them, each on the inputs that the compressed part before
//! it gives: errors are seen, and made up for, where they arise (as in GPTQ, arXiv 2210.17323, section 4).

use edgellm_kernels::PackedHost;
use edgellm_model::decoder::{Decoder, Weight};
use edgellm_model::traits::Compressor;
use edgellm_model::values::{CompressionPolicy, Projection, Unit};

use super::format_of;
use crate::calibrate::{DAMPING, Site, States, TIED_DAMPING};
use crate::error::Result;
use crate::measure::flat_moments;
use crate::weights::{DenseBlock, HostWeight, tensor};

/// A model on its way to being compressed.
pub(super) struct Sequence<'a> {
    decoder: &'a Decoder,
    policy: &'a CompressionPolicy,
    compressor: &'a dyn Compressor,
    /// Calibration text at the next block, if the compressor looks at inputs.
    states: Option<States>,
    /// The next block.
    next: usize,
}

impl<'a> Sequence<'a> {
    /// A sequence of `decoder`'s matrices, with the embedding compressed.
    ///
    /// # Errors
    /// The compressor needs calibration windows and there are none; the compressor refuses.
    pub(super) fn start(
        decoder: &'a Decoder,
        policy: &'a CompressionPolicy,
        compressor: &'a dyn Compressor,
        calibration: &[Vec<u32>],
    ) -> Result<(Self, PackedHost)> {
        let format = format_of(policy, Unit::Embedding, super::EMBEDDING)?;
        let embedding = HostWeight::new(decoder.embedding())?;
        let [rows, cols] = embedding.shape();
        let values = embedding.values()?;
        let mut sequence = Self { decoder, policy, compressor, states: None, next: 0 };
        if !compressor.needs_inputs() {
            return Ok((sequence, compressor.compress(&values, rows, cols, &format, None)?));
        }
        // The head sees fewer columns than most matrices: some windows tell enough of them.
        let some: Vec<Vec<u32>> = calibration.iter().step_by(4).cloned().collect();
        let mut last = States::embed(decoder, &some)?;
        for index in 0..decoder.n_blocks() {
            last = last.run(decoder, &DenseBlock::new(&decoder.store().block(index)?, decoder.device())?.block, index);
        }
        // An embedding alone is looked up: all its columns weigh the same.
        let inputs =
            if decoder.is_head_tied() { last.observe_head(decoder, TIED_DAMPING)? } else { flat_moments(cols)? };
        let packed = compressor.compress(&values, rows, cols, &format, Some(&inputs))?;
        let compressed = decoder.clone().with_embedding(Weight::Packed(packed.clone().to_device(decoder.device())));
        sequence.states = Some(States::embed(&compressed, calibration)?);
        Ok((sequence, packed))
    }

    /// The next block's matrices, in the order of [`Projection::ALL`].
    pub(super) fn block(&mut self) -> Result<Vec<PackedHost>> {
        let index = self.next;
        self.next += 1;
        let _span = tracing::debug_span!("compress_block", index).entered();
        let (decoder, device) = (self.decoder, self.decoder.device());
        let mut block = DenseBlock::new(&decoder.store().block(index)?, device)?;
        let mut packed: [Option<PackedHost>; 7] = Default::default();
        // Inputs within the block are those of its uncompressed matrices: a pass a block instead of four.
        let inputs = match &self.states {
            Some(states) => states.observe(decoder, &block.block, index, &Site::ALL)?.1,
            None => Vec::new(),
        };
        for projection in Projection::ALL {
            let format = format_of(self.policy, Unit::Linear(index, projection), &projection.weight_name(index))?;
            let linear = block.block.linear_mut(projection);
            let [rows, cols] = linear.weight.shape();
            let values = &block.values[projection as usize];
            let inputs = inputs.get(Site::of(projection) as usize);
            let matrix = self.compressor.compress(values, rows, cols, &format, inputs)?;
            linear.weight = Weight::Dense(tensor(matrix.dequantize(), [rows, cols], device));
            packed[projection as usize] = Some(matrix);
        }
        self.states = self.states.take().map(|states| states.run(decoder, &block.block, index));
        Ok(packed.into_iter().map(|matrix| matrix.expect("all projections were compressed")).collect())
    }

    /// The untied head, after the last block.
    pub(super) fn head(&self, weight: &Weight) -> Result<PackedHost> {
        let host = HostWeight::new(weight)?;
        let [rows, cols] = host.shape();
        let format = format_of(self.policy, Unit::Head, super::HEAD)?;
        let inputs = match &self.states {
            Some(states) => Some(states.observe_head(self.decoder, DAMPING)?),
            None => None,
        };
        Ok(self.compressor.compress(&host.values()?, rows, cols, &format, inputs.as_ref())?)
    }
}

/// Names of a block's matrices, in the order of [`Projection::ALL`].
pub(super) fn names(index: usize) -> impl Iterator<Item = String> {
    Projection::ALL.into_iter().map(move |p| p.weight_name(index))
}
