//! How far a model is from its base: the Kullback-Leibler divergence of its next-token distributions, and how often
//! both would say the same token.
//!
//! `KL(p || q) = sum_v p(v) (log p(v) - log q(v))` with `p` the base model, averaged over tokens; in nats. Both models see
//! the same windows, cut as for the [perplexity](crate::perplexity()).

use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::sample::argmax;
use rayon::prelude::*;

use crate::bootstrap::{Item, ratio};
use crate::error::{EvalError, Result, finite};
use crate::items::Steps;
use crate::windows::{Progress, hidden, windows};

/// Tokens whose logits are held at a time, of both models.
const CHUNK: usize = 64;

/// Distance of a model from its base.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Divergence {
    /// Mean KL divergence over all targets, in nats per token.
    pub kl: f64,
    /// Mean KL divergence over the second half of every window.
    pub second_half_kl: f64,
    /// Share of targets for which both models have the same most likely token.
    pub top1_agreement: f64,
    /// Targets in all.
    pub tokens: usize,
    /// Windows that were run.
    pub windows: usize,
    /// Of each window: its summed KL divergence over all targets, the same over its second half, and the targets that both
    /// models agree on.
    #[serde(skip)]
    pub items: [Vec<Item>; 3],
}

/// Divergence of `other` (with `adapter`, if any) from `base` on `ids`, in windows of `context` tokens, at most
/// `limit` of them.
///
/// Logits are taken in chunks of tokens, never of a whole window; sums are f64.
///
/// # Errors
/// Vocabularies of different sizes, a context below 3, less than one window of text, an id outside the vocabulary, or
/// weights that cannot be read.
pub fn kl_divergence(
    base: &Decoder,
    other: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Divergence> {
    adapted_kl_divergence((base, None), (other, adapter), ids, context, limit, progress)
}

/// A model with the adapter beside it, if any.
pub type Adapted<'a> = (&'a Decoder, Option<&'a Adapter>);

/// As [`kl_divergence`], where the base has an adapter too: what merging an adapter costs is the divergence of the merged
/// model from its base with the adapter beside it.
///
/// # Errors
/// As [`kl_divergence`].
pub fn adapted_kl_divergence(
    (base, base_adapter): Adapted<'_>,
    (other, adapter): Adapted<'_>,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Divergence> {
    let steps = &mut Steps::new(progress);
    divergence_in_steps((base, base_adapter), (other, adapter), ids, context, limit, steps)
}

/// As [`adapted_kl_divergence`], in steps that may be kept; an item is a window.
///
/// # Errors
/// As [`kl_divergence`], or those of a file of items.
pub fn divergence_in_steps(
    (base, base_adapter): Adapted<'_>,
    (other, adapter): Adapted<'_>,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    steps: &mut Steps<'_>,
) -> Result<Divergence> {
    let (vocab, found) = (base.config().vocab_size, other.config().vocab_size);
    if vocab != found {
        let expected = format!("{vocab}, that of the base model");
        return Err(EvalError::Setting { what: "vocabulary size", expected, found: found.to_string() });
    }
    let windows = windows(ids, context, limit)?;
    let half = context / 2;
    let (all, in_second) = ((context - 1) as f64, (context - 1 - half) as f64);
    let mut items: [Vec<Item>; 3] = Default::default();
    for (index, window) in windows.iter().enumerate() {
        let compare = || -> Result<Vec<f64>> {
            let x = hidden(base, base_adapter, window)?;
            let y = hidden(other, adapter, window)?;
            let (mut first, mut second, mut agree) = (0.0, 0.0, 0usize);
            for start in (0..context - 1).step_by(CHUNK) {
                let len = CHUNK.min(context - 1 - start);
                let p = to_vec(base.logits(x.clone().narrow(0, start, len)))?;
                let q = to_vec(other.logits(y.clone().narrow(0, start, len)))?;
                let rows: Vec<(f64, bool)> = p
                    .par_chunks(vocab)
                    .zip(q.par_chunks(vocab))
                    .map(|(p, q)| (kl(p, q), argmax(p) == argmax(q)))
                    .collect();
                for (row, (kl, same)) in rows.into_iter().enumerate() {
                    *if start + row < half { &mut first } else { &mut second } += kl;
                    agree += usize::from(same);
                }
            }
            Ok(vec![first + second, second, agree as f64])
        };
        let values = steps.item("divergence", index, items.len(), compare)?;
        for ((items, sum), weight) in items.iter_mut().zip(values).zip([all, in_second, all]) {
            items.push(Item { sum, weight });
        }
        steps.done(index + 1, windows.len());
    }
    Ok(Divergence {
        kl: finite("the KL divergence", ratio(&items[0]))?,
        second_half_kl: finite("the KL divergence", ratio(&items[1]))?,
        top1_agreement: ratio(&items[2]),
        tokens: windows.len() * (context - 1),
        windows: windows.len(),
        items,
    })
}

/// `KL(softmax p || softmax q)` of two rows of logits.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (log_p, log_q) = (log_sum_exp(p), log_sum_exp(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - log_p, f64::from(q) - log_q);
        let weight = p.exp();
        // A token of probability 0 adds nothing, whatever q says.
        if weight == 0.0 { 0.0 } else { weight * (p - q) }
    };
    p.iter().zip(q).map(term).sum()
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&v| (f64::from(v) - top).exp()).sum();
    top + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_of_two_coins() {
        // p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
        let p = [3f32.ln() + 5.0, 5.0];
        let expected = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((kl(&p, &[2.0, 2.0]) - expected).abs() < 1e-6);
        assert_eq!(kl(&p, &p), 0.0);
        assert_eq!(kl(&[0.0, f32::NEG_INFINITY], &[0.0, f32::NEG_INFINITY]), 0.0);
    }
}
