//! How far the next-token distribution behind one head is from that behind another, and its gradient.
//!
//! A few tokens at a time keep their logits of both heads. With `p` the base's and `q` the other's distribution,
//! `KL(p | q) = sum_v p (log p - log q)`, and its gradient with respect to the other's logits is `q - p` (Hinton et al.,
//! arXiv 1503.02531, section 2, at temperature 1).

use super::{Float, HEAD_CHUNK, HeadLoss, PANEL_ROWS, SEGMENTS, TILE_PANELS, Tiles};
use super::{combine, dense, exp, float, maxima_and_sums, pointwise, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, Part, Task, Tokens8, vectorized};
use crate::flex::{Packed, linear::decode};
use crate::matrix::PackedMatrix;
use burn::backend::Flex;
use burn::tensor::Tensor;

/// Vocabulary of a tile, of both heads.
const TILE: usize = TILE_PANELS * PANEL_ROWS;

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

/// Normed hidden states before a packed head.
struct Side<'a> {
    packed: &'a Packed,
    normed: Float,
}

impl<'a> Side<'a> {
    fn new(view: &HeadView<'a>) -> Self {
        let packed = view.head.host().expect("a head on the CPU device");
        let cols = packed.layout.cols;
        let x = float(view.hidden.to_vec(), [view.hidden.len() / cols, cols]);
        let norm = dense(view.norm.clone().try_into_primitive::<Flex>().expect("a norm on the CPU device"));
        Side { packed, normed: pointwise::rms_norm(x, norm, view.eps) }
    }

    fn tokens(&self, first: usize, n: usize) -> &[f32] {
        let cols = self.packed.layout.cols;
        &slice::<f32>(&self.normed)[first * cols..(first + n) * cols]
    }

    /// The rounded tokens, if the head is prepared.
    fn tiles(&self, x: &[f32]) -> Option<Tiles<'_>> {
        self.packed.panels().map(|panels| Tiles::new(panels, x))
    }

    fn rows(&self, tile: usize) -> core::ops::Range<usize> {
        tile * TILE..((tile + 1) * TILE).min(self.packed.layout.rows)
    }

    /// The logits of a tile, `[tokens, rows]`.
    fn logits(&self, prepared: Option<&Tiles<'_>>, x: &[f32], tile: usize, out: &mut Vec<f32>) {
        let Some(tiles) = prepared else {
            let (cols, rows) = (self.packed.layout.cols, self.rows(tile));
            let (tokens, n, mut buffer) = (x.len() / cols, rows.len(), Vec::new());
            out.resize(tokens * n, 0.0);
            let w = decode(Kernel::active(), self.packed.rows(), rows, &mut buffer);
            ColumnsMut::whole(out, tokens, n, n).product(MatRef::new(x, tokens, cols, cols), w.t(), 1.0, false);
            return;
        };
        let _ = tiles.logits(tile, out);
    }
}

/// The logits of a tile of both heads, with maxima and sums of exponentials.
#[derive(Default)]
struct TilePair {
    base: Vec<f32>,
    other: Vec<f32>,
    partial: [Vec<(f32, f32)>; 2],
}

/// `weight * sum_t KL(base[t] | other[t])` in nats, and its gradients with respect to `other`'s hidden states and norm, on
/// the CPU.
///
/// # Panics
/// If there are not as many tokens in both, the vocabularies have different sizes, or something is not on the CPU device.
pub fn head_divergence(base: &HeadView<'_>, other: &HeadView<'_>, weight: f32) -> HeadLoss {
    let (kernel, of_base, of_other) = (Kernel::active(), Side::new(base), Side::new(other));
    let (vocabulary, cols) = (of_other.packed.layout.rows, of_other.packed.layout.cols);
    let tokens = other.hidden.len() / cols;
    assert_eq!(of_base.packed.layout.rows, vocabulary, "the vocabulary of the base");
    assert_eq!(base.hidden.len() / of_base.packed.layout.cols, tokens, "the tokens of the base");
    let mut pairs: Vec<TilePair> = Vec::new();
    pairs.resize_with(vocabulary.div_ceil(TILE), TilePair::default);
    let per_segment = pairs.len().div_ceil(SEGMENTS);
    let (mut loss, mut gradient) = (0.0, Vec::with_capacity(tokens * cols));
    for first in (0..tokens).step_by(HEAD_CHUNK) {
        let n = HEAD_CHUNK.min(tokens - first);
        let inputs = [of_base.tokens(first, n), of_other.tokens(first, n)];
        let tiles = [of_base.tiles(inputs[0]), of_other.tiles(inputs[1])];
        for_each_mut(&mut pairs, |tile, pair| {
            of_base.logits(tiles[0].as_ref(), inputs[0], tile, &mut pair.base);
            of_other.logits(tiles[1].as_ref(), inputs[1], tile, &mut pair.other);
            let rows = of_other.rows(tile).len();
            maxima_and_sums(kernel, &pair.base, rows, &mut pair.partial[0]);
            maxima_and_sums(kernel, &pair.other, rows, &mut pair.partial[1]);
        });
        let normalizers = [0, 1].map(|side| {
            let partial: Vec<&[(f32, f32)]> = pairs.iter().map(|pair| pair.partial[side].as_slice()).collect();
            combine(&partial, n)
        });
        let mut segments: Vec<(&mut [TilePair], Vec<f32>, f64)> =
            pairs.chunks_mut(per_segment).map(|pairs| (pairs, vec![0.0; n * cols], 0.0)).collect();
        for_each_mut(&mut segments, |segment, (pairs, gradient, loss)| {
            let (mut g8, mut buffer) = (Tokens8::default(), Vec::new());
            for (i, pair) in pairs.iter_mut().enumerate() {
                let tile = segment * per_segment + i;
                let rows = of_other.rows(tile);
                *loss += differences(kernel, pair, rows.len(), &normalizers, weight);
                let g = &pair.other;
                let mut out = ColumnsMut::whole(gradient, n, cols, cols);
                match &tiles[1] {
                    Some(tiles) => {
                        let matrix = tiles.part(tile);
                        g8.fill(kernel, g, rows.len());
                        let range = 0..matrix.blocks();
                        Task { matrix, x: &g8, part: Part::Backward, range, out, accumulate: true }.run(kernel);
                    }
                    None => {
                        let width = rows.len();
                        let w = decode(kernel, of_other.packed.rows(), rows, &mut buffer);
                        out.product(MatRef::new(g, n, width, width), w, 1.0, true);
                    }
                }
            }
        });
        let mut sum = vec![0.0; n * cols];
        for (_, part, part_loss) in segments {
            sum.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            loss += part_loss;
        }
        gradient.extend(sum);
    }
    let x = float(other.hidden.to_vec(), [tokens, cols]);
    let norm = dense(other.norm.clone().try_into_primitive::<Flex>().expect("a norm on the CPU device"));
    let (dx, dw) = pointwise::rms_norm_backward(x, norm, float(gradient, [tokens, cols]), other.eps);
    let values = |t: Float| slice::<f32>(&dense(t)).to_vec();
    HeadLoss { loss: f64::from(weight) * loss, d_hidden: values(dx), d_norm: values(dw) }
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
