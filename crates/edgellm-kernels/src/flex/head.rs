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
use crate::arch::Kernel;
use crate::arch::matmul::{ColumnsMut, MatRef};

/// Segments of the vocabulary in the backward pass.
const SEGMENTS: usize = 8;

pub(super) fn log_normalizer(hidden: Float, head: &Packed) -> Float {
    let [tokens, cols] = dims(&hidden);
    let hidden = dense(hidden);
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
    let normalizers = (0..tokens).map(|t| {
        let max = partial.iter().map(|tile| tile[t].0).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = partial.iter().map(|tile| tile[t].1 * (tile[t].0 - max).exp()).sum();
        max + sum.ln()
    });
    float(normalizers.collect(), [tokens])
}

/// The maximum, and the sum of the exponentials of the distances to it.
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
    let x = MatRef::new(slice::<f32>(&hidden), tokens, cols, cols);
    let (factor, normalizer) = (slice::<f32>(&factor), slice::<f32>(&normalizer));
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
    let target_rows = head.gather(targets);
    let target_rows = slice::<f32>(&target_rows);
    let mut out = vec![0.0; tokens * cols];
    for (i, out) in out.iter_mut().enumerate() {
        let expected: f32 = segments.iter().map(|grad| grad[i]).sum();
        *out = expected - factor[i / cols] * target_rows[i];
    }
    float(out, [tokens, cols])
}
