//! The step on the CPU: blocks on slices, gradients by hand, sequences of their own lengths without padding.

use std::time::Instant;

use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::{BlockScratch, BlockTape, Decoder, SlicePass};

use super::{Engine, Gradients, Place, StageSeconds};
use crate::{Keep, TuneError};

/// Buffers and choices of the CPU's step.
pub(crate) struct Slices {
    keep: Keep,
    scratch: BlockScratch,
    tapes: Vec<BlockTape>,
    seconds: StageSeconds,
}

impl Slices {
    pub(crate) fn new(keep: Keep) -> Self {
        Self { keep, scratch: BlockScratch::default(), tapes: Vec::new(), seconds: StageSeconds::default() }
    }
}

impl Engine for Slices {
    fn accumulate(
        &mut self,
        decoder: &Decoder,
        adapter: &Adapter,
        examples: &[Example],
        place: &Place,
        weight: f32,
        gradients: &mut Gradients,
    ) -> Result<f64, TuneError> {
        let start = Instant::now();
        let span = tracing::debug_span!("forward").entered();
        let sequences: Vec<&[u32]> = examples.iter().map(|e| &e.ids[..e.ids.len().saturating_sub(1)]).collect();
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        let mut hidden = decoder.embed_slices(&sequences)?;
        let window = place.window.clone();
        let mut pass = SlicePass::new(decoder, adapter, &lengths, &mut self.scratch).with_dropout(place.dropout);
        pass.forward(&mut hidden, 0..window.start)?;
        let prefix = Instant::now();
        let kept = window.end - self.keep.blocks().min(window.len());
        pass.record(&mut hidden, window.clone(), |index| index >= kept, &mut self.tapes)?;
        let forward = Instant::now();

        let d = decoder.config().hidden_size;
        let (positions, targets) = targets(examples);
        let picked: Vec<f32> = positions.iter().flat_map(|&p| hidden[p * d..(p + 1) * d].iter().copied()).collect();
        let head = decoder.loss_on_slices(&picked, place.exit, adapter, &targets, weight);
        // The hidden states are not needed any more: their place is the gradient's.
        let mut dy = hidden;
        dy.fill(0.0);
        for (position, gradient) in positions.into_iter().zip(head.d_hidden.chunks_exact(d)) {
            dy[position * d..(position + 1) * d].copy_from_slice(gradient);
        }
        gradients.norm.iter_mut().zip(&head.d_norm).for_each(|(sum, value)| *sum += value);
        let scored = Instant::now();
        drop(span);
        let _span = tracing::debug_span!("backward").entered();
        pass.backward(&mut dy, window, &mut self.tapes, &mut gradients.blocks)?;
        let s = &mut self.seconds;
        s.prefix += (prefix - start).as_secs_f64();
        s.window += (forward - prefix).as_secs_f64();
        s.head += (scored - forward).as_secs_f64();
        s.backward += scored.elapsed().as_secs_f64();
        Ok(head.loss)
    }

    fn take_seconds(&mut self) -> StageSeconds {
        std::mem::take(&mut self.seconds)
    }

    fn bytes(&self) -> usize {
        self.tapes.iter().map(BlockTape::bytes).sum::<usize>() + self.scratch.bytes()
    }
}

/// The positions, in the concatenated sequences, whose next token is a response token, and these tokens.
fn targets(examples: &[Example]) -> (Vec<usize>, Vec<u32>) {
    let (mut positions, mut targets, mut first) = (Vec::new(), Vec::new(), 0);
    for example in examples {
        let fed = example.ids.len().saturating_sub(1);
        for position in (0..fed).filter(|position| example.is_target(position + 1)) {
            positions.push(first + position);
            targets.push(example.ids[position + 1]);
        }
        first += fed;
    }
    (positions, targets)
}
