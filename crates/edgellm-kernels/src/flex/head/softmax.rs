//! Maxima and sums of exponentials of a tile's logits, and normalizers from those of all tiles.

use super::super::exp::exp;
use crate::arch::{Kernel, vectorized};

/// Values that are handled together.
const LANES: usize = 16;

/// The maximum of every token's logits, and the sum of the exponentials of the distances to it.
pub(super) type MaximaAndSums = Vec<(f32, f32)>;

/// Reduces the logits, `[tokens, width]`, and leaves them as they are.
pub(super) fn maxima_and_sums(kernel: Kernel, logits: &mut [f32], width: usize, out: &mut MaximaAndSums) {
    reduce::<false>(kernel, logits, width, out);
}

/// Reduces the logits, `[tokens, width]`, and leaves the exponentials of their distances to their token's maximum.
pub(super) fn exponentials(kernel: Kernel, logits: &mut [f32], width: usize, out: &mut MaximaAndSums) {
    reduce::<true>(kernel, logits, width, out);
}

fn reduce<const KEEP: bool>(kernel: Kernel, logits: &mut [f32], width: usize, out: &mut MaximaAndSums) {
    out.clear();
    out.resize(logits.len() / width, (0.0, 0.0));
    // A loop, not `collect`, which would not be compiled for the instruction set.
    vectorized(kernel, || {
        for (out, row) in out.iter_mut().zip(logits.chunks_exact_mut(width)) {
            let max = maximum(row);
            let mut sums = [0.0f32; LANES];
            let mut add = |values: &mut [f32]| {
                for (sum, value) in sums.iter_mut().zip(values) {
                    let e = exp(*value - max);
                    *sum += e;
                    if KEEP {
                        *value = e;
                    }
                }
            };
            let mut chunks = row.chunks_exact_mut(LANES);
            chunks.by_ref().for_each(&mut add);
            add(chunks.into_remainder());
            *out = (max, sums.iter().sum());
        }
    });
}

#[inline(always)]
fn maximum(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut tops = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (top, &value) in tops.iter_mut().zip(chunk) {
            *top = larger(*top, value);
        }
    }
    tops.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The logarithms of the normalizers of so many tokens, from all tiles in order.
pub(super) fn normalizers<'a>(tiles: impl Iterator<Item = &'a MaximaAndSums> + Clone, tokens: usize) -> Vec<f32> {
    let of_token = |t: usize| {
        let max = tiles.clone().map(|tile| tile[t].0).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = tiles.clone().map(|tile| tile[t]).map(|(top, sum)| sum * (top - max).exp()).sum();
        max + sum.ln()
    };
    (0..tokens).map(of_token).collect()
}
