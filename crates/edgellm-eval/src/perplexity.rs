//! Perplexity of a text: `exp(mean_t -log p(token_t | tokens before it in its window))`.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{Decoder, Weight};
use edgellm_model::generate::to_vec;

use crate::error::{Result, finite};
use crate::windows::{Progress, hidden, windows};

/// Tokens whose logits are held at a time where the head is not packed.
const DENSE_CHUNK: usize = 64;

/// The perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Perplexity {
    /// Over all targets of every window.
    pub all_targets: f64,
    /// Over the targets in the second half of every window.
    pub second_half: f64,
    /// Targets in all.
    pub tokens: usize,
    /// Windows that were run.
    pub windows: usize,
}

/// Perplexity of `ids` in windows of `context` tokens without overlap, at most `limit` of them.
///
/// Log-probabilities come from the model's loss in f32, at most half a window at a time; their sums are f64.
///
/// # Errors
/// A context below 3 (which has no second half), less than one window of text, an id outside the vocabulary, or weights that cannot be read.
pub fn perplexity(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Perplexity> {
    let windows = windows(ids, context, limit)?;
    let half = context / 2;
    let (mut first, mut second) = (0.0, 0.0);
    for (index, window) in windows.iter().enumerate() {
        let normed = hidden(decoder, adapter, window)?;
        first += negative_log_likelihood(decoder, &normed, window, 0..half)?;
        second += negative_log_likelihood(decoder, &normed, window, half..context - 1)?;
        progress(Progress { done: index + 1, total: windows.len() });
    }
    let n = windows.len();
    let (targets, second_targets) = (n * (context - 1), n * (context - 1 - half));
    let mean = |sum: f64, count: usize| (sum / count as f64).exp();
    Ok(Perplexity {
        all_targets: finite("the perplexity", mean(first + second, targets))?,
        second_half: finite("the perplexity of the second half", mean(second, second_targets))?,
        tokens: targets,
        windows: n,
    })
}

/// `sum -log p(window[i + 1])` over positions `i`.
fn negative_log_likelihood(
    decoder: &Decoder,
    normed: &Tensor<2>,
    window: &[u32],
    positions: std::ops::Range<usize>,
) -> Result<f64> {
    let chunk = match decoder.head() {
        Weight::Packed(_) => positions.len().max(1),
        Weight::Dense(_) => DENSE_CHUNK,
    };
    let mut sum = 0.0;
    for start in positions.clone().step_by(chunk) {
        let len = chunk.min(positions.end - start);
        let targets: Vec<i32> = window[start + 1..=start + len].iter().map(|&id| id as i32).collect();
        let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &normed.device());
        let weights = Tensor::<1>::ones([len], &normed.device());
        let loss = to_vec(decoder.loss(normed.clone().narrow(0, start, len), targets, weights))?;
        sum += loss.into_iter().map(f64::from).sum::<f64>();
    }
    Ok(sum)
}
