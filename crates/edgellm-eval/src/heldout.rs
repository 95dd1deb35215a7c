//! Loss on examples that were not trained on: of every exit, and of the exits' vote.
//!
//! `loss = sum -log p(response token) / number of response tokens`, over all examples together, so that each response
//! token weighs the same. Prompts have no loss.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::traits::Voter;

use crate::error::{EvalError, Result, finite};
use crate::votes::{Sums, check_exits};
use crate::windows::Progress;

/// Tokens of a batch, padding included, unless a single example is longer.
const BATCH_TOKENS: usize = 2048;

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
    check_exits(exits, decoder.n_blocks())?;
    let usable: Vec<&Example> = examples.iter().filter(|e| targets(e).next().is_some()).collect();
    let tokens: usize = usable.iter().map(|e| targets(e).count()).sum();
    if tokens == 0 {
        return Err(EvalError::TooLittle { what: "response tokens of the examples", needed: 1, found: 0 });
    }
    let batches = batches(usable.clone());
    let mut sums = Sums::zero(exits.len(), voters.len());
    for (index, batch) in batches.iter().enumerate() {
        batch.run(decoder, adapter, exits, voters, &mut sums)?;
        progress(Progress { done: index + 1, total: batches.len() });
    }
    let mean = |sum: f64| finite("the held-out loss", sum / tokens as f64);
    let by_exit = exits.iter().zip(sums.exits).map(|(&exit, sum)| Ok(ExitLoss { exit, loss: mean(sum)? }));
    Ok(HeldOut {
        by_exit: by_exit.collect::<Result<_>>()?,
        votes: sums.votes.into_iter().map(mean).collect::<Result<_>>()?,
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

impl Batch<'_> {
    /// Adds the losses of this batch to `sums`.
    fn run(
        &self,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        exits: &[usize],
        voters: &[&dyn Voter],
        sums: &mut Sums,
    ) -> Result<()> {
        let tokens = self.examples.len() * self.tokens;
        let _span = tracing::debug_span!("evaluate", tokens).entered();
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
        sums.add(decoder, &normed, &next, voters)
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
