//! Low-rank updates on slices, on several threads.
//!
//! What a token gets does not depend on the tokens that it is run with: every sum has one order.

use crate::arch::pool::{for_each_mut, threads};
use crate::arch::{Kernel, LowRank};
use crate::flex::TASK;

/// `out[t, j] = factor * sum_i x[t, i] m[j, i]`, with `m` `[rank, n]`.
pub(super) fn down(kernel: Kernel, x: &[f32], m: &[f32], rank: usize, factor: f32, out: &mut Vec<f32>) {
    let n = m.len() / rank;
    out.resize(x.len() / n * rank, 0.0);
    let per_item = (TASK / n).max(1);
    let mut items: Vec<_> = x.chunks(per_item * n).zip(out.chunks_mut(per_item * rank)).collect();
    for_each_mut(&mut items, |_, (x, out)| LowRank::Down { x, m, rank, factor, out }.run(kernel));
}

/// `out[t, i] += sum_j u[t, j] m[j, i]`, with `m` `[rank, n]`.
pub(super) fn up(kernel: Kernel, u: &[f32], m: &[f32], rank: usize, out: &mut [f32]) {
    let n = m.len() / rank;
    let per_item = (TASK / n).max(1);
    let mut items: Vec<_> = u.chunks(per_item * rank).zip(out.chunks_mut(per_item * n)).collect();
    for_each_mut(&mut items, |_, (u, out)| LowRank::Up { u, m, rank, out }.run(kernel));
}

/// `out[t, i] += sum_j u[t, j] b[i, j]`, with `b` `[n, rank]`, for a few tokens; added in the order of [`up`].
pub(super) fn up_few(kernel: Kernel, u: &[f32], b: &[f32], rank: usize, out: &mut [f32]) {
    LowRank::UpFew { u, b, rank, out }.run(kernel);
}

/// `out[j, i] += sum_t u[t, j] x[t, i]`, with `x` `[tokens, n]`. Every sum has one order, whatever the threads.
pub(super) fn outer(kernel: Kernel, u: &[f32], x: &[f32], rank: usize, out: &mut [f32]) {
    let tokens = u.len() / rank;
    let width = x.len() / tokens;
    if threads() == 1 {
        return LowRank::Outer { u, x, rank, width, first: 0, out }.run(kernel);
    }
    // Columns are cut into parts of their own, which are added to the rows afterwards.
    let part = width.div_ceil(2 * threads()).next_multiple_of(16);
    let mut items: Vec<_> = (0..width)
        .step_by(part)
        .map(|first| {
            let n = part.min(width - first);
            let rows: Vec<f32> = (0..rank).flat_map(|j| out[j * width + first..][..n].iter().copied()).collect();
            (first, n, rows)
        })
        .collect();
    for_each_mut(&mut items, |_, (first, _, out)| {
        LowRank::Outer { u, x, rank, width, first: *first, out }.run(kernel);
    });
    for (first, n, rows) in items {
        for (j, row) in rows.chunks_exact(n).enumerate() {
            out[j * width + first..][..n].copy_from_slice(row);
        }
    }
}

/// The transpose of `m`, `[rows, cols]`.
pub(super) fn transposed(m: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    for (i, row) in m.chunks_exact(cols).enumerate() {
        for (j, value) in row.iter().enumerate() {
            out[j * rows + i] = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + seed).sin()).collect()
    }

    #[test]
    fn a_token_does_not_depend_on_its_company() {
        let kernel = Kernel::active();
        for (cols, rows, rank) in [(576, 192, 8), (48, 37, 5), (33, 16, 16)] {
            let (x, a, b) = (values(12 * cols, 0.1), values(rank * cols, 0.2), values(rows * rank, 0.3));
            let run = |tokens: usize, few: bool| {
                let (mut u, mut out) = (Vec::new(), values(tokens * rows, 0.4));
                down(kernel, &x[..tokens * cols], &a, rank, 0.5, &mut u);
                match few {
                    true => up_few(kernel, &u, &b, rank, &mut out),
                    false => up(kernel, &u, &transposed(&b, rows, rank), rank, &mut out),
                }
                out
            };
            let all = run(12, false);
            for tokens in 1..12 {
                assert_eq!(run(tokens, false)[..], all[..tokens * rows], "{tokens} tokens");
                assert_eq!(run(tokens, true)[..], all[..tokens * rows], "{tokens} tokens, few");
            }
        }
    }
}
