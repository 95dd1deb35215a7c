//! Fitting the lens of a draft's head: from what is known of a token early to its normalized last state.
//!
//! The lens of [`DraftHead`] is linear, `z(t) = W x(t)` with `x(t) = [h_e(t) / rms(h_e(t)); z(t - 1)]`, so ridge regression
//! gives it in closed form from one pass over texts: `W^T = (sum x x^T + l D)^-1 sum x z^T`, with `D` the diagonal of
//! `sum x x^T` (a least-squares start of the tuned lens, Belrose et al., 2023, section 3). The texts should be the model's own: what it drafts for is
//! what it writes. The temperature of the exit's scores is fitted afterwards on texts that were kept out (Guo et al., 2017, section 4.2).

use burn::tensor::{Tensor, TensorData};
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{Decoder, Linear, Weight};
use edgellm_model::generate::{DraftHead, Shortlist, to_vec};
use edgellm_model::sample::log_softmax;

use crate::TuneError;

/// Weight of the ridge, relative to the diagonal.
const RIDGE: f64 = 0.01;
/// Each so many texts, one is kept out for the temperature.
const KEPT_OUT: usize = 10;
/// Temperatures that are tried.
const TEMPERATURES: [f32; 13] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.8, 2.2];

/// A text that the model wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnText {
    /// Prompt and answer.
    pub ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// A fitted lens.
#[derive(Clone, Debug, PartialEq)]
pub struct FittedLens {
    /// `[d, 2 d]`, row-major.
    pub values: Vec<f32>,
    /// Divides the exit's scores.
    pub temperature: f32,
    /// How often the likeliest token of the exit is the model's, on the texts that were kept out.
    pub agreement: f64,
}

/// What the lens sees of some tokens, and what it should say.
struct Samples {
    /// `[tokens, d]`: the state at the exit.
    hidden: Tensor<2>,
    /// `[tokens, d]`: the normalized last state of the token before.
    before: Tensor<2>,
    /// `[tokens, d]`: the normalized last state.
    state: Tensor<2>,
    /// The tokens that follow.
    next: Vec<u32>,
}

/// The samples of a text's answer; `None` where it is too short.
fn samples(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exit: usize,
    text: &OwnText,
) -> Result<Option<Samples>, TuneError> {
    let (first, end) = (text.prompt.max(1), text.ids.len().saturating_sub(1));
    if first >= end {
        return Ok(None);
    }
    let (d, n) = (decoder.config().hidden_size, end - first);
    let last = decoder.n_blocks();
    let x = decoder.embed(&[&text.ids[..end]])?;
    let x = decoder.run_blocks(x, 0..exit, adapter, None)?;
    let hidden = x.clone().narrow(1, first, n).reshape([n, d]);
    let x = decoder.run_blocks(x, exit..last, adapter, None)?;
    let states = decoder.exit_norm(x.reshape([end, d]), last, adapter);
    let before = states.clone().narrow(0, first - 1, n);
    let state = states.narrow(0, first, n);
    Ok(Some(Samples { hidden, before, state, next: text.ids[first + 1..].to_vec() }))
}

/// Fits the lens of the exit after `exit` blocks (0: the embedding) to texts, and its temperature.
///
/// `on_text` is called after each text.
///
/// # Errors
/// Too few texts with an answer, or weights that cannot be read.
pub fn fit_lens(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exit: usize,
    texts: &[OwnText],
    shortlist: &Shortlist,
    on_text: &mut dyn FnMut(usize),
) -> Result<FittedLens, TuneError> {
    let d = decoder.config().hidden_size;
    let width = 2 * d;
    let eps = decoder.config().rms_norm_eps;
    let (mut square, mut cross) = (vec![0.0f64; width * width], vec![0.0f64; width * d]);
    let mut kept = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let Some(sample) = samples(decoder, adapter, exit, text)? else { continue };
        if index % KEPT_OUT == 0 {
            kept.push(sample);
        } else {
            let rms = sample.hidden.clone().powi_scalar(2).mean_dim(1).add_scalar(eps).sqrt();
            let unit = sample.hidden.div(rms);
            let x = Tensor::cat(vec![unit, sample.before], 1);
            let transposed = x.clone().transpose();
            add(&mut square, transposed.clone().matmul(x))?;
            add(&mut cross, transposed.matmul(sample.state))?;
        }
        on_text(index + 1);
    }
    for i in 0..width {
        square[i * width + i] += RIDGE * square[i * width + i] + 1e-6;
    }
    if kept.is_empty() || !solve(&mut square, &mut cross, width, d) {
        return Err(TuneError::EmptyBatch { step: 0 });
    }
    let mut values = vec![0.0f32; d * width];
    for (i, row) in cross.chunks_exact(d).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| values[j * width + i] = *value as f32);
    }
    let lens = Tensor::from_data(TensorData::new(values.clone(), [d, width]), decoder.device());
    let lens = Linear::new(Weight::Dense(lens));
    let head = DraftHead::with_lens(decoder, exit, lens, 1.0, shortlist.clone())?;
    let (temperature, agreement) = fit_temperature(&head, &kept)?;
    Ok(FittedLens { values, temperature, agreement })
}

/// `sum += tensor`.
fn add(sum: &mut [f64], tensor: Tensor<2>) -> Result<(), TuneError> {
    sum.iter_mut().zip(to_vec(tensor)?).for_each(|(sum, value)| *sum += f64::from(value));
    Ok(())
}

/// Replaces `b`, `[n, m]`, by `a^-1 b` for a symmetric `a`, `[n, n]` (Cholesky); `false` if `a` is not positive definite.
fn solve(a: &mut [f64], b: &mut [f64], n: usize, m: usize) -> bool {
    for j in 0..n {
        for i in j..n {
            let (row, pivot) = (&a[i * n..i * n + j], &a[j * n..j * n + j]);
            let dot: f64 = row.iter().zip(pivot).map(|(x, y)| x * y).sum();
            let value = a[i * n + j] - dot;
            if i == j {
                if value <= 0.0 || !value.is_finite() {
                    return false;
                }
                a[i * n + j] = value.sqrt();
            } else {
                a[i * n + j] = value / a[j * n + j];
            }
        }
    }
    for i in 0..n {
        let (done, rest) = b.split_at_mut(i * m);
        eliminate(&mut rest[..m], done, m, |k| a[i * n + k], a[i * n + i]);
    }
    for i in (0..n).rev() {
        let (rest, done) = b.split_at_mut((i + 1) * m);
        eliminate(&mut rest[i * m..], done, m, |k| a[(i + 1 + k) * n + i], a[i * n + i]);
    }
    true
}

/// `row = (row - sum_k factor(k) rows[k]) / pivot`.
fn eliminate(row: &mut [f64], rows: &[f64], m: usize, factor: impl Fn(usize) -> f64, pivot: f64) {
    for (k, other) in rows.chunks_exact(m).enumerate() {
        let factor = factor(k);
        row.iter_mut().zip(other).for_each(|(value, other)| *value -= factor * other);
    }
    row.iter_mut().for_each(|value| *value /= pivot);
}

/// The temperature with the least loss, and how often the likeliest token is right.
fn fit_temperature(head: &DraftHead, kept: &[Samples]) -> Result<(f32, f64), TuneError> {
    let mut losses = [0.0f64; TEMPERATURES.len()];
    let (mut right, mut total) = (0usize, 0usize);
    for sample in kept {
        let scores = head.scores(head.read(sample.hidden.clone(), sample.before.clone()))?;
        let width = scores.len() / sample.next.len();
        for (row, &token) in scores.chunks_exact(width).zip(&sample.next) {
            total += 1;
            let Some(at) = (0..width).find(|&at| head.shortlist().id(at) == token) else { continue };
            right += usize::from(edgellm_model::sample::argmax(row) == at);
            for (loss, temperature) in losses.iter_mut().zip(TEMPERATURES) {
                let mut row: Vec<f32> = row.iter().map(|score| score / temperature).collect();
                log_softmax(&mut row);
                *loss -= f64::from(row[at]);
            }
        }
    }
    let best = (0..losses.len()).min_by(|a, b| losses[*a].total_cmp(&losses[*b])).unwrap_or(0);
    Ok((TEMPERATURES[best], right as f64 / total.max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_solved() {
        // a = [[4, 2], [2, 3]], x = [[1, -1], [2, 5]].
        let mut a = [4.0, 2.0, 2.0, 3.0];
        let mut b = [8.0, 6.0, 8.0, 13.0];
        assert!(solve(&mut a, &mut b, 2, 2));
        for (found, expected) in b.iter().zip([1.0, -1.0, 2.0, 5.0]) {
            assert!((found - expected).abs() < 1e-12, "{b:?}");
        }
        assert!(!solve(&mut [1.0, 2.0, 2.0, 1.0], &mut [0.0; 2], 2, 1), "not positive definite");
    }
}
