//! Losses of response tokens at every exit and of every vote, token by token, from the exits' normed states.

use burn::tensor::{Int, Tensor};
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::log_softmax;
use edgellm_model::traits::Voter;
use rayon::prelude::*;

use crate::error::{EvalError, Result};

/// Response tokens whose loss is taken at a time: a packed head never holds their logits, an expanded one does.
const LOSS_CHUNK: usize = 512;
/// Response tokens whose logits, of every exit, are held at a time for a vote that is no pool.
const CHUNK: usize = 64;

/// Checks that exits are ascending numbers of blocks.
pub(crate) fn check_exits(exits: &[usize], n_blocks: usize) -> Result<()> {
    let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascending || exits.first().is_none_or(|e| *e == 0) || exits.last().is_some_and(|e| *e > n_blocks) {
        let expected = format!("ascending numbers of blocks from 1 to {n_blocks}");
        return Err(EvalError::Setting { what: "exits", expected, found: format!("{exits:?}") });
    }
    Ok(())
}

/// Summed losses at the exits and by the votes, in nats: a list of items (examples, options) for each.
#[derive(Clone, Debug)]
pub(crate) struct Losses {
    pub(crate) exits: Vec<Vec<f64>>,
    pub(crate) votes: Vec<Vec<f64>>,
}

impl Losses {
    pub(crate) fn none(exits: usize, voters: usize) -> Self {
        Self { exits: vec![Vec::new(); exits], votes: vec![Vec::new(); voters] }
    }

    /// Appends the losses of items with so many of the `targets` each, given the exits' normed states, `[tokens, d]`.
    ///
    /// A log-linear pool costs one head product, like an exit. Any other vote looks at all exits' distributions, which
    /// costs one for each exit. With 8-bit activations the two ways round differently (of the target's logit, by some
    /// 0.001 nats), so exits and pools go the same way.
    pub(crate) fn add(
        &mut self,
        decoder: &Decoder,
        normed: &[Tensor<2>],
        (targets, lengths): (&[i32], &[usize]),
        voters: &[&dyn Voter],
    ) -> Result<()> {
        debug_assert_eq!(lengths.iter().sum::<usize>(), targets.len());
        for (normed, losses) in normed.iter().zip(&mut self.exits) {
            losses.extend(pool_loss(decoder, std::slice::from_ref(normed), &[1.0], (targets, lengths))?);
        }
        let mut others = Vec::new();
        for (index, &voter) in voters.iter().enumerate() {
            match voter.pool(normed.len()) {
                Some(weights) => self.votes[index].extend(pool_loss(decoder, normed, &weights, (targets, lengths))?),
                None => others.push((index, voter)),
            }
        }
        if others.is_empty() { Ok(()) } else { self.add_distributions(decoder, normed, (targets, lengths), &others) }
    }

    /// Appends the losses of these votes, which look at whole distributions.
    fn add_distributions(
        &mut self,
        decoder: &Decoder,
        normed: &[Tensor<2>],
        (targets, lengths): (&[i32], &[usize]),
        voters: &[(usize, &dyn Voter)],
    ) -> Result<()> {
        let vocab = decoder.config().vocab_size;
        let mut losses = vec![Vec::with_capacity(targets.len()); voters.len()];
        for (index, targets) in targets.chunks(CHUNK).enumerate() {
            let mut exits = Vec::with_capacity(normed.len());
            for normed in normed {
                let part = normed.clone().narrow(0, index * CHUNK, targets.len());
                let mut rows = to_vec(decoder.logits(part))?;
                rows.par_chunks_mut(vocab).for_each(log_softmax);
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
                        let log_prob = |(_, voter): &(usize, &dyn Voter)| {
                            voter.vote(&views, voted);
                            voted[target as usize]
                        };
                        voters.iter().map(log_prob).collect()
                    },
                )
                .collect();
            for log_probs in of_tokens {
                for (losses, log_prob) in losses.iter_mut().zip(log_probs) {
                    losses.push(-f64::from(log_prob));
                }
            }
        }
        for ((vote, _), losses) in voters.iter().zip(losses) {
            let mut losses = losses.into_iter();
            self.votes[*vote].extend(lengths.iter().map(|&length| losses.by_ref().take(length).sum::<f64>()));
        }
        Ok(())
    }
}

/// The summed losses of a pool, item by item; of a long item a chunk of the tokens at a time.
fn pool_loss(
    decoder: &Decoder,
    normed: &[Tensor<2>],
    weights: &[f32],
    (targets, lengths): (&[i32], &[usize]),
) -> Result<Vec<f64>> {
    let mut start = 0;
    let mut losses = Vec::with_capacity(lengths.len());
    for &length in lengths {
        let mut sum = 0.0;
        for targets in targets[start..start + length].chunks(LOSS_CHUNK) {
            let parts: Vec<Tensor<2>> = normed.iter().map(|x| x.clone().narrow(0, start, targets.len())).collect();
            start += targets.len();
            let targets = Tensor::<1, Int>::from_data(targets, &parts[0].device());
            sum += to_vec(decoder.pooled_loss(&parts, weights, targets))?.into_iter().map(f64::from).sum::<f64>();
        }
        losses.push(sum);
    }
    Ok(losses)
}
