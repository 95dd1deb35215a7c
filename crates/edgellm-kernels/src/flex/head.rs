//! The output head's cross entropy, a tile of the vocabulary at a time.
//!
//! Forward: every task computes the logits of a tile and reduces them to a maximum and a sum per token; the tiles are
//! combined in order. Backward: the vocabulary is cut into a fixed number of segments; a task computes the logits of
//! its segment's tiles again, turns them into probabilities and adds `p W` to its own gradient; the segments'
//! gradients are added in order.
//!
//! Where both are wanted at once ([`head_loss`]), a few tokens at a time keep their logits in between, so that nothing
//! is computed twice.

mod divergence;

use burn::backend::Flex;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::exp::exp;
use super::linear::{decode, tile_rows};
use super::{Float, Packed, dense, dims, float, pointwise, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, Part, Task, Tokens8, vectorized};
use crate::format::PANEL_ROWS;
use crate::matrix::PackedMatrix;
use crate::panels::Panels;

pub use divergence::{HeadView, head_divergence};

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

    /// A tile of the head.
    fn part(&self, tile: usize) -> Panels<'a> {
        let last = self.head.layout().panels();
        self.head.part(tile * TILE_PANELS..((tile + 1) * TILE_PANELS).min(last))
    }

    /// A tile of the head, and its logits, `[tokens, rows]`.
    fn logits(&self, tile: usize, logits: &mut Vec<f32>) -> Panels<'a> {
        let part = self.part(tile);
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
        maxima_and_sums(kernel, &logits, rows, partial);
    });
    combine(&partial, tiles.x.count())
}

/// The logarithms of the normalizers of all tiles.
fn combine(partial: &[impl AsRef<[(f32, f32)]>], tokens: usize) -> Vec<f32> {
    let of_token = |t: usize| {
        let max = partial.iter().map(|tile| tile.as_ref()[t].0).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = partial.iter().map(|tile| tile.as_ref()[t]).map(|(top, sum)| sum * (top - max).exp()).sum();
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

/// Tokens whose logits [`head_loss`] keeps.
pub const HEAD_CHUNK: usize = 64;

/// What [`head_loss`] computes.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadLoss {
    /// `weight * sum_t -log p(targets[t])`.
    pub loss: f64,
    /// Its gradient with respect to the hidden states, `[tokens, d]`.
    pub d_hidden: Vec<f32>,
    /// And with respect to the norm, `[d]`.
    pub d_norm: Vec<f32>,
}

/// The cross entropy of a packed head behind a root-mean-square norm, and its gradients, on the CPU.
///
/// # Shapes
/// `hidden`: `[tokens, d]`; `norm`: `[d]`; `head`: `[vocabulary, d]`; `targets`: a token id for each token.
///
/// # Panics
/// If shapes disagree, a target is outside the vocabulary, or something is not on the CPU device.
pub fn head_loss(
    hidden: &[f32],
    norm: &Tensor<1>,
    eps: f64,
    head: &PackedMatrix,
    targets: &[u32],
    weight: f32,
) -> HeadLoss {
    let packed = head.host().expect("a head on the CPU device");
    let cols = packed.layout.cols;
    assert_eq!(hidden.len(), targets.len() * cols, "hidden states of the targets");
    let norm = dense(norm.clone().try_into_primitive::<Flex>().expect("a norm on the CPU device"));
    let x = float(hidden.to_vec(), [targets.len(), cols]);
    let normed = pointwise::rms_norm(x.clone(), norm.clone(), eps);
    let mut loss = 0.0;
    let mut gradient = Vec::with_capacity(hidden.len());
    let chunks = slice::<f32>(&normed).chunks(HEAD_CHUNK * cols).zip(targets.chunks(HEAD_CHUNK));
    let mut tiles = Vec::new();
    for (hidden, targets) in chunks {
        let targets: Vec<usize> = targets.iter().map(|&id| id as usize).collect();
        let part = Chunk::new(packed, hidden, targets);
        let (sum, normalizers) = part.forward(&mut tiles);
        loss += sum;
        gradient.extend(part.backward(&mut tiles, &normalizers, weight));
    }
    let dy = float(gradient, [targets.len(), cols]);
    let (dx, dw) = pointwise::rms_norm_backward(x, norm, dy, eps);
    let values = |t: Float| slice::<f32>(&dense(t)).to_vec();
    HeadLoss { loss: f64::from(weight) * loss, d_hidden: values(dx), d_norm: values(dw) }
}

/// Logits of a tile of the vocabulary, `[tokens, rows]`, or their exponentials, with their maxima and sums.
#[derive(Default)]
struct TileLogits {
    logits: Vec<f32>,
    partial: Vec<(f32, f32)>,
    /// Tokens whose target lies in the tile, and its logit.
    picked: Vec<(usize, f32)>,
}

/// Some tokens before a head.
struct Chunk<'a> {
    head: &'a Packed,
    /// The rounded tokens, if the head is prepared.
    prepared: Option<Tiles<'a>>,
    x: MatRef<'a>,
    targets: Vec<usize>,
    /// Vocabulary of a tile.
    tile: usize,
}

impl<'a> Chunk<'a> {
    fn new(head: &'a Packed, hidden: &'a [f32], targets: Vec<usize>) -> Self {
        let cols = head.layout.cols;
        let prepared = head.panels().map(|panels| Tiles::new(panels, hidden));
        let tile = if prepared.is_some() { TILE_PANELS * PANEL_ROWS } else { tile_rows(cols) };
        Chunk { head, prepared, x: MatRef::new(hidden, targets.len(), cols, cols), targets, tile }
    }

    fn rows(&self, tile: usize) -> core::ops::Range<usize> {
        tile * self.tile..((tile + 1) * self.tile).min(self.head.layout.rows)
    }

    /// Leaves the exponentials of all logits less their tile's maximum, and returns the losses' sum and the logarithms of
    /// the normalizers.
    fn forward(&self, tiles: &mut Vec<TileLogits>) -> (f64, Vec<f32>) {
        let (kernel, tokens) = (Kernel::active(), self.targets.len());
        tiles.resize_with(self.head.layout.rows.div_ceil(self.tile), TileLogits::default);
        for_each_mut(tiles, |tile, out| {
            let rows = self.rows(tile);
            match &self.prepared {
                Some(tiles) => drop(tiles.logits(tile, &mut out.logits)),
                None => {
                    let (mut buffer, n) = (Vec::new(), rows.len());
                    out.logits.resize(tokens * n, 0.0);
                    let w = decode(kernel, self.head.rows(), rows.clone(), &mut buffer);
                    ColumnsMut::whole(&mut out.logits, tokens, n, n).product(self.x, w.t(), 1.0, false);
                }
            }
            out.picked.clear();
            for (t, target) in self.targets.iter().enumerate().filter(|(_, target)| rows.contains(target)) {
                out.picked.push((t, out.logits[t * rows.len() + target - rows.start]));
            }
            exponentials(kernel, &mut out.logits, rows.len(), &mut out.partial);
        });
        let partial: Vec<&[(f32, f32)]> = tiles.iter().map(|t| t.partial.as_slice()).collect();
        let normalizers = combine(&partial, tokens);
        let mut picked = vec![0.0; tokens];
        tiles.iter().flat_map(|tile| &tile.picked).for_each(|&(t, logit)| picked[t] = logit);
        let loss = normalizers.iter().zip(picked).map(|(normalizer, logit)| f64::from(normalizer - logit)).sum();
        (loss, normalizers)
    }

    /// `factor * sum_v (p[t, v] - [v = target]) W[v]`.
    fn backward(&self, tiles: &mut [TileLogits], normalizers: &[f32], factor: f32) -> Vec<f32> {
        let (kernel, tokens, cols) = (Kernel::active(), self.targets.len(), self.head.layout.cols);
        let per_segment = tiles.len().div_ceil(SEGMENTS);
        let mut segments: Vec<(&mut [TileLogits], Vec<f32>)> =
            tiles.chunks_mut(per_segment).map(|tiles| (tiles, vec![0.0; tokens * cols])).collect();
        for_each_mut(&mut segments, |segment, (tiles, gradient)| {
            let (mut p8, mut buffer) = (Tokens8::default(), Vec::new());
            for (i, tile) in tiles.iter_mut().enumerate() {
                let rows = self.rows(segment * per_segment + i);
                let (p, n) = (&mut tile.logits, rows.len());
                vectorized(kernel, || {
                    for ((p, (top, _)), normalizer) in p.chunks_exact_mut(n).zip(&tile.partial).zip(normalizers) {
                        let scale = exp(top - normalizer) * factor;
                        p.iter_mut().for_each(|value| *value *= scale);
                    }
                });
                let mut out = ColumnsMut::whole(gradient, tokens, cols, cols);
                match &self.prepared {
                    Some(tiles) => {
                        let matrix = tiles.part(segment * per_segment + i);
                        p8.fill(kernel, p, n);
                        let range = 0..matrix.blocks();
                        Task { matrix, x: &p8, part: Part::Backward, range, out, accumulate: true }.run(kernel);
                    }
                    None => {
                        let w = decode(kernel, self.head.rows(), rows, &mut buffer);
                        out.product(MatRef::new(p, tokens, n, n), w, 1.0, true);
                    }
                }
            }
        });
        let (mut first, rest) = {
            let mut gradients = segments.into_iter().map(|(_, gradient)| gradient);
            (gradients.next().expect("a vocabulary"), gradients)
        };
        for gradient in rest {
            first.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
        }
        let target_rows = self.head.gather(&self.targets);
        for (out, row) in first.iter_mut().zip(slice::<f32>(&target_rows)) {
            *out -= factor * row;
        }
        first
    }
}

/// [`max_and_sum`] of every row.
fn maxima_and_sums(kernel: Kernel, logits: &[f32], width: usize, out: &mut Vec<(f32, f32)>) {
    out.clear();
    out.resize(logits.len() / width, (0.0, 0.0));
    // A loop, not `collect`, which would not be compiled for the instruction set.
    vectorized(kernel, || {
        for (out, row) in out.iter_mut().zip(logits.chunks_exact(width)) {
            *out = max_and_sum(row);
        }
    });
}

/// Turns the logits of every row into the exponentials of their distances to the row's maximum, and tells that and their
/// sum.
fn exponentials(kernel: Kernel, logits: &mut [f32], width: usize, out: &mut Vec<(f32, f32)>) {
    out.clear();
    out.resize(logits.len() / width, (0.0, 0.0));
    vectorized(kernel, || {
        for (out, row) in out.iter_mut().zip(logits.chunks_exact_mut(width)) {
            let max = maximum(row);
            let mut sums = [0.0f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
            for chunk in chunks.by_ref() {
                for (sum, value) in sums.iter_mut().zip(chunk) {
                    *value = exp(*value - max);
                    *sum += *value;
                }
            }
            for (sum, value) in sums.iter_mut().zip(chunks.into_remainder()) {
                *value = exp(*value - max);
                *sum += *value;
            }
            *out = (max, sums.iter().sum());
        }
    });
}

/// Values that are handled together.
const LANES: usize = 16;

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

/// The maximum, and the sum of the exponentials of the distances to it.
#[inline(always)]
fn max_and_sum(logits: &[f32]) -> (f32, f32) {
    let max = maximum(logits);
    let (whole, rest) = logits.split_at(logits.len() / LANES * LANES);
    let mut sums = [0.0f32; LANES];
    for chunk in whole.chunks_exact(LANES) {
        for (sum, &logit) in sums.iter_mut().zip(chunk) {
            *sum += exp(logit - max);
        }
    }
    for (sum, &logit) in sums.iter_mut().zip(rest) {
        *sum += exp(logit - max);
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
