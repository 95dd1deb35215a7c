//! A whole decoder block on plain slices: what the CPU runs, for inference and for tuning.
//!
//! The same operators as the tensor path, in five parallel regions for one token: the three projections of attention
//! share one rounding of their input and one region, as do the two of the feed-forward part; the residual
//! connections are the accumulators of the output projections; rotation, cache and softmax work in place. Buffers are
//! kept from call to call. Sequences of different lengths lie one after the other, without padding.
//!
//! For tuning, a forward pass that [records](decoder_block_recorded) leaves what [`decoder_block_backward`] needs: all
//! activations of the block, or its input only, from which the backward pass computes them again.

mod attention;
mod backward;
mod dropout;
mod linear;
mod low_rank;
mod pointwise;

use burn::backend::Flex;
use burn::tensor::Tensor;

use super::cache::{BlockCache, CacheType};
use super::exp::exp;
use super::{Float, dense, slice};
use crate::arch::{Kernel, Tokens8, vectorized};
use crate::matrix::{Lora, PackedMatrix};
use crate::ops::AttentionParams;

pub use backward::{BlockGradients, BlockTape, decoder_block_backward, decoder_block_recorded};
pub use dropout::Dropout;
pub use linear::LoraGradient;

/// Runs a part of a block in a span of its name: a load and a branch while nobody listens.
macro_rules! operator {
    ($name:literal, $body:block) => {{
        let _span = tracing::trace_span!($name).entered();
        $body
    }};
}
use operator;

use linear::{Linear, apply};
use pointwise::{Table, rms_norm, rotate, swiglu};

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
    /// Cosines and sines, `[tokens, r]`, as for [`rope`](crate::rope), from the first token's position on; of the longest
    /// sequence.
    pub rope: Option<(&'a Tensor<2>, &'a Tensor<2>)>,
    /// Dropout of the inputs of the low-rank updates, for tuning.
    pub dropout: Option<Dropout>,
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

    /// Rotates all sequences' heads, or back again.
    fn rotate(&self, kernel: Kernel, x: &mut [f32], lengths: &[usize], sign: f32) {
        let Some((cos, sin)) = self.rope else { return };
        let [_, half] = cos.dims();
        let (cos, sin) = (host(cos), host(sin));
        let table = Table { cos: slice::<f32>(&cos), sin: slice::<f32>(&sin), sign };
        let width = x.len() / lengths.iter().sum::<usize>();
        let mut rest = x;
        for &tokens in lengths {
            let (x, after) = rest.split_at_mut(tokens * width);
            rotate(kernel, x, tokens, self.head_dim, half, table);
            rest = after;
        }
    }
}

/// What a block computes between its linear layers.
#[derive(Debug, Default)]
struct Activations {
    /// Rotated queries, `[tokens, heads * dim]`.
    q: Vec<f32>,
    /// Rotated keys.
    k: Vec<f32>,
    v: Vec<f32>,
    /// Queries and keys before their norms, where they have some.
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    attended: Vec<f32>,
    /// The hidden state between attention and feed-forward part; only if it is recorded.
    middle: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Activations {
    /// Bytes of the buffers.
    fn bytes(&self) -> usize {
        let Self { q, k, v, raw_q, raw_k, attended, middle, gate, up } = self;
        4 * [q, k, v, raw_q, raw_k, attended, middle, gate, up].map(Vec::capacity).iter().sum::<usize>()
    }
}

/// Buffers of [`decoder_block`] and its backward pass, kept from call to call.
#[derive(Default)]
pub struct BlockScratch {
    x8: Tokens8,
    normed: Vec<f32>,
    product: Vec<f32>,
    acts: Activations,
    caches: Vec<BlockCache>,
    backward: backward::Buffers,
}

impl BlockScratch {
    /// Bytes of its buffers, but for those of rounded activations.
    pub fn bytes(&self) -> usize {
        let caches: usize = self.caches.iter().map(BlockCache::bytes).sum();
        4 * (self.normed.capacity() + self.product.capacity()) + self.acts.bytes() + self.backward.bytes() + caches
    }
}

impl core::fmt::Debug for BlockScratch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BlockScratch").finish_non_exhaustive()
    }
}

/// Runs a block on `x`, `[tokens of all sequences, d]`, in place, on the CPU, and appends keys and values to the
/// sequences' caches; `lengths` are the sequences' numbers of tokens.
///
/// The first token's position is the length of the caches, which is the same for all.
///
/// # Panics
/// If shapes disagree, or the block is not [supported](BlockView::is_supported).
pub fn decoder_block(
    x: &mut [f32],
    lengths: &[usize],
    block: &BlockView<'_>,
    caches: &mut [BlockCache],
    scratch: &mut BlockScratch,
) {
    run(x, lengths, block, caches, scratch, false);
}

/// As [`decoder_block`], of sequences without a past whose keys and values nobody needs afterwards.
///
/// # Panics
/// As [`decoder_block`].
pub fn decoder_block_uncached(x: &mut [f32], lengths: &[usize], block: &BlockView<'_>, scratch: &mut BlockScratch) {
    run_uncached(x, lengths, block, scratch, false);
}

fn run_uncached(x: &mut [f32], lengths: &[usize], block: &BlockView<'_>, s: &mut BlockScratch, record: bool) {
    let mut caches = core::mem::take(&mut s.caches);
    let (dim, heads) = (block.head_dim, block.linears[1].weight.layout().rows / block.head_dim);
    if caches.first().is_some_and(|cache| cache.shape() != (heads, dim)) {
        caches.clear();
    }
    caches.resize_with(lengths.len().max(caches.len()), || BlockCache::new(CacheType::F32, heads, dim));
    caches.iter_mut().for_each(|cache| cache.truncate(0));
    run(x, lengths, block, &mut caches[..lengths.len()], s, record);
    s.caches = caches;
}

/// Runs a block; `record` keeps the hidden state in its middle too.
fn run(
    x: &mut [f32],
    lengths: &[usize],
    block: &BlockView<'_>,
    caches: &mut [BlockCache],
    scratch: &mut BlockScratch,
    record: bool,
) {
    let kernel = Kernel::active();
    let [q, k, v, o, gate, up, down] = Linear::all(block);
    let (width, tokens) = (q.cols(), lengths.iter().sum::<usize>());
    if tokens == 0 {
        return;
    }
    let (offset, (kv_heads, dim)) = caches.first().map(|c| (c.len(), c.shape())).expect("a sequence");
    assert!(caches.iter().all(|c| c.len() == offset && c.shape() == (kv_heads, dim)), "caches that differ");
    assert!(x.len() == tokens * width && caches.len() == lengths.len(), "a hidden state of {} values", x.len());
    assert_eq!(dim, block.head_dim, "dimensions of the cache's heads");
    assert!(k.rows() == kv_heads * dim && v.rows() == k.rows() && q.rows() % (kv_heads * dim) == 0, "heads");
    let BlockScratch { x8, normed, product, acts: a, .. } = scratch;

    operator!("norm", {
        let norm = host(block.attn_norm);
        rms_norm(kernel, x, slice::<f32>(&norm), block.eps, normed);
    });
    operator!("qkv", {
        x8.fill_if(&[&q, &k, &v], kernel, normed, width);
        for (buffer, linear) in [(&mut a.q, &q), (&mut a.k, &k), (&mut a.v, &v)] {
            buffer.resize(tokens * linear.rows(), 0.0);
        }
        apply(kernel, normed, x8, [(&q, &mut a.q[..]), (&k, &mut a.k[..]), (&v, &mut a.v[..])], false);
    });
    let span = tracing::trace_span!("attention").entered();
    for (x, raw, norm) in [(&mut a.q, &mut a.raw_q, block.q_norm), (&mut a.k, &mut a.raw_k, block.k_norm)] {
        if let Some(norm) = norm {
            let norm = host(norm);
            core::mem::swap(x, raw);
            rms_norm(kernel, raw, slice::<f32>(&norm), block.eps, x);
        }
    }
    block.rotate(kernel, &mut a.q, lengths, 1.0);
    block.rotate(kernel, &mut a.k, lengths, 1.0);
    a.attended.resize(tokens * q.rows(), 0.0);
    let params = AttentionParams { scale: block.scale, offset, window: block.window };
    let (mut queries, mut keys, mut values, mut out) = (&a.q[..], &a.k[..], &a.v[..], &mut a.attended[..]);
    for (cache, &n) in caches.iter_mut().zip(lengths).filter(|(_, n)| **n > 0) {
        let (q_len, kv_len) = (n * q.rows(), n * k.rows());
        let (these, those) = (queries.split_at(q_len), (keys.split_at(kv_len), values.split_at(kv_len)));
        let (now, later) = out.split_at_mut(q_len);
        cache.append(those.0.0, those.1.0);
        attention::attend(kernel, these.0, n, cache, params, now);
        (queries, keys, values, out) = (these.1, those.0.1, those.1.1, later);
    }
    drop(span);
    operator!("o", {
        x8.fill_if(&[&o], kernel, &a.attended, o.cols());
        apply(kernel, &a.attended, x8, [(&o, &mut x[..])], true);
    });
    if record {
        a.middle.clear();
        a.middle.extend_from_slice(x);
    }

    operator!("norm", {
        let norm = host(block.mlp_norm);
        rms_norm(kernel, x, slice::<f32>(&norm), block.eps, normed);
    });
    operator!("gate_up", {
        x8.fill_if(&[&gate, &up], kernel, normed, width);
        a.gate.resize(tokens * gate.rows(), 0.0);
        a.up.resize(tokens * up.rows(), 0.0);
        apply(kernel, normed, x8, [(&gate, &mut a.gate[..]), (&up, &mut a.up[..])], false);
    });
    operator!("down", {
        swiglu(kernel, &a.gate, &a.up, product);
        x8.fill_if(&[&down], kernel, product, down.cols());
        apply(kernel, product, x8, [(&down, &mut x[..])], true);
    });
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

/// A tensor's buffer.
fn host<const D: usize>(tensor: &Tensor<D>) -> Float {
    dense(tensor.clone().try_into_primitive::<Flex>().expect("a tensor on the CPU device"))
}
