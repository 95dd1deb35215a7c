//! How far the confidence of exits and votes is from how often they are right: the expected calibration error
//! (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2).
//!
//! `ECE = sum_bins (n_bin / n) |accuracy(bin) - confidence(bin)|` over 15 bins of equal width. The confidence is the
//! probability of the likeliest token; it is right if that token is the one in the text. Over response tokens.

use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::{argmax, log_softmax};
use edgellm_model::traits::Voter;
use rayon::prelude::*;
use serde::Serialize;

use crate::error::{EvalError, Result};
use crate::heldout::{batches, targets};
use crate::votes::check_exits;
use crate::windows::Progress;

/// Bins of the confidence, of equal width.
pub const BINS: usize = 15;
/// Response tokens whose distributions, of every exit, are held at a time.
const CHUNK: usize = 64;

/// Tokens of one range of confidences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bin {
    /// Tokens.
    pub tokens: usize,
    /// Those that were right.
    pub right: usize,
    /// Sum of the confidences.
    pub confidence: f64,
}

/// A reliability diagram.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reliability {
    /// The bins, from no confidence to all.
    pub bins: [Bin; BINS],
}

impl Reliability {
    /// Adds a token.
    pub fn add(&mut self, confidence: f64, right: bool) {
        let index = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        let bin = &mut self.bins[index];
        bin.tokens += 1;
        bin.right += usize::from(right);
        bin.confidence += confidence;
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.bins.iter().map(|bin| bin.tokens).sum()
    }

    /// The expected calibration error, from 0 to 1; 0 without tokens.
    pub fn error(&self) -> f64 {
        let gap: f64 = self.bins.iter().map(|bin| (bin.right as f64 - bin.confidence).abs()).sum();
        gap / self.tokens().max(1) as f64
    }
}

/// The reliability of each of `exits`, then of each voter, on the response tokens of `examples`.
///
/// # Errors
/// As [`heldout_loss`](crate::heldout_loss).
pub fn reliability(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    examples: &[Example],
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Reliability>> {
    check_exits(exits, decoder.n_blocks())?;
    let usable: Vec<&Example> = examples.iter().filter(|e| targets(e).next().is_some()).collect();
    if usable.is_empty() {
        return Err(EvalError::TooLittle { what: "response tokens of the examples", needed: 1, found: 0 });
    }
    let vocab = decoder.config().vocab_size;
    let mut found = vec![Reliability::default(); exits.len() + voters.len()];
    let batches = batches(&usable);
    for (index, batch) in batches.iter().enumerate() {
        let (normed, next) = batch.states(decoder, adapter, exits)?;
        for (part, next) in next.chunks(CHUNK).enumerate() {
            let mut rows = Vec::with_capacity(exits.len());
            for normed in &normed {
                let mut logits = to_vec(decoder.logits(normed.clone().narrow(0, part * CHUNK, next.len())))?;
                logits.par_chunks_mut(vocab).for_each(log_softmax);
                rows.push(logits);
            }
            let of_token = |(token, &target): (usize, &i32)| -> Vec<(f64, bool)> {
                let views: Vec<&[f32]> = rows.iter().map(|rows| &rows[token * vocab..(token + 1) * vocab]).collect();
                let judge = |row: &[f32]| {
                    let likeliest = argmax(row) as usize;
                    (f64::from(row[likeliest]).exp(), likeliest == target as usize)
                };
                let mut judged: Vec<_> = views.iter().map(|row| judge(row)).collect();
                let mut voted = vec![0.0; vocab];
                for voter in voters {
                    voter.vote(&views, &mut voted);
                    judged.push(judge(&voted));
                }
                judged
            };
            let judged: Vec<Vec<(f64, bool)>> = next.par_iter().enumerate().map(of_token).collect();
            for token in judged {
                for (found, (confidence, right)) in found.iter_mut().zip(token) {
                    found.add(confidence, right);
                }
            }
        }
        progress(Progress { done: index + 1, total: batches.len() });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_few_tokens_by_hand() {
        let mut found = Reliability::default();
        // Two at 0.9, one right: |1 - 1.8| = 0.8; one at 0.5 and right: 0.5; one at 0.1 and wrong: 0.1.
        for (confidence, right) in [(0.9, true), (0.9, false), (0.5, true), (0.1, false)] {
            found.add(confidence, right);
        }
        assert_eq!(found.tokens(), 4);
        assert!((found.error() - (0.8 + 0.5 + 0.1) / 4.0).abs() < 1e-12);
        // The ends fall into the first and the last bin.
        found.add(0.0, false);
        found.add(1.0, true);
        assert_eq!((found.bins[0].tokens, found.bins[BINS - 1].tokens), (1, 1));
        assert_eq!(Reliability::default().error(), 0.0);
    }
}
