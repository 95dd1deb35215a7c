//! How far the confidence of exits and votes is from how often they are right: the expected calibration error
//! (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2).
//!
//! `ECE = sum_bins (n_bin / n) |accuracy(bin) - confidence(bin)|` over 15 bins of equal width. The confidence is the
//! probability of the likeliest token; it is right if that token is the one in the text. Over response tokens.
//!
//! The interval draws examples anew. Binning makes the error of few tokens too large, and that of draws a little larger still:
//! below some thousand tokens compare errors, do not take them at their value.

use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::{argmax, log_softmax};
use edgellm_model::traits::Voter;
use rayon::prelude::*;
use serde::Serialize;

use crate::bootstrap::interval_of;
use crate::error::{EvalError, Result};
use crate::heldout::{Batch, batches, targets};
use crate::items::Steps;
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
    /// Those of every example alone.
    #[serde(skip)]
    examples: Vec<[Bin; BINS]>,
}

impl Reliability {
    /// Begins an example: the tokens that follow are its.
    pub fn begin_example(&mut self) {
        self.examples.push([Bin::default(); BINS]);
    }

    /// Adds a token.
    pub fn add(&mut self, confidence: f64, right: bool) {
        let index = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        let token = Bin { tokens: 1, right: usize::from(right), confidence };
        self.bins[index].add(&token);
        if let Some(example) = self.examples.last_mut() {
            example[index].add(&token);
        }
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.bins.iter().map(|bin| bin.tokens).sum()
    }

    /// The expected calibration error, from 0 to 1; 0 without tokens.
    pub fn error(&self) -> f64 {
        error(&self.bins)
    }

    /// The examples that were [begun](Self::begin_example).
    pub fn n_examples(&self) -> usize {
        self.examples.len()
    }

    /// The 95% interval of the [error](Self::error), by the bootstrap over examples; `None` for fewer than two of them.
    pub fn interval(&self, seed: u64) -> Option<(f64, f64)> {
        interval_of(self.examples.len(), seed, |indices| {
            let mut bins = [Bin::default(); BINS];
            for index in indices {
                bins.iter_mut().zip(&self.examples[index]).for_each(|(sum, bin)| sum.add(bin));
            }
            error(&bins)
        })
    }
}

impl Bin {
    fn add(&mut self, other: &Bin) {
        self.tokens += other.tokens;
        self.right += other.right;
        self.confidence += other.confidence;
    }
}

fn error(bins: &[Bin; BINS]) -> f64 {
    let gap: f64 = bins.iter().map(|bin| (bin.right as f64 - bin.confidence).abs()).sum();
    gap / bins.iter().map(|bin| bin.tokens).sum::<usize>().max(1) as f64
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
    reliability_in_steps(decoder, adapter, exits, voters, examples, &mut Steps::new(progress))
}

/// As [`reliability`], in steps that may be kept; an item is a batch of examples.
///
/// # Errors
/// As [`reliability`], or those of a file of items.
pub fn reliability_in_steps(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    examples: &[Example],
    steps: &mut Steps<'_>,
) -> Result<Vec<Reliability>> {
    check_exits(exits, decoder.n_blocks())?;
    let usable: Vec<&Example> = examples.iter().filter(|e| targets(e).next().is_some()).collect();
    if usable.is_empty() {
        return Err(EvalError::TooLittle { what: "response tokens of the examples", needed: 1, found: 0 });
    }
    let mut found = vec![Reliability::default(); exits.len() + voters.len()];
    let batches = batches(&usable);
    for (index, batch) in batches.iter().enumerate() {
        let lengths: Vec<usize> = batch.places.iter().map(|&place| targets(usable[place]).count()).collect();
        let count = found.len() * lengths.iter().sum::<usize>();
        let judged = steps.item("calibration", index, count, || judged(decoder, adapter, exits, voters, batch))?;
        let mut tokens = judged.chunks(found.len());
        for length in lengths {
            found.iter_mut().for_each(Reliability::begin_example);
            for token in tokens.by_ref().take(length) {
                found.iter_mut().zip(token).for_each(|(found, of)| found.add(of.abs(), of.is_sign_positive()));
            }
        }
        steps.done(index + 1, batches.len());
    }
    Ok(found)
}

/// The confidences of every exit and voter in each response token of a batch, token by token; below 0 where it was wrong.
fn judged(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    batch: &Batch<'_>,
) -> Result<Vec<f64>> {
    let vocab = decoder.config().vocab_size;
    let (normed, next) = batch.states(decoder, adapter, exits)?;
    let mut all = Vec::new();
    for (part, next) in next.chunks(CHUNK).enumerate() {
        let mut rows = Vec::with_capacity(exits.len());
        for normed in &normed {
            let mut logits = to_vec(decoder.logits(normed.clone().narrow(0, part * CHUNK, next.len())))?;
            logits.par_chunks_mut(vocab).for_each(log_softmax);
            rows.push(logits);
        }
        let of_token = |(token, &target): (usize, &i32)| -> Vec<f64> {
            let views: Vec<&[f32]> = rows.iter().map(|rows| &rows[token * vocab..(token + 1) * vocab]).collect();
            let judge = |row: &[f32]| {
                let likeliest = argmax(row) as usize;
                let confidence = f64::from(row[likeliest]).exp();
                if likeliest == target as usize { confidence } else { -confidence }
            };
            let mut judged: Vec<f64> = views.iter().map(|row| judge(row)).collect();
            let mut voted = vec![0.0; vocab];
            for voter in voters {
                voter.vote(&views, &mut voted);
                judged.push(judge(&voted));
            }
            judged
        };
        let judged: Vec<Vec<f64>> = next.par_iter().enumerate().map(of_token).collect();
        all.extend(judged.into_iter().flatten());
    }
    Ok(all)
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

    #[test]
    fn the_interval_comes_from_the_examples() {
        let mut found = Reliability::default();
        for example in 0..40 {
            found.begin_example();
            // A confidence of 0.8, and right in 6 of 10, in a quarter of the examples in 8.
            for token in 0..10 {
                found.add(0.8, token < if example % 4 == 0 { 8 } else { 6 });
            }
        }
        assert!((found.error() - 0.15).abs() < 1e-12);
        let (low, high) = found.interval(0).unwrap();
        // The deviation of the mean of 40 values of 0.2 (30) and 0 (10).
        let half = 1.96 * 0.2 * (0.75f64 * 0.25 / 40.0).sqrt();
        assert!((low - (0.15 - half)).abs() < 0.2 * half && (high - (0.15 + half)).abs() < 0.2 * half, "{low} {high}");
        assert_eq!((found.n_examples(), Reliability::default().interval(0)), (40, None));
    }
}
