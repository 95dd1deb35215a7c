//! How far the next-token distribution behind one head is from that behind another, and its gradient.
//!
//! A few tokens at a time keep their logits of both heads. With `p` the base's and `q` the other's distribution,
//! `KL(p | q) = sum_v p (log p - log q)`, and its gradient with respect to the other's logits is `q - p` (Hinton et al.,
//! arXiv 1503.02531, section 2, at temperature 1).

use super::softmax::{MaximaAndSums, maxima_and_sums, normalizers};
use super::{HEAD_CHUNK, HeadLoss, Side, exp, tile_of};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, vectorized};
use crate::matrix::PackedMatrix;
use burn::tensor::Tensor;

/// Hidden states behind the last block, and what makes logits of them.
#[derive(Debug, Clone, Copy)]
pub struct HeadView<'a> {
    /// `[tokens, d]`.
    pub hidden: &'a [f32],
    /// The root-mean-square norm before the head, `[d]`.
    pub norm: &'a Tensor<1>,
    /// `[vocabulary, d]`.
    pub head: &'a PackedMatrix,
    /// Added to mean squares.
    pub eps: f64,
}

/// The logits of a tile of both heads, with maxima and sums of exponentials.
#[derive(Default)]
struct TilePair {
    base: Vec<f32>,
    other: Vec<f32>,
    partial: [MaximaAndSums; 2],
    /// What the tile adds to the divergence.
    loss: f64,
}

/// `weight * sum_t KL(base[t] | other[t])` in nats, and its gradients with respect to `other`'s hidden states and norm, on
/// the CPU.
///
/// # Panics
/// If there are not as many tokens in both, the vocabularies have different sizes, or something is not on the CPU device.
pub fn head_divergence(base: &HeadView<'_>, other: &HeadView<'_>, weight: f32) -> HeadLoss {
    let (kernel, base, other) = (Kernel::active(), Side::new(base), Side::new(other));
    assert_eq!(base.head.layout.rows, other.head.layout.rows, "the vocabulary of the base");
    assert_eq!(base.tokens(), other.tokens(), "the tokens of the base");
    let tile = tile_of(base.head).min(tile_of(other.head));
    let mut pairs: Vec<TilePair> = Vec::new();
    let (mut loss, mut gradient) = (0.0, Vec::with_capacity(other.tokens() * other.cols()));
    for first in (0..other.tokens()).step_by(HEAD_CHUNK) {
        let n = HEAD_CHUNK.min(other.tokens() - first);
        let (of_base, of_other) = (base.tiles(first, n, tile), other.tiles(first, n, tile));
        pairs.resize_with(of_other.count(), TilePair::default);
        for_each_mut(&mut pairs, |tile, pair| {
            let rows = of_base.logits(tile, &mut pair.base);
            of_other.logits(tile, &mut pair.other);
            maxima_and_sums(kernel, &mut pair.base, rows, &mut pair.partial[0]);
            maxima_and_sums(kernel, &mut pair.other, rows, &mut pair.partial[1]);
        });
        let normalizers = [0, 1].map(|side| normalizers(pairs.iter().map(|pair| &pair.partial[side]), n));
        gradient.extend(of_other.backward(&mut pairs, |tile, pair, add| {
            pair.loss = differences(kernel, pair, of_other.rows(tile).len(), &normalizers, weight);
            add(&pair.other);
        }));
        loss += pairs.iter().map(|pair| pair.loss).sum::<f64>();
    }
    other.through_norm(f64::from(weight) * loss, gradient)
}

/// Turns the other's logits of a tile into `weight * (q - p)`, and sums `p (log p - log q)`.
fn differences(kernel: Kernel, pair: &mut TilePair, rows: usize, normalizers: &[Vec<f32>; 2], weight: f32) -> f64 {
    let mut loss = 0.0;
    vectorized(kernel, || {
        let lines = pair.base.chunks_exact(rows).zip(pair.other.chunks_exact_mut(rows));
        for ((base, other), (p_norm, q_norm)) in lines.zip(normalizers[0].iter().zip(&normalizers[1])) {
            let mut sum = 0.0;
            for (base, other) in base.iter().zip(other) {
                let (log_p, log_q) = (base - p_norm, *other - q_norm);
                let p = exp(log_p);
                sum += p * (log_p - log_q);
                *other = (exp(log_q) - p) * weight;
            }
            loss += f64::from(sum);
        }
    });
    loss
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::format::{Format, PackedLayout};
    use crate::host::PackedHost;

    fn values(n: usize, seed: usize, size: f32) -> Vec<f32> {
        (0..n).map(|i| (((i + 7 * seed) * 7919 % 1009) as f32 / 504.5 - 1.0) * size).collect()
    }

    fn head(name: &str, rows: usize, cols: usize, seed: usize) -> PackedMatrix {
        let layout = PackedLayout::new(rows, cols, Format::parse(name).unwrap()).unwrap();
        PackedHost::quantize(&values(rows * cols, seed, 0.4), layout).unwrap().to_device(&Device::flex())
    }

    /// In f64, from dequantized weights.
    fn expected(base: &HeadView<'_>, other: &HeadView<'_>, other_hidden: &[f32]) -> f64 {
        let log_probabilities = |view: &HeadView<'_>, hidden: &[f32]| -> Vec<Vec<f64>> {
            let w = view.head.dequantize().into_data().try_to_vec::<f32>().unwrap();
            let norm = view.norm.clone().into_data().try_to_vec::<f32>().unwrap();
            let cols = norm.len();
            let of_token = |x: &[f32]| {
                let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
                let r = 1.0 / (squares / cols as f64 + view.eps).sqrt();
                let normed: Vec<f64> = x.iter().zip(&norm).map(|(x, w)| f64::from(*x) * r * f64::from(*w)).collect();
                let dot = |w: &[f32]| normed.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>();
                let logits: Vec<f64> = w.chunks(cols).map(dot).collect();
                let total = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
                logits.into_iter().map(|l| l - total).collect()
            };
            hidden.chunks(cols).map(of_token).collect()
        };
        let (p, q) = (log_probabilities(base, base.hidden), log_probabilities(other, other_hidden));
        let of_token = |(p, q): (&Vec<f64>, &Vec<f64>)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        p.iter().zip(&q).map(of_token).sum()
    }

    #[test]
    fn divergence_and_gradient_are_those_of_the_definition() {
        let (vocabulary, cols, tokens) = (600, 64, 70);
        let norm = Tensor::<1>::from_floats(&values(cols, 3, 1.0)[..], &Device::flex());
        let (hidden, base_hidden) = (values(tokens * cols, 1, 2.0), values(tokens * cols, 2, 2.0));
        let base = head("f32", vocabulary, cols, 5);
        for (name, prepared, tolerance) in [("f32", false, 1e-3), ("q8g32a", false, 1e-3), ("q8g32a", true, 0.03)] {
            let mut other = head(name, vocabulary, cols, 4);
            if prepared {
                other = other.to_host().unwrap().prepare().unwrap().to_device(&Device::flex());
            }
            let base = HeadView { hidden: &base_hidden, norm: &norm, head: &base, eps: 1e-5 };
            let view = HeadView { hidden: &hidden, norm: &norm, head: &other, eps: 1e-5 };
            let found = head_divergence(&base, &view, 0.5);
            let loss = expected(&base, &view, &hidden);
            assert!((found.loss - 0.5 * loss).abs() < tolerance * loss, "{name}: {} and {loss}", found.loss);
            for at in [0, 100, tokens * cols - 1] {
                let (mut up, mut down) = (hidden.clone(), hidden.clone());
                up[at] += 0.01;
                down[at] -= 0.01;
                let slope = 0.5 * (expected(&base, &view, &up) - expected(&base, &view, &down)) / 0.02;
                let largest = found.d_hidden.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                let error = (f64::from(found.d_hidden[at]) - slope).abs();
                assert!(error < tolerance * f64::from(largest), "{name}: {} and {slope}", found.d_hidden[at]);
            }
            let same = HeadView { head: &other, ..view };
            assert!(head_divergence(&view, &same, 1.0).loss.abs() < 1e-3, "{name}: of itself");
        }
    }
}
