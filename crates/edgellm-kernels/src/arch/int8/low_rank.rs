//! Products with matrices of a few rows, as low-rank updates need them.
//!
//! `m` is `[rank, n]` and lies in the first- or second-level cache; what is read once is the tokens' `[tokens, n]`. So a
//! tile of tokens (or of columns) and some rows of `m` keep their sums in registers.

use super::Vector;

/// Lanes of a vector.
const LANES: usize = 16;
/// Rows of `m` that are handled together.
const ROWS: usize = 4;
/// Tokens whose values stay in the nearest cache.
const TOKENS: usize = 32;

/// A product with a matrix of a few rows.
pub(crate) enum LowRank<'a> {
    /// `out[t, j] = factor * sum_i x[t, i] m[j, i]`.
    Down { x: &'a [f32], m: &'a [f32], rank: usize, factor: f32, out: &'a mut [f32] },
    /// `out[t, i] += sum_j u[t, j] m[j, i]`.
    Up { u: &'a [f32], m: &'a [f32], rank: usize, out: &'a mut [f32] },
    /// The same with `b` `[n, rank]`, the transpose of `m`, for few tokens; sums have the same order.
    UpFew { u: &'a [f32], b: &'a [f32], rank: usize, out: &'a mut [f32] },
    /// `out[j, i] += sum_t u[t, j] x[t, first + i]`, with `x` of `width` columns.
    Outer { u: &'a [f32], x: &'a [f32], rank: usize, width: usize, first: usize, out: &'a mut [f32] },
}

impl LowRank<'_> {
    /// # Panics
    /// If the shapes disagree.
    pub(super) fn check(&self) {
        match self {
            LowRank::Down { x, m, rank, out, .. } => {
                let n = m.len() / rank;
                assert!(*rank > 0 && m.len() == n * rank && x.len() == out.len() / rank * n && out.len() % rank == 0);
            }
            LowRank::Up { u, m, rank, out } | LowRank::UpFew { u, b: m, rank, out } => {
                let n = m.len() / rank;
                assert!(*rank > 0 && m.len() == n * rank && out.len() == u.len() / rank * n && u.len() % rank == 0);
            }
            LowRank::Outer { u, x, rank, width, first, out } => {
                let n = out.len() / rank;
                assert!(*rank > 0 && out.len() == n * rank && first + n <= *width);
                assert!(u.len() % rank == 0 && x.len() == u.len() / rank * width);
            }
        }
    }
}

/// # Safety
/// The job was checked; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn low_rank<L: Vector>(job: &mut LowRank<'_>) {
    // SAFETY: the function's contract.
    unsafe {
        match job {
            LowRank::Down { x, m, rank, factor, out } if L::TILE >= 12 => down::<L, 4>(x, m, *rank, *factor, out),
            LowRank::Down { x, m, rank, factor, out } => down::<L, 1>(x, m, *rank, *factor, out),
            LowRank::Up { u, m, rank, out } if L::TILE >= 12 => up::<L, 4>(u, m, *rank, out),
            LowRank::Up { u, m, rank, out } => up::<L, 2>(u, m, *rank, out),
            LowRank::UpFew { u, b, rank, out } => up_few::<L>(u, b, *rank, out),
            LowRank::Outer { u, x, rank, width, first, out } => outer::<L>(u, x, *rank, *width, *first, out),
        }
    }
}

/// # Safety
/// As [`low_rank`].
#[inline(always)]
unsafe fn down<L: Vector, const T: usize>(x: &[f32], m: &[f32], rank: usize, factor: f32, out: &mut [f32]) {
    let n = m.len() / rank;
    let mut tiles = x.chunks_exact(T * n).zip(out.chunks_exact_mut(T * rank));
    for (x, out) in tiles.by_ref() {
        // SAFETY: `T` tokens of `n` values.
        unsafe { down_tile::<L, T>(x, m, rank, factor, out) };
    }
    let whole = out.len() / (T * rank) * T;
    for (x, out) in x[whole * n..].chunks_exact(n).zip(out[whole * rank..].chunks_exact_mut(rank)) {
        // SAFETY: a token of `n` values.
        unsafe { down_tile::<L, 1>(x, m, rank, factor, out) };
    }
}

/// # Safety
/// `x` is `[T, n]`, `m` `[rank, n]`, `out` `[T, rank]`; the instruction set is `L`.
#[inline(always)]
unsafe fn down_tile<L: Vector, const T: usize>(x: &[f32], m: &[f32], rank: usize, factor: f32, out: &mut [f32]) {
    let n = m.len() / rank;
    let mut first = 0;
    while first < rank {
        // SAFETY: the rows exist.
        unsafe {
            first += if rank - first >= ROWS {
                down_rows::<L, T, ROWS>(x, &m[first * n..], n, factor, &mut out[first..], rank)
            } else {
                down_rows::<L, T, 1>(x, &m[first * n..], n, factor, &mut out[first..], rank)
            };
        }
    }
}

/// # Safety
/// `x` is `[T, n]`, `m` has `R` rows, `out` `T` rows that are `rank` apart; the instruction set is `L`.
#[inline(always)]
unsafe fn down_rows<L: Vector, const T: usize, const R: usize>(
    x: &[f32],
    m: &[f32],
    n: usize,
    factor: f32,
    out: &mut [f32],
    rank: usize,
) -> usize {
    // SAFETY: the function's contract; `i + 16 <= n`.
    unsafe {
        let mut sums = [[L::splat(0.0); R]; T];
        let mut i = 0;
        while i + LANES <= n {
            let rows: [L::F; R] = core::array::from_fn(|r| L::load_f(m.as_ptr().add(r * n + i)));
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = L::load_f(x.as_ptr().add(t * n + i));
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum = L::fma(x, row, *sum);
                }
            }
            i += LANES;
        }
        for (t, sums) in sums.into_iter().enumerate() {
            for (r, sum) in sums.into_iter().enumerate() {
                let mut lanes = [0.0f32; LANES];
                L::store_f(lanes.as_mut_ptr(), sum);
                let rest: f32 = (i..n).map(|i| x[t * n + i] * m[r * n + i]).sum();
                out[t * rank + r] = factor * (pairwise(lanes) + rest);
            }
        }
    }
    R
}

/// The sum of sixteen values, by halves.
#[inline(always)]
fn pairwise(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// # Safety
/// As [`low_rank`].
#[inline(always)]
unsafe fn up<L: Vector, const T: usize>(u: &[f32], m: &[f32], rank: usize, out: &mut [f32]) {
    let n = m.len() / rank;
    for (u, out) in u.chunks_exact(T * rank).zip(out.chunks_exact_mut(T * n)) {
        // SAFETY: `T` tokens.
        unsafe { up_tile::<L, T>(u, m, rank, n, out) };
    }
    let whole = u.len() / (T * rank) * T;
    for (u, out) in u[whole * rank..].chunks_exact(rank).zip(out[whole * n..].chunks_exact_mut(n)) {
        // SAFETY: a token.
        unsafe { up_tile::<L, 1>(u, m, rank, n, out) };
    }
}

/// # Safety
/// `u` is `[T, rank]`, `m` `[rank, n]`, `out` `[T, n]`; the instruction set is `L`.
#[inline(always)]
unsafe fn up_tile<L: Vector, const T: usize>(u: &[f32], m: &[f32], rank: usize, n: usize, out: &mut [f32]) {
    let mut i = 0;
    while i + LANES <= n {
        // SAFETY: the function's contract; `i + 16 <= n`.
        unsafe {
            let mut sums: [L::F; T] = core::array::from_fn(|t| L::load_f(out.as_ptr().add(t * n + i)));
            for j in 0..rank {
                let row = L::load_f(m.as_ptr().add(j * n + i));
                for (t, sum) in sums.iter_mut().enumerate() {
                    *sum = L::fma(row, L::splat(*u.as_ptr().add(t * rank + j)), *sum);
                }
            }
            for (t, sum) in sums.into_iter().enumerate() {
                L::store_f(out.as_mut_ptr().add(t * n + i), sum);
            }
        }
        i += LANES;
    }
    for t in 0..T {
        for i in i..n {
            for j in 0..rank {
                out[t * n + i] = L::fma_one(m[j * n + i], u[t * rank + j], out[t * n + i]);
            }
        }
    }
}

#[inline(always)]
fn up_few<L: Vector>(u: &[f32], b: &[f32], rank: usize, out: &mut [f32]) {
    for (u, out) in u.chunks_exact(rank).zip(out.chunks_exact_mut(b.len() / rank)) {
        for (out, b) in out.iter_mut().zip(b.chunks_exact(rank)) {
            for (b, u) in b.iter().zip(u) {
                *out = L::fma_one(*b, *u, *out);
            }
        }
    }
}

/// # Safety
/// As [`low_rank`].
#[inline(always)]
unsafe fn outer<L: Vector>(u: &[f32], x: &[f32], rank: usize, width: usize, first: usize, out: &mut [f32]) {
    let n = out.len() / rank;
    for (u, x) in u.chunks(TOKENS * rank).zip(x.chunks(TOKENS * width)) {
        let mut i = 0;
        while i + LANES <= n {
            let columns = &x[first + i..];
            // Neighbouring cache lines are read together.
            // SAFETY: the columns exist.
            i += unsafe {
                if L::TILE >= 12 && i + 4 * LANES <= n {
                    outer_columns::<L, 4>(u, columns, rank, width, &mut out[i..], n)
                } else {
                    outer_columns::<L, 1>(u, columns, rank, width, &mut out[i..], n)
                }
            };
        }
        for i in i..n {
            for j in 0..rank {
                let products = u.chunks(rank).zip(x.chunks(width)).map(|(u, x)| u[j] * x[first + i]);
                out[j * n + i] += products.sum::<f32>();
            }
        }
    }
}

/// `16 W` columns of all rows of the result; returns their number.
///
/// # Safety
/// `u` and `x` are the first of rows that are `rank` and `width` apart, as many; the columns of `x` and of `out`, whose
/// rows are `n` apart, exist; the instruction set is `L`.
#[inline(always)]
unsafe fn outer_columns<L: Vector, const W: usize>(
    u: &[f32],
    x: &[f32],
    rank: usize,
    width: usize,
    out: &mut [f32],
    n: usize,
) -> usize {
    let mut j = 0;
    while j < rank {
        // SAFETY: the function's contract.
        unsafe {
            j += if rank - j >= ROWS {
                outer_tile::<L, ROWS, W>(&u[j..], x, rank, width, &mut out[j * n..], n)
            } else {
                outer_tile::<L, 1, W>(&u[j..], x, rank, width, &mut out[j * n..], n)
            };
        }
    }
    W * LANES
}

/// `R` rows and `16 W` columns of the result; returns the rows.
///
/// # Safety
/// As [`outer_columns`], with `R` rows of `out`.
#[inline(always)]
unsafe fn outer_tile<L: Vector, const R: usize, const W: usize>(
    u: &[f32],
    x: &[f32],
    rank: usize,
    width: usize,
    out: &mut [f32],
    n: usize,
) -> usize {
    // SAFETY: the function's contract.
    unsafe {
        let at = |r: usize, w: usize| r * n + w * LANES;
        let load = |r: usize| core::array::from_fn(|w| L::load_f(out.as_ptr().add(at(r, w))));
        let mut sums: [[L::F; W]; R] = core::array::from_fn(load);
        for t in 0..u.len().div_ceil(rank) {
            let x: [L::F; W] = core::array::from_fn(|w| L::load_f(x.as_ptr().add(t * width + w * LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let u = L::splat(*u.as_ptr().add(t * rank + r));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = L::fma(x, u, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (w, sum) in sums.into_iter().enumerate() {
                L::store_f(out.as_mut_ptr().add(at(r, w)), sum);
            }
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::{Isa, Kernel};

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 48.0 - 1.0).collect()
    }

    fn close(found: &[f32], expected: &[f32], what: &str) {
        for (i, (a, b)) in found.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{what}, {i}: {a} is not {b}");
        }
    }

    #[test]
    fn products_are_those_of_plain_loops() {
        for isa in Isa::available() {
            let kernel = Kernel::new(isa).unwrap();
            for (tokens, n, rank) in [(1, 16, 1), (3, 64, 8), (7, 50, 5), (70, 48, 16), (33, 31, 3), (5, 150, 8)] {
                let (x, m, u) = (values(tokens * n, 1), values(rank * n, 2), values(tokens * rank, 3));
                let what = format!("{isa}, {tokens} tokens, {n} values, rank {rank}");
                let mut out = vec![0.0; tokens * rank];
                LowRank::Down { x: &x, m: &m, rank, factor: 0.5, out: &mut out }.run(kernel);
                let dot = |t: usize, j: usize| (0..n).map(|i| x[t * n + i] * m[j * n + i]).sum::<f32>();
                let expected: Vec<f32> = (0..tokens * rank).map(|i| 0.5 * dot(i / rank, i % rank)).collect();
                close(&out, &expected, &what);

                let mut out = values(tokens * n, 4);
                let sum = |t: usize, i: usize| (0..rank).map(|j| u[t * rank + j] * m[j * n + i]).sum::<f32>();
                let expected: Vec<f32> = (0..tokens * n).map(|i| out[i] + sum(i / n, i % n)).collect();
                LowRank::Up { u: &u, m: &m, rank, out: &mut out }.run(kernel);
                close(&out, &expected, &what);

                let (first, part) = (n / 3, n - n / 3);
                let mut out = values(rank * part, 5);
                let sum = |j: usize, i: usize| (0..tokens).map(|t| u[t * rank + j] * x[t * n + first + i]).sum::<f32>();
                let expected: Vec<f32> = (0..rank * part).map(|i| out[i] + sum(i / part, i % part)).collect();
                LowRank::Outer { u: &u, x: &x, rank, width: n, first, out: &mut out }.run(kernel);
                close(&out, &expected, &what);
            }
        }
    }
}
