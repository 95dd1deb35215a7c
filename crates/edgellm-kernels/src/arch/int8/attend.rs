//! Attention of a tile of query rows over a key head's cache.
//!
//! Keys lie in blocks of 16 positions, `[position / 16][dimension][position % 16]`, so that a vector holds one dimension
//! of 16 positions and scores need no sum across lanes; values lie as `[position][dimension]`. The tile's scores are
//! the only ones that exist. A row's softmax is exact: maximum, exponentials, sum.

use core::ops::Range;

use super::Vector;
use crate::flex::exp;

/// Positions of a block of keys.
pub(crate) const KEYS: usize = 16;

/// What a cache's elements are.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    /// Codes, and a scale per position.
    Int8(&'a [i8], &'a [f32]),
}

impl Elements<'_> {
    fn holds(&self, positions: usize, dim: usize) -> bool {
        match self {
            Elements::F32(v) => v.len() >= positions * dim,
            Elements::F16(v) => v.len() >= positions * dim,
            Elements::Int8(v, scales) => v.len() >= positions * dim && scales.len() >= positions,
        }
    }

    /// Sixteen elements from `at` on, without their scales.
    ///
    /// # Safety
    /// They exist; the instruction set is `L`.
    #[inline(always)]
    unsafe fn load<L: Vector>(&self, at: usize) -> L::F {
        // SAFETY: the function's contract.
        unsafe {
            match self {
                Elements::F32(v) => L::load_f(v.as_ptr().add(at)),
                Elements::F16(v) => L::load_f16(v.as_ptr().add(at).cast()),
                Elements::Int8(v, _) => L::load_i8(v.as_ptr().add(at)),
            }
        }
    }
}

/// Attention of some rows over a key head.
pub(crate) struct Attend<'a> {
    /// `[position / 16][dim][16]`.
    pub(crate) keys: Elements<'a>,
    /// `[position][dim]`.
    pub(crate) values: Elements<'a>,
    /// A multiple of 16.
    pub(crate) dim: usize,
    /// The scaled queries, one row each: `[rows][dim]`.
    pub(crate) queries: &'a [f32],
    /// The positions that each row sees.
    pub(crate) visible: &'a [Range<usize>],
    /// `[rows][dim]`.
    pub(crate) out: &'a mut [f32],
    /// Scratch.
    pub(crate) scores: &'a mut Vec<f32>,
}

impl Attend<'_> {
    /// # Panics
    /// If the shapes disagree.
    pub(super) fn check(&self) {
        let (rows, dim) = (self.visible.len(), self.dim);
        assert!(dim > 0 && dim % KEYS == 0, "heads of {dim} dimensions");
        assert!(self.queries.len() == rows * dim && self.out.len() == rows * dim, "{rows} rows");
        let end = self.visible.iter().map(|v| v.end).max().unwrap_or(0);
        assert!(self.visible.iter().all(|v| v.start < v.end), "rows that see nothing");
        assert!(self.keys.holds(end.next_multiple_of(KEYS), dim) && self.values.holds(end, dim), "{end} positions");
    }
}

/// # Safety
/// The job was checked; the instruction set is `L`.
#[inline(always)]
pub(super) unsafe fn attend<L: Vector>(job: &mut Attend<'_>) {
    let mut first = 0;
    while first < job.visible.len() {
        let left = job.visible.len() - first;
        // SAFETY: the rows exist.
        unsafe {
            first += match left {
                12.. if L::TILE >= 12 => rows::<L, 12>(job, first),
                8.. if L::TILE >= 8 => rows::<L, 8>(job, first),
                4.. => rows::<L, 4>(job, first),
                3 => rows::<L, 3>(job, first),
                2 => rows::<L, 2>(job, first),
                _ => rows::<L, 1>(job, first),
            }
        }
    }
}

/// # Safety
/// `R` rows from `first` on exist; otherwise as [`attend`].
#[inline(always)]
unsafe fn rows<L: Vector, const R: usize>(job: &mut Attend<'_>, first: usize) -> usize {
    // The kind of elements is looked at once, not in the inner loops.
    // SAFETY: the function's contract.
    unsafe {
        match (job.keys, job.values) {
            (Elements::F16(keys), Elements::F16(values)) => {
                tile::<L, R>(job, first, Elements::F16(keys), Elements::F16(values));
            }
            (Elements::F32(keys), Elements::F32(values)) => {
                tile::<L, R>(job, first, Elements::F32(keys), Elements::F32(values));
            }
            (Elements::Int8(keys, s), Elements::Int8(values, t)) => {
                tile::<L, R>(job, first, Elements::Int8(keys, s), Elements::Int8(values, t));
            }
            (keys, values) => tile::<L, R>(job, first, keys, values),
        }
    }
    R
}

/// # Safety
/// As [`rows`].
#[inline(always)]
unsafe fn tile<L: Vector, const R: usize>(
    job: &mut Attend<'_>,
    first: usize,
    keys: Elements<'_>,
    values: Elements<'_>,
) {
    let dim = job.dim;
    let visible = &job.visible[first..first + R];
    let queries = &job.queries[first * dim..(first + R) * dim];
    let start = visible.iter().map(|v| v.start).min().unwrap_or(0) / KEYS * KEYS;
    let end = visible.iter().map(|v| v.end).max().unwrap_or(0);
    let width = (end - start).next_multiple_of(KEYS);
    // Scores `[R][width]`, weights `[width][R]`, queries `[dim][R]`.
    job.scores.resize(2 * R * width + R * dim, 0.0);
    let (scores, rest) = job.scores.split_at_mut(R * width);
    let (weights, transposed) = rest.split_at_mut(R * width);
    for (r, query) in queries.chunks_exact(dim).enumerate() {
        for (d, value) in query.iter().enumerate() {
            transposed[d * R + r] = *value;
        }
    }
    // Few rows have few sums, each of which waits for its last addition: then several blocks are under way at once.
    let mut at = start;
    while at < end {
        let out = scores[at - start..].as_mut_ptr();
        let whole = end.next_multiple_of(KEYS) - at;
        // SAFETY: the blocks up to the last visible position exist; `scores` has a place for each of them.
        at += unsafe {
            if R <= 3 && whole >= 4 * KEYS {
                score::<L, R, 4>(keys, at, dim, transposed, out, width)
            } else {
                score::<L, R, 1>(keys, at, dim, transposed, out, width)
            }
        };
    }
    let mut inverse = [0.0f32; R];
    for (r, (row, visible)) in scores.chunks_exact_mut(width).zip(visible).enumerate() {
        inverse[r] = softmax(row, visible.start - start..visible.end - start);
    }
    for (p, weights) in weights.chunks_exact_mut(R).enumerate() {
        let scale = match values {
            Elements::Int8(_, scales) if start + p < end => scales[start + p],
            _ => 1.0,
        };
        for (r, weight) in weights.iter_mut().enumerate() {
            *weight = scores[r * width + p] * scale;
        }
    }
    let out = &mut job.out[first * dim..(first + R) * dim];
    let mut d = 0;
    while d < dim {
        let out = out[d..].as_mut_ptr();
        // SAFETY: the positions up to `end` exist; `out` has `R` rows.
        d += unsafe {
            if R <= 3 && dim - d >= 4 * KEYS {
                average::<L, R, 4>(values, start..end, d, dim, weights, &inverse, out)
            } else {
                average::<L, R, 1>(values, start..end, d, dim, weights, &inverse, out)
            }
        };
    }
}

/// Scores of `W` blocks of positions from `at` on; returns their number of positions.
///
/// # Safety
/// The blocks exist; `queries` is `[dim][R]`; `out` has `16 W` places in each of `R` rows that are `stride` apart.
#[inline(always)]
unsafe fn score<L: Vector, const R: usize, const W: usize>(
    keys: Elements<'_>,
    at: usize,
    dim: usize,
    queries: &[f32],
    out: *mut f32,
    stride: usize,
) -> usize {
    // SAFETY: the function's contract.
    unsafe {
        let mut sums = [[L::splat(0.0); R]; W];
        let q = queries.as_ptr();
        for d in 0..dim {
            for (w, sums) in sums.iter_mut().enumerate() {
                let key = keys.load::<L>((at + w * KEYS) * dim + d * KEYS);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = L::fma(key, L::splat(*q.add(d * R + r)), *sum);
                }
            }
        }
        for (w, sums) in sums.into_iter().enumerate() {
            for (r, sum) in sums.into_iter().enumerate() {
                let sum = match keys {
                    Elements::Int8(_, scales) => L::mul(sum, L::load_f(scales.as_ptr().add(at + w * KEYS))),
                    _ => sum,
                };
                L::store_f(out.add(r * stride + w * KEYS), sum);
            }
        }
    }
    W * KEYS
}

/// Weighted sums of `16 W` dimensions of the values from `d` on; returns their number.
///
/// # Safety
/// The positions exist; `weights` is `[positions][R]`; `out` has `16 W` places in each of `R` rows that are `dim` apart.
#[inline(always)]
unsafe fn average<L: Vector, const R: usize, const W: usize>(
    values: Elements<'_>,
    positions: Range<usize>,
    d: usize,
    dim: usize,
    weights: &[f32],
    inverse: &[f32; R],
    out: *mut f32,
) -> usize {
    // SAFETY: the function's contract.
    unsafe {
        let mut sums = [[L::splat(0.0); R]; W];
        let mut weight = weights.as_ptr();
        for position in positions {
            for (w, sums) in sums.iter_mut().enumerate() {
                let value = values.load::<L>(position * dim + d + w * KEYS);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = L::fma(value, L::splat(*weight.add(r)), *sum);
                }
            }
            weight = weight.add(R);
        }
        for (w, sums) in sums.into_iter().enumerate() {
            for (r, sum) in sums.into_iter().enumerate() {
                L::store_f(out.add(r * dim + w * KEYS), L::mul(sum, L::splat(inverse[r])));
            }
        }
    }
    W * KEYS
}

/// Exponentials of the visible scores less their maximum, zeros elsewhere; returns the inverse of their sum.
#[inline(always)]
pub(crate) fn softmax(row: &mut [f32], visible: Range<usize>) -> f32 {
    const LANES: usize = 16;
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let mut largest = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for (largest, &score) in largest.iter_mut().zip(chunk) {
            *largest = if score > *largest { score } else { *largest };
        }
    }
    let max = largest.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut sums = [0.0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in chunks.by_ref() {
        for (sum, score) in sums.iter_mut().zip(chunk) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for score in chunks.into_remainder() {
        *score = exp(*score - max);
        sum += *score;
    }
    1.0 / sum
}
