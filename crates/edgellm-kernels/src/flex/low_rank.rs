//! The low-rank update `out += s (x A^T) B^T` on plain slices.
//!
//! A matrix product of a library picks another kernel, and another order of its sums, for every number of tokens. Tokens
//! that are verified together must get the values that they get alone, so few tokens have a kernel here, whose sums have
//! one order: dot products with `A` in 16 lanes, those with `B` in eight.

use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::{Kernel, vectorized};

/// Most tokens for which sums have an order that does not depend on their number.
const FEW: usize = 8;
/// Lanes of a sum over columns.
const LANES: usize = 16;
/// Lanes of a sum over the rank.
const NARROW: usize = 8;

/// `x`: `[tokens, cols]`; `a`: `[rank, cols]`; `b`: `[rows, rank]`; `out`: `[tokens, rows]`.
pub(super) fn low_rank(x: &[f32], cols: usize, a: &[f32], b: &[f32], rows: usize, scaling: f32, out: &mut [f32]) {
    let (tokens, rank) = (x.len() / cols, a.len() / cols);
    if tokens <= FEW {
        return vectorized(Kernel::active(), || few(x, cols, a, b, rank, scaling, out));
    }
    let mut down = vec![0.0; tokens * rank];
    let (x, a) = (MatRef::new(x, tokens, cols, cols), MatRef::new(a, rank, cols, cols));
    ColumnsMut::whole(&mut down, tokens, rank, rank).product(x, a.t(), scaling, false);
    let (down, b) = (MatRef::new(&down, tokens, rank, rank), MatRef::new(b, rows, rank, rank));
    ColumnsMut::whole(out, tokens, rows, rows).product(down, b.t(), 1.0, true);
}

#[inline(always)]
fn few(x: &[f32], cols: usize, a: &[f32], b: &[f32], rank: usize, scaling: f32, out: &mut [f32]) {
    let rows = b.len() / rank;
    let mut down = vec![0.0; rank];
    for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(rows)) {
        for (down, a) in down.iter_mut().zip(a.chunks_exact(cols)) {
            *down = scaling * dot::<LANES>(a, x);
        }
        for (out, b) in out.iter_mut().zip(b.chunks_exact(rank)) {
            *out += dot::<NARROW>(b, &down);
        }
    }
}

/// A dot product in `N` lanes, which are added as a tree.
#[inline(always)]
fn dot<const N: usize>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; N];
    let (mut left, mut right) = (a.chunks_exact(N), b.chunks_exact(N));
    for (a, b) in left.by_ref().zip(right.by_ref()) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(left.remainder()).zip(right.remainder()) {
        *sum += a * b;
    }
    let mut n = N / 2;
    while n > 0 {
        for lane in 0..n {
            sums[lane] += sums[lane + n];
        }
        n /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + seed).sin()).collect()
    }

    /// Few tokens and many give the same product, and a token's values do not depend on its company.
    #[test]
    fn tokens_do_not_depend_on_one_another() {
        for (cols, rows, rank) in [(576, 192, 8), (48, 37, 5), (33, 16, 16)] {
            let (x, a, b) = (values(12 * cols, 0.1), values(rank * cols, 0.2), values(rows * rank, 0.3));
            let run = |x: &[f32]| {
                let mut out = values(x.len() / cols * rows, 0.4);
                low_rank(x, cols, &a, &b, rows, 0.5, &mut out);
                out
            };
            let (many, few) = (run(&x), run(&x[..8 * cols]));
            let error = many.iter().zip(&few).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(error < 1e-3, "{error}");
            for n in 1..8 {
                assert_eq!(run(&x[..n * cols])[..], few[..n * rows], "{n} tokens");
            }
        }
    }
}
