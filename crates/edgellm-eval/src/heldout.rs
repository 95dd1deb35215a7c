//! Loss on examples that were not trained on: of every exit, and of the exits' vote.
//!
//! `loss = sum -log p(response token) / number of response tokens`, over all examples together, so that each response
//! token weighs the same. Prompts have no loss.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::traits::Voter;

use crate::bootstrap::{Item, ratio};
use crate::error::{EvalError, Result, finite};
use crate::items::Steps;
use crate::votes::{Losses, check_exits};
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
    /// Summed loss and response tokens of each such example in the order given: of each exit, then of each voter.
    #[serde(skip)]
    pub items: Vec<Vec<Item>>,
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
    heldout_loss_in_steps(decoder, adapter, exits, voters, examples, &mut Steps::new(progress))
}

/// As [`heldout_loss`], in steps that may be kept; an item is a batch of examples.
///
/// # Errors
/// As [`heldout_loss`], or those of a file of items.
pub fn heldout_loss_in_steps(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    examples: &[Example],
    steps: &mut Steps<'_>,
) -> Result<HeldOut> {
    check_exits(exits, decoder.n_blocks())?;
    let usable: Vec<&Example> = examples.iter().filter(|e| targets(e).next().is_some()).collect();
    let tokens: usize = usable.iter().map(|e| targets(e).count()).sum();
    if tokens == 0 {
        return Err(EvalError::TooLittle { what: "response tokens of the examples", needed: 1, found: 0 });
    }
    let batches = batches(&usable);
    let mut items = vec![vec![Item { sum: 0.0, weight: 0.0 }; usable.len()]; exits.len() + voters.len()];
    for (index, batch) in batches.iter().enumerate() {
        let lengths: Vec<usize> = batch.places.iter().map(|&place| targets(usable[place]).count()).collect();
        let sums = steps.item("held-out loss", index, items.len() * lengths.len(), || {
            let mut losses = Losses::none(exits.len(), voters.len());
            let (normed, next) = batch.states(decoder, adapter, exits)?;
            losses.add(decoder, &normed, (&next, &lengths), voters)?;
            Ok(losses.exits.into_iter().chain(losses.votes).flatten().collect())
        })?;
        for (items, sums) in items.iter_mut().zip(sums.chunks(lengths.len())) {
            for ((&place, &length), &sum) in batch.places.iter().zip(&lengths).zip(sums) {
                items[place] = Item { sum, weight: length as f64 };
            }
        }
        steps.done(index + 1, batches.len());
    }
    let mean = |items: &Vec<Item>| finite("the held-out loss", ratio(items));
    let by_exit = exits.iter().zip(&items).map(|(&exit, items)| Ok(ExitLoss { exit, loss: mean(items)? }));
    Ok(HeldOut {
        by_exit: by_exit.collect::<Result<_>>()?,
        votes: items[exits.len()..].iter().map(mean).collect::<Result<_>>()?,
        tokens,
        examples: usable.len(),
        items,
    })
}

/// Positions whose next token is a response token.
pub(crate) fn targets(example: &Example) -> impl Iterator<Item = usize> {
    (0..example.ids.len().saturating_sub(1)).filter(|&position| example.is_target(position + 1))
}

/// Examples of similar length, padded on the right.
pub(crate) struct Batch<'a> {
    examples: Vec<&'a Example>,
    /// Where they are in the list that the batches were made from.
    pub(crate) places: Vec<usize>,
    /// Tokens that are fed in of each: the last token is only a target.
    tokens: usize,
}

/// Batches of examples that have response tokens.
pub(crate) fn batches<'a>(examples: &[&'a Example]) -> Vec<Batch<'a>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    // Longest first, so that a batch's length is that of its first; a stable sort.
    order.sort_by_key(|&place| std::cmp::Reverse(examples[place].ids.len()));
    let mut batches: Vec<Batch<'_>> = Vec::new();
    for place in order {
        let example = examples[place];
        match batches.last_mut() {
            Some(batch) if (batch.examples.len() + 1) * batch.tokens <= BATCH_TOKENS => {
                batch.examples.push(example);
                batch.places.push(place);
            }
            _ => batches.push(Batch { tokens: example.ids.len() - 1, examples: vec![example], places: vec![place] }),
        }
    }
    batches
}

impl Batch<'_> {
    /// The normed states of the exits where the next token is a response token, and these tokens, example by example.
    pub(crate) fn states(
        &self,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        exits: &[usize],
    ) -> Result<(Vec<Tensor<2>>, Vec<i32>)> {
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
        Ok((normed, next))
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
