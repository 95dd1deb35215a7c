//! Loss on examples that were not trained on: of every exit, and of the exits' vote.
//!
//! `loss = sum -log p(response token) / number of response tokens`, over all examples together, so that each response
//! token weighs the same. Prompts have no loss.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::log_softmax;
use edgellm_model::traits::Voter;
use rayon::prelude::*;

use crate::error::{EvalError, Result, finite};
use crate::windows::Progress;

/// Tokens of a batch, padding included, unless a single example is longer.
const BATCH_TOKENS: usize = 2048;
/// Response tokens whose loss is taken at a time: a packed head never holds their logits, an expanded one does.
const LOSS_CHUNK: usize = 512;
/// Response tokens whose logits, of every exit, are held at a time for a vote.
const CHUNK: usize = 64;

/// Loss of one exit.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ExitLoss {
    /// The exit, as the number of blocks that were run.
    pub exit: usize,
    /// Mean loss of a response token, in nats.
    pub loss: f64,
}

/// Losses on held-out examples.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct HeldOut {
    /// Of each exit, in the order given.
    pub by_exit: Vec<ExitLoss>,
    /// Of each voter, in the order given.
    pub votes: Vec<f64>,
    /// Response tokens.
    pub tokens: usize,
    /// Examples that have response tokens.
    pub examples: usize,
}

/// Token-weighted mean loss over the response tokens of `examples`, at each of `exits` and of each vote.
///
/// Examples are sorted by length and padded on the right to batches; attention is causal, so padding changes nothing.
///
/// # Errors
/// Exits that are not ascending numbers of blocks of this model, examples without any response token, an id outside
/// the vocabulary, or weights that cannot be read.
pub fn heldout_loss(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    examples: &[Example],
    progress: &mut dyn FnMut(Progress),
) -> Result<HeldOut> {
    let n = decoder.n_blocks();
    let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || exits.first().is_none_or(|e| *e == 0) || exits.last().is_some_and(|e| *e > n) {
        let expected = format!("ascending numbers of blocks from 1 to {n}");
        return Err(EvalError::Setting { what: "exits", expected, found: format!("{exits:?}") });
    }
    let usable: Vec<&Example> = examples.iter().filter(|e| targets(e).next().is_some()).collect();
    let tokens: usize = usable.iter().map(|e| targets(e).count()).sum();
    if tokens == 0 {
        return Err(EvalError::TooLittle { what: "response tokens of the examples", needed: 1, found: 0 });
    }
    let batches = batches(usable.clone());
    let mut sums = vec![0.0; exits.len()];
    let mut votes = vec![0.0; voters.len()];
    for (index, batch) in batches.iter().enumerate() {
        batch.run(decoder, adapter, exits, voters, &mut Sums { exits: &mut sums, votes: &mut votes })?;
        progress(Progress { done: index + 1, total: batches.len() });
    }
    let mean = |sum: f64| finite("the held-out loss", sum / tokens as f64);
    let by_exit = exits.iter().zip(sums).map(|(&exit, sum)| Ok(ExitLoss { exit, loss: mean(sum)? }));
    Ok(HeldOut {
        by_exit: by_exit.collect::<Result<_>>()?,
        votes: votes.into_iter().map(mean).collect::<Result<_>>()?,
        tokens,
        examples: usable.len(),
    })
}

/// Positions whose next token is a response token.
fn targets(example: &Example) -> impl Iterator<Item = usize> {
    (0..example.ids.len().saturating_sub(1)).filter(|&position| example.is_target(position + 1))
}

/// Examples of similar length, padded on the right.
struct Batch<'a> {
    examples: Vec<&'a Example>,
    /// Tokens that are fed in of each: the last token is only a target.
    tokens: usize,
}

fn batches(mut examples: Vec<&Example>) -> Vec<Batch<'_>> {
    // Longest first, so that a batch's length is that of its first; a stable sort.
    examples.sort_by_key(|e| std::cmp::Reverse(e.ids.len()));
    let mut batches: Vec<Batch<'_>> = Vec::new();
    for example in examples {
        match batches.last_mut() {
            Some(batch) if (batch.examples.len() + 1) * batch.tokens <= BATCH_TOKENS => batch.examples.push(example),
            _ => batches.push(Batch { tokens: example.ids.len() - 1, examples: vec![example] }),
        }
    }
    batches
}

/// Summed losses of the exits and of the votes.
struct Sums<'a> {
    exits: &'a mut [f64],
    votes: &'a mut [f64],
}

impl Batch<'_> {
    /// Adds the losses of this batch to `sums`.
    fn run(
        &self,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        exits: &[usize],
        voters: &[&dyn Voter],
        sums: &mut Sums<'_>,
    ) -> Result<()> {
        let rows: Vec<Vec<u32>> = self.examples.iter().map(|e| self.padded(e)).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let (positions, next) = self.response();
        let positions = Tensor::<1, Int>::from_data(positions.as_slice(), decoder.device());
        let mut x = decoder.embed(&rows)?;
        let mut start = 0;
        let mut normed = Vec::with_capacity(exits.len());
        for &exit in exits {
            x = decoder.run_blocks(x, start..exit, adapter, None)?;
            start = exit;
            let flat: Tensor<2> = x.clone().reshape([rows.len() * self.tokens, decoder.config().hidden_size]);
            normed.push(decoder.exit_norm(flat.select(0, positions.clone()), exit, adapter));
        }
        if voters.is_empty() {
            for (normed, sum) in normed.iter().zip(sums.exits.iter_mut()) {
                for (index, targets) in next.chunks(LOSS_CHUNK).enumerate() {
                    let part = normed.clone().narrow(0, index * LOSS_CHUNK, targets.len());
                    *sum += loss(decoder, part, targets)?;
                }
            }
            return Ok(());
        }
        for (index, targets) in next.chunks(CHUNK).enumerate() {
            let parts = normed.iter().map(|x| x.clone().narrow(0, index * CHUNK, targets.len())).collect();
            vote_losses(decoder, parts, targets, voters, sums)?;
        }
        Ok(())
    }

    fn padded(&self, example: &Example) -> Vec<u32> {
        let mut ids = example.ids[..example.ids.len() - 1].to_vec();
        // Any id will do: nothing to the left sees it, and it has no loss.
        ids.resize(self.tokens, 0);
        ids
    }

    /// Positions in the flattened batch whose next token is a response token, and these tokens.
    fn response(&self) -> (Vec<i32>, Vec<i32>) {
        let mut positions = Vec::new();
        let mut next = Vec::new();
        for (row, example) in self.examples.iter().enumerate() {
            for position in targets(example) {
                positions.push((row * self.tokens + position) as i32);
                next.push(example.ids[position + 1] as i32);
            }
        }
        (positions, next)
    }
}

fn loss(decoder: &Decoder, normed: Tensor<2>, targets: &[i32]) -> Result<f64> {
    let device = normed.device();
    let weights = Tensor::<1>::ones([targets.len()], &device);
    let loss = decoder.loss(normed, Tensor::<1, Int>::from_data(targets, &device), weights);
    Ok(to_vec(loss)?.into_iter().map(f64::from).sum())
}

/// Adds the summed losses of every exit and every vote, from the same logits.
fn vote_losses(
    decoder: &Decoder,
    parts: Vec<Tensor<2>>,
    targets: &[i32],
    voters: &[&dyn Voter],
    sums: &mut Sums<'_>,
) -> Result<()> {
    let vocab = decoder.config().vocab_size;
    let mut exits = Vec::with_capacity(parts.len());
    for (part, sum) in parts.into_iter().zip(sums.exits.iter_mut()) {
        let mut rows = to_vec(decoder.logits(part))?;
        rows.par_chunks_mut(vocab).for_each(log_softmax);
        *sum -= targets.iter().zip(rows.chunks(vocab)).map(|(&t, row)| f64::from(row[t as usize])).sum::<f64>();
        exits.push(rows);
    }
    // Each token's votes on their own thread; summed in order, so that the result does not depend on the threads.
    let of_tokens: Vec<Vec<f32>> = targets
        .par_iter()
        .enumerate()
        .map_init(
            || vec![0.0; vocab],
            |voted, (token, &target)| {
                let row = token * vocab..(token + 1) * vocab;
                let views: Vec<&[f32]> = exits.iter().map(|rows| &rows[row.clone()]).collect();
                let log_prob = |voter: &&dyn Voter| {
                    voter.vote(&views, voted);
                    voted[target as usize]
                };
                voters.iter().map(log_prob).collect()
            },
        )
        .collect();
    for log_probs in of_tokens {
        for (sum, log_prob) in sums.votes.iter_mut().zip(log_probs) {
            *sum -= f64::from(log_prob);
        }
    }
    Ok(())
}
