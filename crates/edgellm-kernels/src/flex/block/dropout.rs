//! Dropout of the inputs of low-rank updates (Srivastava et al., 2014; in PEFT `lora_dropout`).

use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, vectorized};
use crate::flex::TASK;

/// Sets a share of a layer's inputs to zero and scales the others up; which ones is a function of the seed, the layer and
/// the place, so that a backward pass does the same again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The share, from 0 to below 1.
    pub share: f32,
    /// What draws.
    pub seed: u64,
}

impl Dropout {
    pub(super) fn of_layer(self, layer: u64) -> Self {
        Dropout { seed: mix(self.seed ^ layer.wrapping_mul(0x9e37_79b9_7f4a_7c15)), ..self }
    }

    /// `x` with zeros, the others scaled.
    pub(super) fn apply(self, kernel: Kernel, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        let (threshold, scale) = ((f64::from(self.share) * 4_294_967_296.0) as u32, 1.0 / (1.0 - self.share));
        let (low, high) = (self.seed as u32, (self.seed >> 32) as u32);
        let mut items: Vec<(usize, &mut [f32])> = out.chunks_mut(TASK).enumerate().collect();
        for_each_mut(&mut items, |_, (chunk, values)| {
            vectorized(kernel, || {
                let first = (*chunk * TASK) as u32;
                for (i, value) in values.iter_mut().enumerate() {
                    let draw = mix32(first.wrapping_add(i as u32) ^ low).wrapping_add(high);
                    *value = if mix32(draw) < threshold { 0.0 } else { *value * scale };
                }
            });
        });
        out
    }
}

/// A bijection of 64 bits that spreads every bit (the finalizer of SplitMix64, Steele et al., 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The same of 32 bits (MurmurHash3's finalizer, Appleby).
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        let kernel = Kernel::active();
        let x = vec![1.0f32; 200_000];
        let dropout = Dropout { share: 0.3, seed: 9 };
        let out = dropout.apply(kernel, &x);
        let dropped = out.iter().filter(|v| **v == 0.0).count() as f64 / x.len() as f64;
        assert!((dropped - 0.3).abs() < 0.005, "{dropped}");
        let mean = out.iter().map(|v| f64::from(*v)).sum::<f64>() / x.len() as f64;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert_eq!(out, dropout.apply(kernel, &x));
        assert_ne!(out, dropout.of_layer(1).apply(kernel, &x));
        assert_eq!(x, Dropout { share: 0.0, seed: 9 }.apply(kernel, &x));
    }
}
