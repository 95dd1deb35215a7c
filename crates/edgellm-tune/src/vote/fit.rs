//! Fitting a vote to data: maximum likelihood of the log-linear pool.
//!
//! With `c_j = w_j / T_j` and the exits' logits `z_j`, the mean negative log-likelihood of the response tokens `y_t` is
//!
//! ```text
//! L(c) = mean_t [ log sum_v exp(sum_j c_j z_tj(v)) - sum_j c_j z_tj(y_t) ]
//! dL/dc_j       = mean_t [ E_pt z_tj - z_tj(y_t) ]
//! d2L/dc_j dc_l = mean_t Cov_pt(z_tj, z_tl)
//! ```
//!
//! a convex function (a log-sum-exp of linear functions less a linear one; Genest, McConway and Schervish 1986 for the
//! pool, Heskes, "Selecting weighting factors in logarithmic opinion pools", 1998, for fitting it). `c` is not constrained:
//! a negative weight is a contrast with an early exit. Every single exit at any temperature is one of the points, so on the
//! data of the fit no exit can beat the optimum.
//!
//! What early exits seem to add on few tokens may be chance: fitting `m` factors gains about `m / 2N` nats on `N` tokens of
//! the fit, and loses as much elsewhere (Akaike 1974). So the optimum is drawn towards the last exit at its temperature,
//! `c = c_last + s (c_opt - c_last)` with `s = max(0, 1 - m / (2 N G))` for a gain of `G` nats: the positive-part
//! shrinkage of Stein's kind (Efron and Morris 1973). By convexity it is never worse than the last exit on the fit's data.
//!
//! The temperature of exit `j` alone is the same problem with one variable, `1 / T_j`. All these problems are minimized by
//! Newton's method in the same passes: one pass computes each exit's logits once, a few tokens at a time, and takes every
//! problem's value, gradient and Hessian from them. The first passes see only part of the data.

use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use rayon::prelude::*;

use super::newton::{Evaluation, Newton};
use super::states::States;
use super::{TEMPERATURES, VoteExit, VoteWeights};
use crate::TuneError;

/// Tokens of the first passes.
const FIRST: usize = 512;
/// Passes over the first tokens, and over all, at most.
const PASSES: [usize; 2] = [25, 12];
/// Tokens whose logits are held at a time.
const CHUNK: usize = 64;
/// Exits at most: the Hessian's cost grows with their square.
const MAX_EXITS: usize = 16;
/// Values that are summed in `f32` before they go into an `f64`.
const BLOCK: usize = 256;

/// How far a fit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FitProgress {
    /// States of so many response tokens are there.
    States(usize),
    /// So many passes over them are done.
    Passes(usize),
}

/// What a fit gives.
#[derive(Clone, Debug, PartialEq)]
pub struct VoteFit {
    /// The vote.
    pub vote: VoteWeights,
    /// Mean loss at the optimum on the data of the fit, in nats.
    pub loss: f64,
    /// The part `s` of the way from the last exit to the optimum that the vote goes: 0 if the early exits add nothing.
    pub confidence: f64,
    /// Mean loss of each exit at its temperature on the data of the fit, in nats.
    pub by_exit: Vec<f64>,
    /// Passes over all tokens, with those over the first ones.
    pub passes: usize,
}

/// Fits temperatures and weights on the first `max_tokens` response tokens of `examples`.
///
/// # Errors
/// Exits that are not ascending numbers of blocks that end with the whole model, fewer than 64 response tokens, or
/// weights that cannot be read.
pub fn fit_vote(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    examples: &[Example],
    max_tokens: usize,
    progress: &mut dyn FnMut(FitProgress),
) -> Result<VoteFit, TuneError> {
    let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]) && exits.first().is_some_and(|e| *e > 0);
    if !ascending || exits.last() != Some(&decoder.n_blocks()) || exits.len() > MAX_EXITS {
        return Err(TuneError::Setting {
            what: "exits",
            expected: format!("at most {MAX_EXITS} ascending numbers of blocks that end with {}", decoder.n_blocks()),
            found: format!("{exits:?}"),
        });
    }
    let on_tokens = &mut |tokens| progress(FitProgress::States(tokens));
    let states = States::collect(decoder, adapter, exits, examples, max_tokens, on_tokens)?;
    if states.len() < 64 {
        return Err(TuneError::Setting {
            what: "response tokens to fit a vote on",
            expected: "at least 64".into(),
            found: states.len().to_string(),
        });
    }
    let mut problems = Problem::all(exits.len());
    let mut passes = 0;
    for (tokens, most) in [FIRST.min(states.len()), states.len()].into_iter().zip(PASSES) {
        problems.iter_mut().for_each(|p| p.newton.restart());
        for _ in 0..most {
            if problems.iter().all(|p| p.newton.is_done()) {
                break;
            }
            pass(decoder, &states, tokens, &mut problems)?;
            passes += 1;
            progress(FitProgress::Passes(passes));
        }
    }
    result(exits, &problems, states.len(), passes)
}

/// One function to minimize: the loss of a pool of some exits.
struct Problem {
    /// Indices of the exits.
    exits: Vec<usize>,
    newton: Newton,
}

impl Problem {
    /// Each exit's temperature, then the pool of all, started at the last exit alone.
    fn all(n_exits: usize) -> Vec<Problem> {
        let single = |j| Problem { exits: vec![j], newton: Newton::new(vec![1.0]) };
        let mut start = vec![0.0; n_exits];
        start[n_exits - 1] = 1.0;
        let pool = Problem { exits: (0..n_exits).collect(), newton: Newton::new(start) };
        (0..n_exits).map(single).chain([pool]).collect()
    }
}

fn result(exits: &[usize], problems: &[Problem], tokens: usize, passes: usize) -> Result<VoteFit, TuneError> {
    let best = |problem: &Problem| match problem.newton.best() {
        Some((point, value)) if value.is_finite() => Ok((point.to_vec(), value)),
        _ => Err(TuneError::Setting {
            what: "loss of the exits",
            expected: "a finite number".into(),
            found: "another: the model's activations overflow".into(),
        }),
    };
    let (factors, loss) = best(&problems[exits.len()])?;
    let last = exits.len() - 1;
    let (only_last, loss_of_last) = best(&problems[last])?;
    let confidence = shrinkage(last, tokens, loss_of_last - loss);
    let mut vote = Vec::with_capacity(exits.len());
    let mut by_exit = Vec::with_capacity(exits.len());
    for (index, &exit) in exits.iter().enumerate() {
        let (inverse, loss) = best(&problems[index])?;
        // An exit that says less than nothing gets the largest temperature.
        let inverse = inverse[0].clamp(1.0 / TEMPERATURES.end(), 1.0 / TEMPERATURES.start());
        let alone = if index == last { only_last[0] } else { 0.0 };
        let factor = alone + confidence * (factors[index] - alone);
        vote.push(VoteExit { exit, weight: factor / inverse, temperature: 1.0 / inverse });
        by_exit.push(loss);
    }
    Ok(VoteFit { vote: VoteWeights::new(vote, tokens), loss, confidence, by_exit, passes })
}

/// How far to trust `parameters` that gained `gain` nats a token on `tokens` tokens.
fn shrinkage(parameters: usize, tokens: usize, gain: f64) -> f64 {
    let by_chance = parameters as f64 / (2.0 * tokens as f64);
    if gain > by_chance { 1.0 - by_chance / gain } else { 0.0 }
}

/// Evaluates every problem that is not done on the first `tokens` tokens.
fn pass(decoder: &Decoder, states: &States, tokens: usize, problems: &mut [Problem]) -> Result<(), TuneError> {
    let vocab = decoder.config().vocab_size;
    let mut open: Vec<&mut Problem> = problems.iter_mut().filter(|p| !p.newton.is_done()).collect();
    let mut sums: Vec<Moments> = open.iter().map(|p| Moments::zero(p.exits.len())).collect();
    let needed = open.iter().flat_map(|p| p.exits.iter()).max().map_or(0, |last| last + 1);
    for from in (0..tokens).step_by(CHUNK) {
        let to = (from + CHUNK).min(tokens);
        let is_open = |j: &usize| open.iter().any(|p| p.exits.contains(j));
        let logits: Vec<Vec<f32>> = (0..needed)
            .map(|j| if is_open(&j) { states.logits(decoder, j, from, to) } else { Ok(Vec::new()) })
            .collect::<Result<_, _>>()?;
        let of_tokens: Vec<Vec<Moments>> = (from..to)
            .into_par_iter()
            .map_init(Vec::new, |scores, token| {
                let row = (token - from) * vocab..(token - from + 1) * vocab;
                let of_problem = |problem: &&mut Problem| {
                    let z: Vec<&[f32]> = problem.exits.iter().map(|&j| &logits[j][row.clone()]).collect();
                    Moments::of(&z, &problem.newton.point, states.targets[token] as usize, scores)
                };
                open.iter().map(of_problem).collect()
            })
            .collect();
        // In the tokens' order, whatever thread was first.
        for moments in &of_tokens {
            sums.iter_mut().zip(moments).for_each(|(sum, one)| sum.add(one));
        }
    }
    for (problem, sum) in open.iter_mut().zip(sums) {
        problem.newton.evaluated(&sum.mean(tokens));
    }
    Ok(())
}

/// A token's loss with its derivatives by `c`; or sums of them.
struct Moments(Evaluation);

impl Moments {
    fn zero(n: usize) -> Self {
        Moments(Evaluation { value: 0.0, gradient: vec![0.0; n], hessian: vec![0.0; n * n] })
    }

    /// From the logits of the pool's exits and its factors. `scores` is scratch.
    fn of(z: &[&[f32]], factors: &[f64], target: usize, scores: &mut Vec<f32>) -> Self {
        let (n, vocab) = (z.len(), z[0].len());
        scores.clear();
        scores.resize(vocab, 0.0);
        for (z, &factor) in z.iter().zip(factors) {
            scores.iter_mut().zip(*z).for_each(|(score, z)| *score += factor as f32 * z);
        }
        let at_target = f64::from(scores[target]);
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        let (mut first, mut second) = (vec![0.0; n], vec![0.0; n * n]);
        // Distances to the target's logit: small numbers, whose products lose less in f32.
        let mut centred = vec![[0.0f32; BLOCK]; n];
        for (start, e) in (0..vocab).step_by(BLOCK).zip(scores.chunks_mut(BLOCK)) {
            e.iter_mut().for_each(|score| *score = (*score - max).exp());
            total += f64::from(e.iter().sum::<f32>());
            let len = e.len();
            for (centred, z) in centred.iter_mut().zip(z) {
                let values = centred.iter_mut().zip(&z[start..start + len]);
                values.for_each(|(centred, value)| *centred = value - z[target]);
            }
            let mut weighted = [0.0f32; BLOCK];
            for i in 0..n {
                let products = weighted.iter_mut().zip(&centred[i]).zip(&*e);
                products.for_each(|((product, z), e)| *product = z * e);
                first[i] += f64::from(weighted[..len].iter().sum::<f32>());
                for j in 0..=i {
                    second[i * n + j] += f64::from(dot(&weighted[..len], &centred[j][..len]));
                }
            }
        }
        let gradient: Vec<f64> = first.iter().map(|sum| sum / total).collect();
        let mut hessian = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let covariance = second[i * n + j] / total - gradient[i] * gradient[j];
                (hessian[i * n + j], hessian[j * n + i]) = (covariance, covariance);
            }
        }
        Moments(Evaluation { value: f64::from(max) + total.ln() - at_target, gradient, hessian })
    }

    fn add(&mut self, other: &Moments) {
        self.0.value += other.0.value;
        self.0.gradient.iter_mut().zip(&other.0.gradient).for_each(|(a, b)| *a += b);
        self.0.hessian.iter_mut().zip(&other.0.hessian).for_each(|(a, b)| *a += b);
    }

    fn mean(mut self, tokens: usize) -> Evaluation {
        let share = 1.0 / tokens as f64;
        self.0.value *= share;
        self.0.gradient.iter_mut().for_each(|g| *g *= share);
        self.0.hessian.iter_mut().for_each(|h| *h *= share);
        self.0
    }
}

/// A sum of products in 16 lanes, which a compiler can vectorize.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(lane, (a, b))| *lane += a * b);
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests;
