//! The output head's cross entropy, a tile of the vocabulary at a time.
//!
//! Forward: every task computes the logits of a tile and reduces them to a maximum and a sum per token; the tiles are
//! combined in order. Backward: the vocabulary is cut into a fixed number of segments; a task computes the logits of
//! its segment's tiles again, turns them into probabilities and adds `p W` to its own gradient; the segments'
//! gradients are added in order.

use rayon::prelude::*;

use super::exp::exp;
use super::linear::{decode, tile_rows};
use super::{Float, Packed, dense, dims, float, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, Part, Task, Tokens8, vectorized};
use crate::panels::Panels;

/// Panels of a tile of a prepared head.
const TILE_PANELS: usize = 16;
/// Segments of the vocabulary in the backward pass.
const SEGMENTS: usize = 8;

pub(super) fn log_normalizer(hidden: Float, head: &Packed) -> Float {
    let [tokens, cols] = dims(&hidden);
    let hidden = dense(hidden);
    if let Some(panels) = head.panels() {
        return float(prepared_normalizer(slice::<f32>(&hidden), panels), [tokens]);
    }
    let x = MatRef::new(slice::<f32>(&hidden), tokens, cols, cols);
    let (kernel, w, vocabulary) = (Kernel::active(), head.rows(), head.layout.rows);
    let tile = tile_rows(cols);
    let partial: Vec<Vec<(f32, f32)>> = (0..vocabulary.div_ceil(tile))
        .into_par_iter()
        .map_init(Default::default, |(buffer, logits): &mut (Vec<f32>, Vec<f32>), i| {
            let rows = i * tile..((i + 1) * tile).min(vocabulary);
            let n = rows.len();
            logits.resize(tokens * n, 0.0);
            let w = decode(kernel, w, rows, buffer);
            ColumnsMut::whole(logits, tokens, n, n).product(x, w.t(), 1.0, false);
            logits.chunks(n).map(max_and_sum).collect()
        })
        .collect();
    float(combine(&partial, tokens), [tokens])
}

/// Tiles of a prepared head: panels of 16 rows, and columns of logits.
struct Tiles<'a> {
    head: Panels<'a>,
    x: Tokens8,
}

impl<'a> Tiles<'a> {
    fn new(head: Panels<'a>, hidden: &[f32]) -> Self {
        Tiles { head, x: Tokens8::new(Kernel::active(), hidden, head.layout().cols) }
    }

    fn count(&self) -> usize {
        self.head.layout().panels().div_ceil(TILE_PANELS)
    }

    /// A tile of the head, and its logits, `[tokens, rows]`.
    fn logits(&self, tile: usize, logits: &mut Vec<f32>) -> Panels<'a> {
        let last = self.head.layout().panels();
        let part = self.head.part(tile * TILE_PANELS..((tile + 1) * TILE_PANELS).min(last));
        let (tokens, rows, panels) = (self.x.count(), part.layout().rows, part.layout().panels());
        logits.resize(tokens * rows, 0.0);
        let out = ColumnsMut::whole(logits, tokens, rows, rows);
        let part_of = Part::Forward;
        Task { matrix: part, x: &self.x, part: part_of, range: 0..panels, out, accumulate: false }
            .run(Kernel::active());
        part
    }
}

fn prepared_normalizer(hidden: &[f32], head: Panels<'_>) -> Vec<f32> {
    let (kernel, tiles) = (Kernel::active(), Tiles::new(head, hidden));
    let mut partial: Vec<Vec<(f32, f32)>> = vec![Vec::new(); tiles.count()];
    for_each_mut(&mut partial, |tile, partial| {
        let mut logits = Vec::new();
        let rows = tiles.logits(tile, &mut logits).layout().rows;
        *partial = vectorized(kernel, || logits.chunks(rows).map(max_and_sum).collect());
    });
    combine(&partial, tiles.x.count())
}

/// The logarithms of the normalizers of all tiles.
fn combine(partial: &[Vec<(f32, f32)>], tokens: usize) -> Vec<f32> {
    let of_token = |t: usize| {
        let max = partial.iter().map(|tile| tile[t].0).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = partial.iter().map(|tile| tile[t].1 * (tile[t].0 - max).exp()).sum();
        max + sum.ln()
    };
    (0..tokens).map(of_token).collect()
}

/// `sum_v factor[t] p[t, v] W[v]`.
fn prepared_expectation(hidden: &[f32], head: Panels<'_>, factor: &[f32], normalizer: &[f32]) -> Vec<f32> {
    let (kernel, tiles, cols) = (Kernel::active(), Tiles::new(head, hidden), head.layout().cols);
    let (tokens, per_segment) = (tiles.x.count(), tiles.count().div_ceil(SEGMENTS));
    let mut segments: Vec<Vec<f32>> = vec![Vec::new(); tiles.count().div_ceil(per_segment)];
    for_each_mut(&mut segments, |segment, grad| {
        grad.resize(tokens * cols, 0.0);
        let mut p = Vec::new();
        for tile in segment * per_segment..((segment + 1) * per_segment).min(tiles.count()) {
            let matrix = tiles.logits(tile, &mut p);
            let rows = matrix.layout().rows;
            vectorized(kernel, || {
                for (t, row) in p.chunks_mut(rows).enumerate() {
                    row.iter_mut().for_each(|logit| *logit = exp(*logit - normalizer[t]) * factor[t]);
                }
            });
            let p = Tokens8::new(kernel, &p, rows);
            let out = ColumnsMut::whole(grad, tokens, cols, cols);
            let range = 0..matrix.blocks();
            Task { matrix, x: &p, part: Part::Backward, range, out, accumulate: true }.run(kernel);
        }
    });
    let (first, rest) = segments.split_first_mut().expect("a vocabulary");
    for segment in rest {
        first.iter_mut().zip(segment).for_each(|(sum, value)| *sum += *value);
    }
    core::mem::take(first)
}

/// The maximum, and the sum of the exponentials of the distances to it.
#[inline(always)]
fn max_and_sum(logits: &[f32]) -> (f32, f32) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; 16];
    for chunk in logits.chunks(16) {
        for (sum, &logit) in sums.iter_mut().zip(chunk) {
            *sum += exp(logit - max);
        }
    }
    (max, sums.iter().sum())
}

pub(super) fn backward(hidden: Float, head: &Packed, targets: &[usize], factor: Float, log_normalizer: Float) -> Float {
    let [tokens, cols] = dims(&hidden);
    let (hidden, factor, normalizer) = (dense(hidden), dense(factor), dense(log_normalizer));
    let (factor, normalizer) = (slice::<f32>(&factor), slice::<f32>(&normalizer));
    let mut out = match head.panels() {
        Some(panels) => prepared_expectation(slice::<f32>(&hidden), panels, factor, normalizer),
        None => expectation(slice::<f32>(&hidden), head, factor, normalizer),
    };
    let target_rows = head.gather(targets);
    let target_rows = slice::<f32>(&target_rows);
    for (i, out) in out.iter_mut().enumerate() {
        *out -= factor[i / cols] * target_rows[i];
    }
    float(out, [tokens, cols])
}

/// `sum_v factor[t] p[t, v] W[v]`, with activations in `f32`.
fn expectation(hidden: &[f32], head: &Packed, factor: &[f32], normalizer: &[f32]) -> Vec<f32> {
    let cols = head.layout.cols;
    let tokens = hidden.len() / cols;
    let x = MatRef::new(hidden, tokens, cols, cols);
    let (kernel, w, vocabulary) = (Kernel::active(), head.rows(), head.layout.rows);
    let tile = tile_rows(cols);
    let per_segment = vocabulary.div_ceil(tile).div_ceil(SEGMENTS) * tile;
    let segments: Vec<Vec<f32>> = (0..vocabulary.div_ceil(per_segment))
        .into_par_iter()
        .map(|segment| {
            let (mut buffer, mut p, mut grad) = (Vec::new(), Vec::new(), vec![0.0; tokens * cols]);
            let end = ((segment + 1) * per_segment).min(vocabulary);
            for start in (segment * per_segment..end).step_by(tile) {
                let rows = start..(start + tile).min(end);
                let n = rows.len();
                p.resize(tokens * n, 0.0);
                let w = decode(kernel, w, rows, &mut buffer);
                ColumnsMut::whole(&mut p, tokens, n, n).product(x, w.t(), 1.0, false);
                for (t, row) in p.chunks_mut(n).enumerate() {
                    row.iter_mut().for_each(|logit| *logit = exp(*logit - normalizer[t]) * factor[t]);
                }
                let p = MatRef::new(&p, tokens, n, n);
                ColumnsMut::whole(&mut grad, tokens, cols, cols).product(p, w, 1.0, true);
            }
            grad
        })
        .collect();
    (0..tokens * cols).map(|i| segments.iter().map(|grad| grad[i]).sum()).collect()
}
