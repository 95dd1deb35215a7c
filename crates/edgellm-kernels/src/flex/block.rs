//! A whole decoder block on plain slices: what inference runs.
//!
//! The same operators as the tensor path, in five parallel regions for one token: the three projections of attention
//! share one rounding of their input and one region, as do the two of the feed-forward part; the residual
//! connections are the accumulators of the output projections; rotation, cache and softmax work in place. Buffers are
//! kept from call to call. Nothing is recorded for a backward pass.

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::cache::BlockCache;
use super::exp::exp;
use super::integer::{Product, multiply};
use super::low_rank::low_rank;
use super::pointwise::{inverse_rms, sigmoid};
use super::{Float, Packed, TASK, dense, linear, slice};
use crate::arch::matmul::ColumnsMut;
use crate::arch::pool::{for_each_mut, threads};
use crate::arch::{Attend, Kernel, Part, Tokens8, vectorized};
use crate::matrix::{Lora, PackedMatrix};
use crate::ops::AttentionParams;

/// Tokens of an item of attention.
const QUERIES: usize = 16;

/// A linear layer of a block.
#[derive(Debug, Clone, Copy)]
pub struct BlockLinear<'a> {
    /// The weight, `[out, in]`.
    pub weight: &'a PackedMatrix,
    /// `[out]`.
    pub bias: Option<&'a Tensor<1>>,
    /// A low-rank update.
    pub lora: Option<&'a Lora>,
}

/// The weights and constants of a pre-norm decoder block (as in LLaMA, arXiv 2302.13971, section 2.2).
#[derive(Debug, Clone, Copy)]
pub struct BlockView<'a> {
    /// Norm before attention, `[d]`.
    pub attn_norm: &'a Tensor<1>,
    /// Norm before the feed-forward part, `[d]`.
    pub mlp_norm: &'a Tensor<1>,
    /// Norm of each query head, `[head_dim]`.
    pub q_norm: Option<&'a Tensor<1>>,
    /// Norm of each key head, `[head_dim]`.
    pub k_norm: Option<&'a Tensor<1>>,
    /// Query, key, value, output, gate, up, down.
    pub linears: [BlockLinear<'a>; 7],
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Added to mean squares.
    pub eps: f64,
    /// Factor of the scores.
    pub scale: f32,
    /// Positions that a query sees, itself included; all of them without.
    pub window: Option<usize>,
    /// Cosines and sines, `[tokens, r]`, as for [`rope`](crate::rope).
    pub rope: Option<(&'a Tensor<2>, &'a Tensor<2>)>,
}

impl BlockView<'_> {
    /// Whether [`decoder_block`] can run it: everything is on the CPU device, and heads have a multiple of 16
    /// dimensions.
    pub fn is_supported(&self) -> bool {
        let lora_is_plain = |lora: &Lora| !lora.a.device().is_autodiff() && !lora.b.device().is_autodiff();
        let plain = |l: &BlockLinear<'_>| l.weight.host().is_some() && l.lora.is_none_or(lora_is_plain);
        self.head_dim.is_multiple_of(crate::arch::KEYS)
            && self.linears.iter().all(plain)
            && !self.attn_norm.device().is_autodiff()
    }
}

/// Buffers of [`decoder_block`], kept from call to call.
#[derive(Default)]
pub struct BlockScratch {
    x8: Tokens8,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl core::fmt::Debug for BlockScratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BlockScratch").finish_non_exhaustive()
    }
}

/// Runs a block on `x`, `[sequences * tokens, d]`, in place, on the CPU, and appends keys and values to the sequences'
/// caches.
///
/// The first token's position is the length of the caches, which is the same for all. Inference only.
///
/// # Panics
/// If shapes disagree, or the block is not [supported](BlockView::is_supported).
pub fn decoder_block(x: &mut [f32], block: &BlockView<'_>, caches: &mut [BlockCache], scratch: &mut BlockScratch) {
    let kernel = Kernel::active();
    let [q, k, v, o, gate, up, down] = block.linears.map(Linear::new);
    let width = q.cols();
    let tokens = x.len() / width;
    if tokens == 0 {
        return;
    }
    let (offset, (kv_heads, dim)) = caches.first().map(|c| (c.len(), c.shape())).expect("a sequence");
    let per_sequence = tokens / caches.len();
    assert!(caches.iter().all(|c| c.len() == offset && c.shape() == (kv_heads, dim)), "caches that differ");
    assert!(x.len() == per_sequence * caches.len() * width, "a hidden state of {} values", x.len());
    assert_eq!(dim, block.head_dim, "dimensions of the cache's heads");
    assert!(k.rows() == kv_heads * dim && v.rows() == k.rows() && q.rows() % (kv_heads * dim) == 0, "heads");
    let s = scratch;

    let norm = host(block.attn_norm);
    rms_norm(kernel, x, slice::<f32>(&norm), block.eps, &mut s.normed);
    s.x8.fill_if(&[&q, &k, &v], kernel, &s.normed, width);
    for (buffer, linear) in [(&mut s.q, &q), (&mut s.k, &k), (&mut s.v, &v)] {
        buffer.resize(tokens * linear.rows(), 0.0);
    }
    apply(&s.normed, &s.x8, [(&q, &mut s.q[..]), (&k, &mut s.k[..]), (&v, &mut s.v[..])], false);
    for (x, norm) in [(&mut s.q, block.q_norm), (&mut s.k, block.k_norm)] {
        if let Some(norm) = norm {
            let norm = host(norm);
            let source = x.clone();
            rms_norm(kernel, &source, slice::<f32>(&norm), block.eps, x);
        }
    }
    if let Some((cos, sin)) = block.rope {
        let (cos, sin) = (host(cos), host(sin));
        let (cos, sin) = (slice::<f32>(&cos), slice::<f32>(&sin));
        for (x, linear) in [(&mut s.q, &q), (&mut s.k, &k)] {
            for x in x.chunks_exact_mut(per_sequence * linear.rows()) {
                vectorized(kernel, || rotate(x, per_sequence, dim, cos, sin));
            }
        }
    }
    s.attended.resize(tokens * q.rows(), 0.0);
    let params = AttentionParams { scale: block.scale, offset, window: block.window };
    let (q_len, kv_len) = (per_sequence * q.rows(), per_sequence * k.rows());
    let queries = s.q.chunks_exact(q_len).zip(s.attended.chunks_exact_mut(q_len));
    let keys = s.k.chunks_exact(kv_len).zip(s.v.chunks_exact(kv_len));
    for ((cache, (keys, values)), (queries, out)) in caches.iter_mut().zip(keys).zip(queries) {
        cache.append(keys, values);
        attend(kernel, queries, per_sequence, cache, params, out);
    }
    s.x8.fill_if(&[&o], kernel, &s.attended, o.cols());
    apply(&s.attended, &s.x8, [(&o, &mut x[..])], true);

    let norm = host(block.mlp_norm);
    rms_norm(kernel, x, slice::<f32>(&norm), block.eps, &mut s.normed);
    s.x8.fill_if(&[&gate, &up], kernel, &s.normed, width);
    s.gate.resize(tokens * gate.rows(), 0.0);
    s.up.resize(tokens * up.rows(), 0.0);
    apply(&s.normed, &s.x8, [(&gate, &mut s.gate[..]), (&up, &mut s.up[..])], false);
    swiglu(kernel, &mut s.gate, &s.up);
    s.x8.fill_if(&[&down], kernel, &s.gate, down.cols());
    apply(&s.gate, &s.x8, [(&down, &mut x[..])], true);
}

/// `x W^T (+ b) (+ s (x A^T) B^T)` on plain slices: `[tokens, in]` to `[tokens, out]`.
///
/// # Panics
/// If shapes disagree, or the weight is not on the CPU device.
pub fn linear(x: &[f32], linear: BlockLinear<'_>, out: &mut [f32]) {
    let linear = Linear::new(linear);
    let mut x8 = Tokens8::default();
    x8.fill_if(&[&linear], Kernel::active(), x, linear.cols());
    apply(x, &x8, [(&linear, out)], false);
}

/// Root-mean-square normalization of rows on plain slices, as [`rms_norm`](crate::rms_norm).
///
/// # Panics
/// If `x` is not whole rows of the weight's length, or the weight is not on the CPU device.
pub fn rms_norm_rows(x: &[f32], weight: &Tensor<1>, eps: f64) -> Vec<f32> {
    let weight = host(weight);
    let mut out = Vec::new();
    rms_norm(Kernel::active(), x, slice::<f32>(&weight), eps, &mut out);
    out
}

/// Turns scores into the logarithms of their softmax, in place.
pub fn log_softmax_row(row: &mut [f32]) {
    vectorized(Kernel::active(), || {
        let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let mut sum = 0.0f64;
        for chunk in row.chunks(256) {
            let mut sums = [0.0f32; 16];
            for scores in chunk.chunks(16) {
                for (sum, score) in sums.iter_mut().zip(scores) {
                    *sum += exp(score - max);
                }
            }
            sum += f64::from(sums.iter().sum::<f32>());
        }
        let normalizer = (f64::from(max) + sum.ln()) as f32;
        row.iter_mut().for_each(|score| *score -= normalizer);
    });
}

/// A linear layer with its buffers at hand.
struct Linear<'a> {
    packed: &'a Packed,
    bias: Option<Float>,
    lora: Option<(Float, Float, f32)>,
}

impl<'a> Linear<'a> {
    fn new(linear: BlockLinear<'a>) -> Self {
        Linear {
            packed: linear.weight.host().expect("a weight on the CPU device"),
            bias: linear.bias.map(host),
            lora: linear.lora.map(|lora| (host(&lora.a), host(&lora.b), lora.scaling)),
        }
    }

    fn rows(&self) -> usize {
        self.packed.layout.rows
    }

    fn cols(&self) -> usize {
        self.packed.layout.cols
    }

    /// Adds bias and low-rank update.
    fn add_rest(&self, x: &[f32], out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            let bias = slice::<f32>(bias);
            out.chunks_mut(bias.len()).for_each(|out| out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias));
        }
        if let Some((a, b, scaling)) = &self.lora {
            let (rows, cols) = (self.rows(), self.cols());
            let (a, b) = (slice::<f32>(a), slice::<f32>(b));
            low_rank(x, cols, a, b, rows, *scaling, out);
        }
    }
}

impl Tokens8 {
    /// Rounds `x` if one of the layers multiplies with rounded activations.
    fn fill_if(&mut self, linears: &[&Linear<'_>], kernel: Kernel, x: &[f32], cols: usize) {
        if linears.iter().any(|linear| linear.packed.panels().is_some()) {
            self.fill(kernel, x, cols);
        }
    }
}

/// Applies layers of one input.
fn apply<'a, const N: usize>(x: &[f32], x8: &Tokens8, layers: [(&'a Linear<'a>, &'a mut [f32]); N], accumulate: bool) {
    let mut prepared = Vec::with_capacity(N);
    let mut rest = Vec::new();
    for (linear, out) in layers {
        match linear.packed.panels() {
            Some(matrix) => prepared.push((linear, matrix, out)),
            None => rest.push((linear, out)),
        }
    }
    multiply(
        x8,
        Part::Forward,
        prepared.iter_mut().map(|(_, matrix, out)| Product { matrix: *matrix, out }),
        accumulate,
    );
    for (linear, out) in rest {
        if accumulate {
            let mut product = vec![0.0; out.len()];
            linear::multiply(x, linear.packed.rows(), &mut product);
            out.iter_mut().zip(product).for_each(|(out, product)| *out += product);
        } else {
            linear::multiply(x, linear.packed.rows(), out);
        }
        linear.add_rest(x, out);
    }
    for (linear, _, out) in prepared {
        linear.add_rest(x, out);
    }
}

/// A tensor's buffer.
fn host<const D: usize>(tensor: &Tensor<D>) -> Float {
    dense(tensor.clone().try_into_primitive::<Flex>().expect("a tensor on the CPU device"))
}

fn rms_norm(kernel: Kernel, x: &[f32], weight: &[f32], eps: f64, out: &mut Vec<f32>) {
    let width = weight.len();
    out.resize(x.len(), 0.0);
    let rows = |x: &[f32], out: &mut [f32]| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let r = inverse_rms(x, eps);
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * r * w;
            }
        }
    };
    in_chunks(kernel, x, out, width, rows);
}

/// Calls `f` for chunks of whole rows of both slices, vectorized, on several threads if it is worth it.
fn in_chunks(kernel: Kernel, x: &[f32], out: &mut [f32], width: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) {
    let chunk = (TASK / width).max(1) * width;
    if out.len() <= chunk {
        return vectorized(kernel, || f(x, out));
    }
    let mut items: Vec<_> = x.chunks(chunk).zip(out.chunks_mut(chunk)).collect();
    for_each_mut(&mut items, |_, (x, out)| vectorized(kernel, || f(x, out)));
}

/// `gate = silu(gate) * up`.
fn swiglu(kernel: Kernel, gate: &mut [f32], up: &[f32]) {
    in_chunks(kernel, up, gate, 1, |up, gate| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate *= sigmoid(*gate) * up;
        }
    });
}

/// Rotates the heads of `[tokens, heads * dim]`.
#[inline(always)]
fn rotate(x: &mut [f32], tokens: usize, dim: usize, cos: &[f32], sin: &[f32]) {
    let (width, half) = (x.len() / tokens, cos.len() / tokens);
    for ((x, cos), sin) in x.chunks_exact_mut(width).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
        for head in x.chunks_exact_mut(dim) {
            let (a, rest) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// Attention of `[tokens, heads * dim]` queries over the cache, whose last positions are theirs.
fn attend(kernel: Kernel, q: &[f32], tokens: usize, cache: &BlockCache, params: AttentionParams, out: &mut [f32]) {
    let (kv_heads, dim) = cache.shape();
    let width = q.len() / tokens;
    let group = width / (kv_heads * dim);
    let per_item = if threads() == 1 { tokens.min(64) } else { QUERIES };
    let mut items = Vec::with_capacity(tokens.div_ceil(per_item) * kv_heads);
    for (i, out) in out.chunks_mut(per_item * width).enumerate() {
        let n = out.len() / width;
        let heads = ColumnsMut::split(out, n, width, group * dim);
        items.extend(heads.into_iter().enumerate().map(|(head, out)| (i * per_item, head, out)));
    }
    for_each_mut(&mut items, |_, (first, head, out)| {
        let n = out.rows();
        let mut queries = Vec::with_capacity(n * group * dim);
        let mut visible = Vec::with_capacity(n * group);
        for t in *first..*first + n {
            let q = &q[t * width + *head * group * dim..][..group * dim];
            queries.extend(q.iter().map(|q| q * params.scale));
            visible.extend((0..group).map(|_| params.visible(t)));
        }
        let mut attended = vec![0.0; queries.len()];
        let (keys, values) = cache.head(*head);
        let job = Attend {
            keys,
            values,
            dim,
            queries: &queries,
            visible: &visible,
            out: &mut attended,
            scores: &mut Vec::new(),
        };
        job.run(kernel);
        for (t, attended) in attended.chunks_exact(group * dim).enumerate() {
            out.row_mut(t).copy_from_slice(attended);
        }
    });
}
