//! The backward pass of a block on slices.
//!
//! With `n1 = norm(x)`, `h = x + O a(Q n1, K n1, V n1)`, `n2 = norm(h)`, `y = h + Down(silu(Gate n2) * Up n2)` and `dy`
//! given: through the feed-forward part to `dh = dy + ...`, through attention to `dx = dh + ...`. Weights are frozen; the
//! packed ones are read again, as they are. What is kept of the forward pass is a choice: everything between the linear
//! layers (`d (2 + 2 kv / d) + 3 f` values a token and block, with `kv` key and `f` feed-forward dimensions), or the
//! block's input alone, at the price of a second forward pass.

use super::attention::{self, Parts};
use super::linear::{LayerGradients, Linear, LoraGradient};
use super::pointwise::{norm_gradient, rms_norm, rms_norm_backward, swiglu, swiglu_backward};
use super::{Activations, BlockScratch, BlockView, host, operator, run_uncached, slice};
use crate::arch::Kernel;
use crate::ops::AttentionParams;

/// What a recorded forward pass leaves. It may be used again, and keeps its buffers.
#[derive(Debug, Default)]
pub struct BlockTape {
    /// The block's input, `[tokens, d]`.
    input: Vec<f32>,
    acts: Activations,
    /// Whether `acts` are of this pass.
    kept: bool,
}

impl BlockTape {
    /// Bytes of its buffers.
    pub fn bytes(&self) -> usize {
        4 * self.input.capacity() + self.acts.bytes()
    }
}

/// The gradients of a block's parameters; those of linear layers in the order of [`BlockView::linears`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockGradients {
    /// Of low-rank updates; `None` for a layer whose update is not trained.
    pub linears: [Option<LoraGradient>; 7],
    /// Of whole weight matrices, `[out, in]`; `None` where nobody asks for it.
    pub weights: [Option<Vec<f32>>; 7],
    /// Of the norms before attention and feed-forward part, `[d]`; `None` where nobody asks for them.
    pub norms: Option<[Vec<f32>; 2]>,
}

impl BlockGradients {
    fn each_mut(&mut self) -> [LayerGradients<'_>; 7] {
        let mut weights = self.weights.iter_mut();
        self.linears
            .each_mut()
            .map(|lora| LayerGradients { lora: lora.as_mut(), weight: weights.next().and_then(Option::as_deref_mut) })
    }
}

/// Buffers of the backward pass.
#[derive(Default)]
pub(super) struct Buffers {
    /// Gradients of width `f`.
    d_gate: Vec<f32>,
    d_up: Vec<f32>,
    /// Gradient of a norm's output.
    d_normed: Vec<f32>,
    d_attended: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Buffers {
    /// Bytes of the buffers.
    pub(super) fn bytes(&self) -> usize {
        let Self { d_gate, d_up, d_normed, d_attended, dq, dk, dv } = self;
        4 * [d_gate, d_up, d_normed, d_attended, dq, dk, dv].map(Vec::capacity).iter().sum::<usize>()
    }
}

/// As [`decoder_block_uncached`](super::decoder_block_uncached), and leaves on the tape what the backward pass needs:
/// all activations if `keep`, else the block's input.
///
/// # Panics
/// As [`decoder_block`](super::decoder_block).
pub fn decoder_block_recorded(
    x: &mut [f32],
    lengths: &[usize],
    block: &BlockView<'_>,
    keep: bool,
    tape: &mut BlockTape,
    scratch: &mut BlockScratch,
) {
    tape.input.clear();
    tape.input.extend_from_slice(x);
    tape.kept = keep;
    run_uncached(x, lengths, block, scratch, keep);
    if keep {
        core::mem::swap(&mut tape.acts, &mut scratch.acts);
    }
}

/// The backward pass of a block: `dy`, the gradient of its output, `[tokens, d]`, becomes that of its input (unless
/// `input_gradient` is false: then it holds nothing of use), and those that `gradients` has place for are added to it.
///
/// # Panics
/// If shapes disagree with the recorded pass.
pub fn decoder_block_backward(
    dy: &mut [f32],
    lengths: &[usize],
    block: &BlockView<'_>,
    tape: &mut BlockTape,
    input_gradient: bool,
    gradients: &mut BlockGradients,
    scratch: &mut BlockScratch,
) {
    let kernel = Kernel::active();
    assert_eq!(dy.len(), tape.input.len(), "the gradient of a block's output");
    if dy.is_empty() {
        return;
    }
    if !tape.kept {
        scratch.product.clear();
        scratch.product.extend_from_slice(&tape.input);
        let mut x = core::mem::take(&mut scratch.product);
        run_uncached(&mut x, lengths, block, scratch, true);
        scratch.product = x;
        core::mem::swap(&mut tape.acts, &mut scratch.acts);
    }
    feed_forward(kernel, dy, block, &tape.acts, gradients, scratch);
    attend(kernel, dy, lengths, block, tape, input_gradient, gradients, scratch);
    if !tape.kept {
        core::mem::swap(&mut tape.acts, &mut scratch.acts);
    }
}

/// From `dy` to `dh`, in place.
fn feed_forward(
    kernel: Kernel,
    dy: &mut [f32],
    block: &BlockView<'_>,
    acts: &Activations,
    gradients: &mut BlockGradients,
    scratch: &mut BlockScratch,
) {
    let [_, _, _, _, gate, up, down] = Linear::all(block);
    let mut of_norms = gradients.norms.take();
    let [_, _, _, _, grad_gate, grad_up, grad_down] = gradients.each_mut();
    let BlockScratch { x8, normed, product, backward: b, .. } = scratch;
    let span = tracing::trace_span!("down_backward").entered();
    swiglu(kernel, &acts.gate, &acts.up, product);
    b.d_gate.resize(product.len(), 0.0);
    b.d_up.resize(product.len(), 0.0);
    down.backward(kernel, product, dy, x8, Some((&mut b.d_gate, false)), grad_down);
    swiglu_backward(kernel, &acts.gate, &acts.up, &mut b.d_gate, &mut b.d_up);
    drop(span);
    let span = tracing::trace_span!("gate_up_backward").entered();
    let norm = host(block.mlp_norm);
    rms_norm(kernel, &acts.middle, slice::<f32>(&norm), block.eps, normed);
    b.d_normed.resize(normed.len(), 0.0);
    gate.backward(kernel, normed, &b.d_gate, x8, Some((&mut b.d_normed, false)), grad_gate);
    up.backward(kernel, normed, &b.d_up, x8, Some((&mut b.d_normed, true)), grad_up);
    drop(span);
    let _span = tracing::trace_span!("norm_backward").entered();
    if let Some([_, of_norm]) = &mut of_norms {
        norm_gradient(&acts.middle, block.eps, &b.d_normed, of_norm);
    }
    gradients.norms = of_norms;
    rms_norm_backward(kernel, &acts.middle, slice::<f32>(&norm), block.eps, &b.d_normed, dy);
}

/// From `dh` to `dx`, in place.
#[expect(clippy::too_many_arguments, reason = "one caller; the parts of one pass")]
fn attend(
    kernel: Kernel,
    dh: &mut [f32],
    lengths: &[usize],
    block: &BlockView<'_>,
    tape: &BlockTape,
    input_gradient: bool,
    gradients: &mut BlockGradients,
    scratch: &mut BlockScratch,
) {
    let acts = &tape.acts;
    let [q, k, v, o, _, _, _] = Linear::all(block);
    let mut of_norms = gradients.norms.take();
    let [grad_q, grad_k, grad_v, grad_o, _, _, _] = gradients.each_mut();
    let BlockScratch { x8, normed, backward: b, .. } = scratch;
    operator!("o_backward", {
        b.d_attended.resize(acts.attended.len(), 0.0);
        o.backward(kernel, &acts.attended, dh, x8, Some((&mut b.d_attended, false)), grad_o);
    });
    let span = tracing::trace_span!("attention_backward").entered();
    b.dq.resize(acts.q.len(), 0.0);
    for gradient in [&mut b.dk, &mut b.dv] {
        gradient.clear();
        gradient.resize(acts.k.len(), 0.0);
    }
    let params = AttentionParams { scale: block.scale, offset: 0, window: block.window };
    let (q_width, kv_width) = (q.rows(), k.rows());
    let mut parts = Parts { q: &acts.q[..], k: &acts.k[..], v: &acts.v[..] };
    let mut d_out = &b.d_attended[..];
    let mut out = Parts { q: &mut b.dq[..], k: &mut b.dk[..], v: &mut b.dv[..] };
    let sequences = lengths.iter().filter(|n| **n > 0).map(|&tokens| attention::Backward {
        parts: Parts {
            q: first(&mut parts.q, tokens * q_width),
            k: first(&mut parts.k, tokens * kv_width),
            v: first(&mut parts.v, tokens * kv_width),
        },
        d_out: first(&mut d_out, tokens * q_width),
        out: Parts {
            q: first_mut(&mut out.q, tokens * q_width),
            k: first_mut(&mut out.k, tokens * kv_width),
            v: first_mut(&mut out.v, tokens * kv_width),
        },
        tokens,
    });
    attention::backward(kernel, sequences, block.head_dim, params);
    for (dx, raw, norm) in [(&mut b.dq, &acts.raw_q, block.q_norm), (&mut b.dk, &acts.raw_k, block.k_norm)] {
        block.rotate(kernel, dx, lengths, -1.0);
        if let Some(norm) = norm {
            let (norm, mut of_raw) = (host(norm), vec![0.0; raw.len()]);
            rms_norm_backward(kernel, raw, slice::<f32>(&norm), block.eps, dx, &mut of_raw);
            *dx = of_raw;
        }
    }
    drop(span);
    let span = tracing::trace_span!("qkv_backward").entered();
    let norm = host(block.attn_norm);
    rms_norm(kernel, &tape.input, slice::<f32>(&norm), block.eps, normed);
    b.d_normed.resize(normed.len(), 0.0);
    let layers = [(&q, &b.dq, grad_q), (&k, &b.dk, grad_k), (&v, &b.dv, grad_v)];
    for (i, (linear, dy, gradient)) in layers.into_iter().enumerate() {
        let dx = (input_gradient || of_norms.is_some()).then_some((&mut b.d_normed[..], i > 0));
        linear.backward(kernel, normed, dy, x8, dx, gradient);
    }
    drop(span);
    let _span = tracing::trace_span!("norm_backward").entered();
    if let Some([of_norm, _]) = &mut of_norms {
        norm_gradient(&tape.input, block.eps, &b.d_normed, of_norm);
    }
    gradients.norms = of_norms;
    if input_gradient {
        rms_norm_backward(kernel, &tape.input, slice::<f32>(&norm), block.eps, &b.d_normed, dh);
    }
}

/// Takes the first `n` values off.
fn first<'a>(slice: &mut &'a [f32], n: usize) -> &'a [f32] {
    let (taken, rest) = slice.split_at(n);
    *slice = rest;
    taken
}

/// Takes the first `n` values off.
fn first_mut<'a>(slice: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (taken, rest) = core::mem::take(slice).split_at_mut(n);
    *slice = rest;
    taken
}
