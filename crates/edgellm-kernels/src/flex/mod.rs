//! Fast operators for the CPU backend `Flex`: rayon over rows, SIMD inside.
//!
//! Results do not depend on the number of threads: work is cut by shape alone, and partial sums are added in order.
//! No operator expands a whole packed matrix, or holds scores or logits of all tokens and heads at once.

mod attention;
mod block;
mod cache;
mod exp;
mod head;
mod integer;
mod linear;
mod pointwise;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Shape, TensorData};
use rayon::prelude::*;

use crate::arch::{Isa, Kernel, PackedRows, vectorized};
use crate::format::{Arrangement, PackedLayout};
use crate::ops::{AttentionParams, EdgeOps, defaults};
use crate::panels::Panels;

pub use block::{
    BlockGradients, BlockLinear, BlockScratch, BlockTape, BlockView, Dropout, LoraGradient, decoder_block,
    decoder_block_backward, decoder_block_recorded, decoder_block_uncached, log_softmax_row,
};
pub use cache::{BlockCache, CacheType};
pub(crate) use exp::exp;
pub use head::{HEAD_CHUNK, HeadLoss, HeadView, head_divergence, head_loss};

type Float = FloatTensor<Flex>;
type Int = IntTensor<Flex>;

impl EdgeOps for Flex {
    fn edge_dequantize(words: Int, scales: Int, layout: PackedLayout) -> Float {
        Packed::new(words, scales, layout).dequantize()
    }

    fn edge_packed_embedding(words: Int, scales: Int, ids: Int, layout: PackedLayout) -> Float {
        Packed::new(words, scales, layout).gather(&row_numbers(ids))
    }

    fn edge_packed_linear(x: Float, words: Int, scales: Int, layout: PackedLayout) -> Float {
        linear::forward(x, &Packed::new(words, scales, layout))
    }

    fn edge_packed_linear_backward(dy: Float, words: Int, scales: Int, layout: PackedLayout) -> Float {
        linear::backward(dy, &Packed::new(words, scales, layout))
    }

    fn edge_rms_norm(x: Float, weight: Float, eps: f64) -> Float {
        pointwise::rms_norm(x, weight, eps)
    }

    fn edge_rms_norm_backward(x: Float, weight: Float, dy: Float, eps: f64) -> (Float, Float) {
        pointwise::rms_norm_backward(x, weight, dy, eps)
    }

    fn edge_rope(x: Float, cos: Float, sin: Float) -> Float {
        pointwise::rope(x, cos, sin)
    }

    fn edge_attention(q: Float, k: Float, v: Float, params: AttentionParams) -> Float {
        attention::forward(q, k, v, params)
    }

    fn edge_attention_backward(
        q: Float,
        k: Float,
        v: Float,
        d_out: Float,
        params: AttentionParams,
    ) -> (Float, Float, Float) {
        attention::backward(q, k, v, d_out, params)
    }

    fn edge_swiglu(gate: Float, up: Float) -> Float {
        pointwise::swiglu(gate, up)
    }

    fn edge_swiglu_backward(gate: Float, up: Float, dy: Float) -> (Float, Float) {
        pointwise::swiglu_backward(gate, up, dy)
    }

    fn edge_log_normalizer(hidden: Float, words: Int, scales: Int, layout: PackedLayout) -> Float {
        head::log_normalizer(hidden, &Packed::new(words, scales, layout))
    }

    fn edge_cross_entropy_head(
        hidden: Float,
        words: Int,
        scales: Int,
        targets: Int,
        weights: Float,
        layout: PackedLayout,
    ) -> Float {
        let losses = defaults::token_losses::<Flex>(hidden, words, scales, targets, layout).0;
        defaults::weighted_sum::<Flex>(losses, weights)
    }

    fn edge_cross_entropy_backward(
        hidden: Float,
        words: Int,
        scales: Int,
        targets: Int,
        factor: Float,
        log_normalizer: Float,
        layout: PackedLayout,
    ) -> Float {
        let packed = Packed::new(words, scales, layout);
        head::backward(hidden, &packed, &row_numbers(targets), factor, log_normalizer)
    }
}

/// A kernel of the CPU backend: which operator, how, and with which instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    /// The operator.
    pub operator: &'static str,
    /// What it does, in a few words.
    pub method: &'static str,
    /// Instruction set of its row kernels.
    pub isa: Isa,
}

/// The kernels that the CPU backend runs with the active instruction set. Other devices run the default bodies.
pub fn kernels() -> Vec<KernelInfo> {
    let isa = Kernel::active().isa();
    [
        ("packed_linear, prepared, 1 to 4 tokens", "codes unpacked in registers, integer dot products"),
        ("packed_linear, prepared, more tokens", "panels unpacked, tiles of integer dot products"),
        ("packed_linear, prepared, sparse", "kept codes expanded by their masks, integer dot products"),
        ("packed_linear, prepared, gradient", "blocks rounded to 8 bits and transposed, integer dot products"),
        ("packed_linear, f32 activations, 1 to 8 tokens", "rows decoded in registers and dotted"),
        ("packed_linear, f32 activations, more tokens", "tiles of rows decoded, then gemm"),
        ("packed_linear, f32 activations, gradient", "tiles of rows decoded, then gemm"),
        ("packed_embedding", "rows decoded"),
        ("cross_entropy_head, prepared", "tiles of the vocabulary, integer dot products and softmax"),
        ("cross_entropy_head, f32 activations", "tiles of the vocabulary decoded, then gemm and softmax"),
        ("attention with a cache", "tiles of queries over f16, int8 or f32 keys and values"),
        ("attention with gradients", "tiles of queries, gemm and softmax"),
        ("rms_norm, rope, swiglu", "one pass"),
    ]
    .into_iter()
    .map(|(operator, method)| KernelInfo { operator, method, isa })
    .collect()
}

/// A packed matrix's tensors, contiguous.
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) layout: PackedLayout,
    words: Int,
    scales: Int,
}

impl Packed {
    pub(crate) fn new(words: Int, scales: Int, layout: PackedLayout) -> Self {
        let contiguous = |t: Int| {
            assert_eq!(t.dtype(), DType::U32, "packed words");
            if t.as_slice::<u32>().is_some() { t } else { t.to_contiguous() }
        };
        Packed { layout, words: contiguous(words), scales: contiguous(scales) }
    }

    /// The matrix, if it is prepared.
    fn panels(&self) -> Option<Panels<'_>> {
        let prepared = self.layout.arrangement == Arrangement::Panels;
        prepared.then(|| Panels::new(self.layout, slice::<u32>(&self.words), slice::<u32>(&self.scales)))
    }

    fn rows(&self) -> PackedRows<'_> {
        let scales = if self.layout.row_scale_words() == 0 { &[] } else { slice::<u32>(&self.scales) };
        PackedRows::new(self.layout, slice::<u32>(&self.words), scales)
    }

    fn dequantize(&self) -> Float {
        let all: Vec<usize> = (0..self.layout.rows).collect();
        self.gather(&all)
    }

    /// Some rows, decoded.
    fn gather(&self, rows: &[usize]) -> Float {
        if let Some(panels) = self.panels() {
            let cols = self.layout.cols;
            let mut out = vec![0.0; rows.len() * cols];
            if rows.len() == 1 {
                panels.decode_row(rows[0], &mut out);
            } else {
                out.par_chunks_mut(cols).zip(rows).for_each(|(out, &row)| panels.decode_row(row, out));
            }
            return float(out, [rows.len(), cols]);
        }
        let (kernel, matrix, cols) = (Kernel::active(), self.rows(), self.layout.cols);
        let blocks = cols.div_ceil(crate::format::BLOCK);
        let mut out = vec![0.0; rows.len() * cols];
        let per_chunk = (TASK / cols).max(1);
        for_chunks(&mut out, per_chunk * cols, |chunk, out| {
            let mut buffer = vec![0.0; blocks * crate::format::BLOCK];
            for (&row, out) in rows[chunk * per_chunk..].iter().zip(out.chunks_mut(cols)) {
                matrix.decode(kernel, row..row + 1, 0..blocks, &mut buffer);
                out.copy_from_slice(&buffer[..cols]);
            }
        });
        float(out, [rows.len(), cols])
    }
}

/// Elements of work below which a thread costs more than it brings.
const TASK: usize = 1 << 15;

/// Calls `f(i, chunk)` for every chunk of `out`; on this thread if there is only one.
fn for_chunks(out: &mut [f32], size: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let kernel = Kernel::active();
    if out.len() <= size {
        vectorized(kernel, || f(0, out));
    } else {
        out.par_chunks_mut(size).enumerate().for_each(|(i, chunk)| vectorized(kernel, || f(i, chunk)));
    }
}

/// The tensor itself if its elements are contiguous `f32`, else a contiguous copy.
fn dense(t: Float) -> Float {
    assert_eq!(t.dtype(), DType::F32, "activations are f32");
    if t.as_slice::<f32>().is_some() { t } else { t.to_contiguous() }
}

fn slice<E: burn::tensor::Element + bytemuck::Pod>(t: &Float) -> &[E] {
    t.as_slice::<E>().expect("made contiguous before")
}

fn float(values: Vec<f32>, shape: impl Into<Shape>) -> Float {
    Float::from_data(TensorData::new(values, shape.into()))
}

fn dims<const D: usize>(t: &Float) -> [usize; D] {
    let shape = t.shape();
    core::array::from_fn(|i| shape[i])
}

fn row_numbers(ids: Int) -> Vec<usize> {
    let data = ids.into_data();
    data.iter::<i64>().map(|id| usize::try_from(id).unwrap_or_else(|_| panic!("row number {id}"))).collect()
}
