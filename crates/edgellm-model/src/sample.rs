//! Choosing the next token from log-probabilities: greedy, temperature, top-k, top-p and min-p, with a seed.
//!
//! Order: top-k, then temperature, then top-p (Holtzman et al., 2020), then min-p (Nguyen et al., 2024: keep tokens with
//! `p >= min_p * max p`), then one draw. Temperature 0 is greedy: the first of the largest log-probabilities.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ModelError;

/// How to sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Temperature; 0 is greedy.
    pub temperature: f64,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities reach `top_p`; 1 keeps all.
    pub top_p: f64,
    /// Keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// Draws tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SamplingConfig,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler with its own random state.
    ///
    /// # Errors
    /// A setting out of range.
    pub fn new(config: SamplingConfig) -> Result<Self, ModelError> {
        let check = |what: &str, value: f64, low: f64, high: f64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(ModelError::Value {
                what: what.into(),
                expected: format!("from {low} to {high}"),
                found: value.to_string(),
            })
        };
        check("temperature", config.temperature, 0.0, 100.0)?;
        check("top-p", config.top_p, f64::MIN_POSITIVE, 1.0)?;
        check("min-p", config.min_p, 0.0, 1.0)?;
        Ok(Self { config, rng: ChaCha8Rng::seed_from_u64(config.seed) })
    }

    /// Chooses a token given log-probabilities (or logits), `[vocab]`.
    ///
    /// # Panics
    /// If there is no token.
    pub fn sample(&mut self, log_probs: &[f32]) -> u32 {
        let _span = tracing::trace_span!("sample").entered();
        assert!(!log_probs.is_empty(), "sampling from an empty vocabulary");
        if self.config.temperature == 0.0 {
            return argmax(log_probs) as u32;
        }
        let mut order: Vec<u32> = (0..log_probs.len() as u32).collect();
        let by_likelihood = |a: &u32, b: &u32| log_probs[*b as usize].total_cmp(&log_probs[*a as usize]).then(a.cmp(b));
        let k = if self.config.top_k == 0 { order.len() } else { self.config.top_k.min(order.len()) };
        if k < order.len() {
            order.select_nth_unstable_by(k - 1, by_likelihood);
            order.truncate(k);
        }
        order.sort_unstable_by(by_likelihood);
        let top = f64::from(log_probs[order[0] as usize]);
        let mut weights: Vec<f64> = order
            .iter()
            .map(|&id| ((f64::from(log_probs[id as usize]) - top) / self.config.temperature).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        let mut kept = weights.len();
        let mut mass = 0.0;
        for (index, weight) in weights.iter().enumerate() {
            mass += weight / total;
            if mass >= self.config.top_p {
                kept = index + 1;
                break;
            }
        }
        // Weights are relative to the likeliest token, so min-p is a plain threshold.
        kept = kept.min(weights.partition_point(|weight| *weight >= self.config.min_p)).max(1);
        weights.truncate(kept);
        let draw = self.rng.random::<f64>() * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        for (index, weight) in weights.iter().enumerate() {
            sum += weight;
            if draw < sum {
                return order[index];
            }
        }
        order[kept - 1]
    }
}

/// Index of the first of the largest values; values that are no numbers count as the smallest.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    let mut best_value = f32::NEG_INFINITY;
    for (index, &value) in values.iter().enumerate() {
        if value > best_value {
            best = index;
            best_value = value;
        }
    }
    best
}

/// Replaces logits by log-probabilities: `x - log sum exp x`, summed in f64.
pub fn log_softmax(values: &mut [f32]) {
    edgellm_kernels::log_softmax_row(values);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(config: SamplingConfig, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(config).unwrap();
        (0..n).map(|_| sampler.sample(logits)).collect()
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        assert_eq!(draws(SamplingConfig::default(), &[0.0, 3.0, 3.0, -1.0], 3), [1, 1, 1]);
    }

    #[test]
    fn filters_limit_the_choice() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln(), 0.05f32.ln()];
        let base = SamplingConfig { temperature: 1.0, seed: 7, ..Default::default() };
        let largest = |config| draws(config, &logits, 2000).into_iter().max().unwrap();
        assert_eq!(largest(base), 3);
        assert_eq!(largest(SamplingConfig { top_k: 2, ..base }), 1);
        assert_eq!(largest(SamplingConfig { top_p: 0.75, ..base }), 1);
        assert_eq!(largest(SamplingConfig { top_p: 0.85, ..base }), 2);
        assert_eq!(largest(SamplingConfig { min_p: 0.25, ..base }), 2);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let logits = [0.7f32.ln(), 0.3f32.ln()];
        let config = SamplingConfig { temperature: 1.0, seed: 3, ..Default::default() };
        let ones = draws(config, &logits, 20_000).iter().filter(|&&id| id == 1).count() as f64 / 20_000.0;
        assert!((ones - 0.3).abs() < 0.015, "{ones}");
        assert_eq!(draws(config, &logits, 50), draws(config, &logits, 50));
        assert_ne!(draws(config, &logits, 50), draws(SamplingConfig { seed: 4, ..config }, &logits, 50));
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for config in [
            SamplingConfig { temperature: -1.0, ..Default::default() },
            SamplingConfig { temperature: f64::NAN, ..Default::default() },
            SamplingConfig { top_p: 0.0, ..Default::default() },
            SamplingConfig { min_p: 1.5, ..Default::default() },
        ] {
            assert!(Sampler::new(config).is_err(), "{config:?}");
        }
    }
}
