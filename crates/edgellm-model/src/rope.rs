//! Frequencies of the rotary position embedding, with the context-extension schemes in use.
//!
//! Pair `i` of `dim` rotary dimensions turns by `position * inv_freq[i]`, with `inv_freq[i] = theta^(-2 i / dim)` (Su
//! et al., "RoFormer", 2021). Extensions change these frequencies:
//! - `linear`: all divided by `factor` (Chen et al., "Extending context window of large language models via
//!   positional interpolation", 2023);
//! - `llama3`: long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1 reference code);
//! - `yarn`: the ramp is over rotations within the original context, and attention is sharpened by a factor on
//!   cosines and sines (Peng et al., "YaRN", 2023, sections 3.2 and 3.4);
//! - `factors`: a divisor per pair, as GGUF files carry it in `rope_freqs.weight`.

use std::f64::consts::PI;

/// How the context was extended beyond what the frequencies were trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3's ramp over wavelengths.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` positions are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` positions are kept.
        high_freq_factor: f64,
        /// Positions of the original training.
        original_context: usize,
    },
    /// YaRN's ramp over rotations.
    Yarn {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Positions of the original training.
        original_context: usize,
        /// Pairs with more rotations than this in the original context are kept.
        beta_fast: f64,
        /// Pairs with fewer rotations than this are divided.
        beta_slow: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole pairs, outwards.
        truncate: bool,
    },
    /// A divisor for every pair.
    Factors(Vec<f64>),
}

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// The part of a head's dimensions that turns, from the first one on; 1 for all.
    pub partial_rotary_factor: f64,
    /// Context extension.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Dimensions of a head that turn: an even number, at most `head_dim`.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        let part = (head_dim as f64 * self.partial_rotary_factor).floor() as usize;
        part.min(head_dim) / 2 * 2
    }
}

/// YaRN's default attention factor for an extension by `factor`: `0.1 mscale ln(factor) + 1`.
pub fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// The frequencies in radians per position, one for each pair of rotary dimensions, and the factor on cosines and
/// sines.
pub fn inv_freq(rope: &RopeConfig, head_dim: usize) -> (Vec<f64>, f64) {
    let dim = rope.rotary_dim(head_dim);
    let plain: Vec<f64> = (0..dim / 2).map(|i| rope.theta.powf(-2.0 * i as f64 / dim as f64)).collect();
    match &rope.scaling {
        RopeScaling::None => (plain, 1.0),
        RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
        RopeScaling::Factors(factors) => {
            (plain.iter().zip(factors.iter().chain(std::iter::repeat(&1.0))).map(|(f, by)| f / by).collect(), 1.0)
        }
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let scale = |f: f64| {
                // Wavelengths of this pair in the original context.
                let turns = original_context as f64 * f / (2.0 * PI);
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                f * (kept + (1.0 - kept) / factor)
            };
            (plain.into_iter().map(scale).collect(), 1.0)
        }
        &RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate } => {
            let (low, high) = yarn_ramp(dim, rope.theta, original_context, beta_fast, beta_slow, truncate);
            let scale = |(i, f): (usize, f64)| {
                let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * divided + f * (1.0 - divided)
            };
            (plain.into_iter().enumerate().map(scale).collect(), attention_factor)
        }
    }
}

/// The pairs between which YaRN's ramp runs: those that turn `beta_fast` and `beta_slow` times in the original context.
fn yarn_ramp(dim: usize, theta: f64, context: usize, fast: f64, slow: f64, truncate: bool) -> (f64, f64) {
    let pair = |rotations: f64| dim as f64 * (context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair(fast), pair(slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    low = low.max(0.0);
    high = high.min(dim as f64 - 1.0);
    // No division by zero where both ends meet.
    if low == high { (low, high + 0.001) } else { (low, high) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 10_000.0, partial_rotary_factor: 1.0, scaling }
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 1e-6 * e.abs(), "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn plain_and_linear() {
        close(&inv_freq(&config(RopeScaling::None), 4).0, &[1.0, 0.01]);
        close(&inv_freq(&config(RopeScaling::Linear { factor: 4.0 }), 4).0, &[0.25, 0.0025]);
        close(&inv_freq(&config(RopeScaling::Factors(vec![1.0, 8.0])), 4).0, &[1.0, 0.00125]);
        let half = RopeConfig { partial_rotary_factor: 0.5, ..config(RopeScaling::None) };
        close(&inv_freq(&half, 8).0, &[1.0, 0.01]);
    }

    #[test]
    fn llama3_keeps_short_and_divides_long_wavelengths() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let rope = RopeConfig { theta: 500_000.0, partial_rotary_factor: 1.0, scaling };
        let (freqs, factor) = inv_freq(&rope, 128);
        let plain: Vec<f64> = (0..64).map(|i| 500_000f64.powf(-(i as f64) / 64.0)).collect();
        assert_eq!(factor, 1.0);
        close(&freqs[..28], &plain[..28]);
        close(&freqs[36..], &plain[36..].iter().map(|f| f / 8.0).collect::<Vec<_>>());
        // Pair 32 by hand: frequency 500000^-0.5 = 1.41421e-3, 1.84385 turns in 8192 positions, so 0.281283 of it is
        // kept and the rest divided by 8: 1.41421e-3 (0.281283 + 0.718717 / 8).
        close(&freqs[32..33], &[1.414_213_562e-3 * (0.281_282_6 + 0.718_717_4 / 8.0)]);
    }

    #[test]
    fn yarn_divides_slow_pairs_and_sharpens() {
        let attention_factor = yarn_attention_factor(4.0, 1.0);
        assert!((attention_factor - 1.138_629_436).abs() < 1e-9);
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor,
            truncate: true,
        };
        let rope = RopeConfig { theta: 1_000_000.0, partial_rotary_factor: 1.0, scaling };
        let (freqs, factor) = inv_freq(&rope, 128);
        assert_eq!(factor, attention_factor);
        let plain: Vec<f64> = (0..64).map(|i| 1e6f64.powf(-(i as f64) / 64.0)).collect();
        // The ramp runs from pair floor(23.59) to pair ceil(39.65).
        close(&freqs[..24], &plain[..24]);
        close(&freqs[40..], &plain[40..].iter().map(|f| f / 4.0).collect::<Vec<_>>());
        let kept = 1.0 - (31.0 - 23.0) / (40.0 - 23.0);
        close(&freqs[31..32], &[plain[31] * (kept + (1.0 - kept) / 4.0)]);
    }
}
