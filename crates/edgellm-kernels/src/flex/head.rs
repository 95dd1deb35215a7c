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
mod softmax;
mod tiles;

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::exp::exp;
use super::{Float, Packed, dense, dims, float, pointwise, slice};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, vectorized};
use crate::matrix::PackedMatrix;
use softmax::{MaximaAndSums, exponentials, maxima_and_sums, normalizers};
use tiles::{Tiles, tile_of};

pub use divergence::{HeadView, head_divergence};

pub(super) fn log_normalizer(hidden: Float, head: &Packed) -> Float {
    let hidden = dense(hidden);
    let tiles = Tiles::new(head, slice::<f32>(&hidden), tile_of(head));
    let mut partial: Vec<MaximaAndSums> = vec![Vec::new(); tiles.count()];
    for_each_mut(&mut partial, |tile, partial| {
        let mut logits = Vec::new();
        let rows = tiles.logits(tile, &mut logits);
        maxima_and_sums(Kernel::active(), &mut logits, rows, partial);
    });
    float(normalizers(partial.iter(), tiles.tokens()), [tiles.tokens()])
}

pub(super) fn backward(hidden: Float, head: &Packed, targets: &[usize], factor: Float, log_normalizer: Float) -> Float {
    let shape = dims::<2>(&hidden);
    let (hidden, factor, normalizer) = (dense(hidden), dense(factor), dense(log_normalizer));
    let (factor, normalizer) = (slice::<f32>(&factor), slice::<f32>(&normalizer));
    let tiles = Tiles::new(head, slice::<f32>(&hidden), tile_of(head));
    // The logits again: to keep them since the forward pass would take tokens x vocabulary.
    let mut out = tiles.backward(&mut vec![(); tiles.count()], |tile, (), add| {
        let mut p = Vec::new();
        let rows = tiles.logits(tile, &mut p);
        vectorized(Kernel::active(), || {
            for (t, row) in p.chunks_exact_mut(rows).enumerate() {
                row.iter_mut().for_each(|logit| *logit = exp(*logit - normalizer[t]) * factor[t]);
            }
        });
        add(&p);
    });
    tiles.subtract_targets(&mut out, targets, |t| factor[t]);
    float(out, shape)
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
    let view = HeadView { hidden, norm, head, eps };
    let side = Side::new(&view);
    assert_eq!(hidden.len(), targets.len() * side.cols(), "hidden states of the targets");
    let mut loss = 0.0;
    let mut gradient = Vec::with_capacity(hidden.len());
    let mut logits = Vec::new();
    for (chunk, targets) in targets.chunks(HEAD_CHUNK).enumerate() {
        let targets: Vec<usize> = targets.iter().map(|&id| id as usize).collect();
        let tiles = side.tiles(chunk * HEAD_CHUNK, targets.len(), tile_of(side.head));
        let part = Chunk { tiles, targets };
        let (sum, normalizers) = part.forward(&mut logits);
        loss += sum;
        gradient.extend(part.backward(&mut logits, &normalizers, weight));
    }
    side.through_norm(f64::from(weight) * loss, gradient)
}

/// Normed hidden states before a packed head.
struct Side<'a> {
    head: &'a Packed,
    hidden: Float,
    norm: Float,
    eps: f64,
    normed: Float,
}

impl<'a> Side<'a> {
    fn new(view: &HeadView<'a>) -> Self {
        let head = view.head.host().expect("a head on the CPU device");
        let cols = head.layout.cols;
        let hidden = float(view.hidden.to_vec(), [view.hidden.len() / cols, cols]);
        let norm = dense(view.norm.clone().try_into_primitive::<Flex>().expect("a norm on the CPU device"));
        let normed = pointwise::rms_norm(hidden.clone(), norm.clone(), view.eps);
        Side { head, hidden, norm, eps: view.eps, normed }
    }

    fn cols(&self) -> usize {
        self.head.layout.cols
    }

    fn tokens(&self) -> usize {
        dims::<2>(&self.hidden)[0]
    }

    /// The head, in tiles of so much vocabulary, behind `n` tokens.
    fn tiles(&self, first: usize, n: usize, tile: usize) -> Tiles<'_> {
        let values = first * self.cols()..(first + n) * self.cols();
        Tiles::new(self.head, &slice::<f32>(&self.normed)[values], tile)
    }

    /// A loss, and its gradients before the norm from the one behind it.
    fn through_norm(self, loss: f64, gradient: Vec<f32>) -> HeadLoss {
        let gradient = float(gradient, dims::<2>(&self.hidden));
        let (dx, dw) = pointwise::rms_norm_backward(self.hidden, self.norm, gradient, self.eps);
        let values = |t: Float| slice::<f32>(&dense(t)).to_vec();
        HeadLoss { loss, d_hidden: values(dx), d_norm: values(dw) }
    }
}

/// Logits of a tile of the vocabulary, `[tokens, rows]`, or their exponentials, with their maxima and sums.
#[derive(Default)]
struct TileLogits {
    logits: Vec<f32>,
    partial: MaximaAndSums,
    /// Tokens whose target lies in the tile, and its logit.
    picked: Vec<(usize, f32)>,
}

/// Some tokens before a head.
struct Chunk<'a> {
    tiles: Tiles<'a>,
    targets: Vec<usize>,
}

impl Chunk<'_> {
    /// Leaves the exponentials of all logits less their tile's maximum, and returns the losses' sum and the logarithms of
    /// the normalizers.
    fn forward(&self, logits: &mut Vec<TileLogits>) -> (f64, Vec<f32>) {
        logits.resize_with(self.tiles.count(), TileLogits::default);
        for_each_mut(logits, |tile, out| {
            let rows = self.tiles.rows(tile);
            let width = self.tiles.logits(tile, &mut out.logits);
            out.picked.clear();
            for (t, target) in self.targets.iter().enumerate().filter(|(_, target)| rows.contains(target)) {
                out.picked.push((t, out.logits[t * width + target - rows.start]));
            }
            exponentials(Kernel::active(), &mut out.logits, width, &mut out.partial);
        });
        let normalizers = normalizers(logits.iter().map(|tile| &tile.partial), self.targets.len());
        let mut picked = vec![0.0; self.targets.len()];
        logits.iter().flat_map(|tile| &tile.picked).for_each(|&(t, logit)| picked[t] = logit);
        let loss = normalizers.iter().zip(picked).map(|(normalizer, logit)| f64::from(normalizer - logit)).sum();
        (loss, normalizers)
    }

    /// `factor * sum_v (p[t, v] - [v = target]) W[v]`.
    fn backward(&self, logits: &mut [TileLogits], normalizers: &[f32], factor: f32) -> Vec<f32> {
        let mut gradient = self.tiles.backward(logits, |tile, item, add| {
            let (p, n) = (&mut item.logits, self.tiles.rows(tile).len());
            vectorized(Kernel::active(), || {
                for ((p, (top, _)), normalizer) in p.chunks_exact_mut(n).zip(&item.partial).zip(normalizers) {
                    let scale = exp(top - normalizer) * factor;
                    p.iter_mut().for_each(|value| *value *= scale);
                }
            });
            add(p);
        });
        self.tiles.subtract_targets(&mut gradient, &self.targets, |_| factor);
        gradient
    }
}
