//! The backend extension: every operator as a method with a default body in Burn primitives.
//!
//! The default bodies (in [`defaults`](super::defaults)) are the definition of the operators and run on every
//! backend. `Flex` overrides those that matter with rayon and SIMD; `Autodiff` overrides each forward operator with a
//! handwritten backward that calls the inner backend's `_backward` method, so that these can be overridden too.

// Burn's `NdArray` is deprecated in favour of `Flex`; here it is the independent second implementation.
#![cfg_attr(feature = "ndarray", allow(deprecated))]

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use super::{AttentionParams, defaults};
use crate::format::PackedLayout;

/// The operators of this crate on a backend's primitives. Use the functions on tensors instead, e.g.
/// [`packed_linear`](crate::packed_linear); they check shapes, and these methods rely on that.
#[backend_extension(Flex, NdArray: cfg(feature = "ndarray"), Cube: cfg(feature = "wgpu"), Autodiff)]
pub trait EdgeOps: Backend {
    /// All values of a packed matrix, `[rows, cols]`.
    fn edge_dequantize(words: IntTensor<Self>, scales: IntTensor<Self>, layout: PackedLayout) -> FloatTensor<Self> {
        defaults::dequantize::<Self>(words, scales, layout)
    }

    /// `[T]` row numbers to `[T, cols]` values.
    fn edge_packed_embedding(
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        ids: IntTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        defaults::packed_embedding::<Self>(words, scales, ids, layout)
    }

    /// `x W^T`: `[T, cols]` to `[T, rows]`.
    fn edge_packed_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        defaults::packed_linear::<Self>(x, words, scales, layout)
    }

    /// `dY W`: `[T, rows]` to `[T, cols]`.
    fn edge_packed_linear_backward(
        dy: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        defaults::packed_linear_backward::<Self>(dy, words, scales, layout)
    }

    /// `x W^T + scaling (x A^T) B^T` with `a` `[rank, cols]` and `b` `[rows, rank]`.
    fn edge_packed_linear_lora(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        layout: PackedLayout,
        scaling: f32,
    ) -> FloatTensor<Self> {
        defaults::packed_linear_lora::<Self>(x, words, scales, a, b, layout, scaling).0
    }

    /// Normalizes the rows of `x` `[N, d]`.
    fn edge_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        defaults::rms_norm::<Self>(x, weight, eps)
    }

    /// Gradients of `x` and `weight`.
    fn edge_rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        defaults::rms_norm_backward::<Self>(x, weight, dy, eps)
    }

    /// Rotates the pairs of `x` `[B, H, T, D]` by the angles of `cos`, `sin` `[T, r]`.
    fn edge_rope(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        defaults::rope::<Self>(x, cos, sin)
    }

    /// Causal grouped-query attention.
    fn edge_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttentionParams,
    ) -> FloatTensor<Self> {
        defaults::attention::<Self>(q, k, v, params)
    }

    /// Gradients of `q`, `k` and `v`.
    fn edge_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        params: AttentionParams,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        defaults::attention_backward::<Self>(q, k, v, d_out, params)
    }

    /// `silu(gate) * up`.
    fn edge_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        defaults::swiglu::<Self>(gate, up)
    }

    /// Gradients of `gate` and `up`.
    fn edge_swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        defaults::swiglu_backward::<Self>(gate, up, dy)
    }

    /// `[T]` logarithms of the softmax's denominator over the whole vocabulary.
    fn edge_log_normalizer(
        hidden: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        defaults::log_normalizer::<Self>(hidden, words, scales, layout)
    }

    /// `[1]`: weighted cross entropy.
    fn edge_cross_entropy_head(
        hidden: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        let losses = defaults::token_losses::<Self>(hidden, words, scales, targets, layout).0;
        defaults::weighted_sum::<Self>(losses, weights)
    }

    /// `[T, d]`: `sum_v factor[t] (p[t, v] - [v = targets[t]]) W[v]`, the gradient of `hidden`.
    fn edge_cross_entropy_backward(
        hidden: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: IntTensor<Self>,
        targets: IntTensor<Self>,
        factor: FloatTensor<Self>,
        log_normalizer: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        defaults::cross_entropy_backward::<Self>(hidden, words, scales, targets, factor, log_normalizer, layout)
    }
}

#[cfg(feature = "ndarray")]
impl EdgeOps for burn::backend::NdArray {}

#[cfg(feature = "wgpu")]
impl EdgeOps for burn::backend::Cube {}
