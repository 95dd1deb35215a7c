//! What a model says on the compared tokens, and how far two models are apart there.

use edgellm_kernels::log_softmax_row;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use rayon::prelude::*;

use crate::calibrate::States;
use crate::error::Result;

/// Tokens whose logits are computed at a time.
const CHUNK: usize = 128;

/// Log-probabilities of the vocabulary at the counted tokens: those of the second half of every window.
pub(crate) struct Outputs {
    log_p: Vec<f32>,
    vocabulary: usize,
}

impl Outputs {
    /// The outputs of the final norm and the head on the states behind the last block.
    pub(crate) fn of(decoder: &Decoder, last: States) -> Result<Self> {
        let vocabulary = decoder.config().vocab_size;
        let mut log_p = Vec::new();
        for x in last.second_halves() {
            let normed = decoder.exit_norm(x, decoder.n_blocks(), None);
            let tokens = normed.dims()[0];
            for start in (0..tokens).step_by(CHUNK) {
                let rows = normed.clone().narrow(0, start, CHUNK.min(tokens - start));
                let mut logits = to_vec(decoder.logits(rows))?;
                logits.par_chunks_mut(vocabulary).for_each(log_softmax_row);
                log_p.append(&mut logits);
            }
        }
        Ok(Self { log_p, vocabulary })
    }

    /// The mean of `KL(self || other)` over the counted tokens, in nats.
    pub(crate) fn divergence(&self, other: &Self) -> f64 {
        let of_token = |(p, q): (&[f32], &[f32])| -> f64 {
            let term = |(p, q): (&f32, &f32)| {
                let weight = p.exp();
                // What the base finds impossible adds nothing, whatever the other says.
                if weight > 0.0 { f64::from(weight * (p - q)) } else { 0.0 }
            };
            p.iter().zip(q).map(term).sum()
        };
        let pairs = self.log_p.par_chunks(self.vocabulary).zip(other.log_p.par_chunks(self.vocabulary));
        let tokens: Vec<f64> = pairs.map(of_token).collect();
        tokens.iter().sum::<f64>() / tokens.len() as f64
    }
}
