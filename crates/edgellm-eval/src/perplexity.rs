//! Perplexity of a text: `exp(mean_t -log p(token_t | tokens before it in its window))`.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{Decoder, Weight};
use edgellm_model::generate::to_vec;

use crate::bootstrap::{Item, ratio};
use crate::error::{EvalError, Result, finite};
use crate::items::Steps;
use crate::windows::{Progress, hidden, windows};

/// Tokens whose logits are held at a time where the head is not packed.
const DENSE_CHUNK: usize = 64;

/// The perplexity of a text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Perplexity {
    /// Over all targets of every window.
    pub all_targets: f64,
    /// Over the targets in the second half of every window.
    pub second_half: f64,
    /// Targets in all.
    pub tokens: usize,
    /// Windows that were run.
    pub windows: usize,
    /// Summed negative log-likelihood and targets of each window: of all targets, and of those in its second half.
    #[serde(skip)]
    pub items: [Vec<Item>; 2],
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
    perplexity_in_steps(decoder, adapter, ids, context, limit, &mut Steps::new(progress))
}

/// As [`perplexity`], in steps that may be kept; an item is a window.
///
/// # Errors
/// As [`perplexity`], or those of a file of items.
pub fn perplexity_in_steps(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    context: usize,
    limit: Option<usize>,
    steps: &mut Steps<'_>,
) -> Result<Perplexity> {
    let windows = windows(ids, context, limit)?;
    let half = context / 2;
    let mut items = [Vec::with_capacity(windows.len()), Vec::with_capacity(windows.len())];
    for (index, window) in windows.iter().enumerate() {
        let values = steps.item("perplexity", index, 2, || {
            let normed = hidden(decoder, adapter, window)?;
            let first = negative_log_likelihood(decoder, &normed, window, 0..half)?;
            let second = negative_log_likelihood(decoder, &normed, window, half..context - 1)?;
            Ok(vec![first + second, second])
        })?;
        items[0].push(Item { sum: values[0], weight: (context - 1) as f64 });
        items[1].push(Item { sum: values[1], weight: (context - 1 - half) as f64 });
        steps.done(index + 1, windows.len());
    }
    Ok(Perplexity {
        all_targets: finite("the perplexity", ratio(&items[0]).exp())?,
        second_half: finite("the perplexity of the second half", ratio(&items[1]).exp())?,
        tokens: windows.len() * (context - 1),
        windows: windows.len(),
        items,
    })
}

/// The perplexity of a text in windows that overlap.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Strided {
    /// Over all targets.
    pub perplexity: f64,
    /// Targets in all.
    pub tokens: usize,
    /// Windows that were run.
    pub windows: usize,
    /// Summed negative log-likelihood and targets of each window.
    #[serde(skip)]
    pub items: Vec<Item>,
}

/// Perplexity of `ids` in windows of `context` tokens that begin every `stride` tokens: each token is a target once, in the
/// first window that reaches it, so that all but those of the first window have at least `context - stride` tokens before
/// them (Hugging Face's documentation on the perplexity of fixed-length models). At most `limit` windows; a last, shorter one
/// counts.
///
/// # Errors
/// As [`perplexity`], or a stride that is 0 or longer than the context.
pub fn strided_perplexity(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    (context, stride): (usize, usize),
    limit: Option<usize>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Strided> {
    strided_perplexity_in_steps(decoder, adapter, ids, (context, stride), limit, &mut Steps::new(progress))
}

/// As [`strided_perplexity`], in steps that may be kept; an item is a window.
///
/// # Errors
/// As [`strided_perplexity`], or those of a file of items.
pub fn strided_perplexity_in_steps(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    (context, stride): (usize, usize),
    limit: Option<usize>,
    steps: &mut Steps<'_>,
) -> Result<Strided> {
    if stride == 0 || stride > context {
        let expected = format!("1 to {context}, the tokens of a window");
        return Err(EvalError::Setting { what: "stride", expected, found: stride.to_string() });
    }
    // The same checks, and the same words.
    windows(ids, context, limit)?;
    let all = 1 + (ids.len() - context).div_ceil(stride);
    let count = all.min(limit.unwrap_or(usize::MAX));
    let mut items = Vec::with_capacity(count);
    let mut scored = 0;
    for index in 0..count {
        let begin = index * stride;
        let window = &ids[begin..(begin + context).min(ids.len())];
        // The first token of a text, or of a window that overlaps with none, has nothing before it.
        let first = scored.max(begin + 1) - begin - 1;
        let targets = first..window.len() - 1;
        scored = begin + window.len();
        if !targets.is_empty() {
            let weight = targets.len() as f64;
            let values = steps.item("strided perplexity", index, 1, || {
                let normed = hidden(decoder, adapter, window)?;
                Ok(vec![negative_log_likelihood(decoder, &normed, window, targets)?])
            })?;
            items.push(Item { sum: values[0], weight });
        }
        steps.done(index + 1, count);
    }
    Ok(Strided {
        perplexity: finite("the perplexity", ratio(&items).exp())?,
        tokens: items.iter().map(|item| item.weight).sum::<f64>() as usize,
        windows: count,
        items,
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
