//! The operators, on tensors of any device.
//!
//! | operator | computes |
//! |---|---|
//! | [`packed_linear`] | `y = x W^T + s (x A^T) B^T` on packed weights |
//! | [`packed_embedding`], [`dequantize`] | rows of a packed matrix as floats |
//! | [`rms_norm`] | `x / sqrt(mean(x^2) + eps) * w` |
//! | [`rope`] | rotary position embedding |
//! | [`attention`] | causal grouped-query attention |
//! | [`swiglu`] | `silu(gate) * up` |
//! | [`cross_entropy_head`] | weighted cross entropy of a packed output head |
//!
//! They run on `flex`, `ndarray` and `wgpu` devices, plain or autodiff. Packed weights are never tracked and may
//! live on the inner device while activations are tracked. Activations are `f32`; sums are accumulated in `f32`.
//! The backend trait behind them is [`EdgeOps`].

mod autodiff;
pub(crate) mod decode;
pub(crate) mod defaults;
mod extension;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

pub use extension::EdgeOps;

use crate::matrix::{Lora, PackedMatrix};

/// What attention needs besides its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AttentionParams {
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Cached positions before the first query: query `t` is at position `offset + t`.
    pub offset: usize,
    /// Sliding window: the key at position `j` is visible from position `i` only if `i - j < window`.
    pub window: Option<usize>,
}

impl AttentionParams {
    /// The positions of the keys that query `t` sees.
    pub fn visible(&self, t: usize) -> core::ops::Range<usize> {
        let position = self.offset + t;
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }
}

/// Multiplies with a packed matrix: `y = x W^T`, plus `scaling * (x A^T) B^T` with a low-rank update.
///
/// The backward pass reads the packed weights again (`dX = dY W`); of the activations it saves `x` only if `A` is
/// trained, and `x A^T` only if `B` is.
///
/// # Shapes
/// `x` `[T, cols]`, `w` `[rows, cols]`, result `[T, rows]`.
///
/// # Panics
/// If shapes disagree, or `x` is not `f32`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use edgellm_kernels::{packed_linear, Format, PackedHost, PackedLayout};
/// let device = Device::flex();
/// let w = PackedHost::quantize(&[0.5; 64], PackedLayout::new(2, 32, Format::parse("q4g32s")?)?)?.to_device(&device);
/// let y = packed_linear(Tensor::ones([3, 32], &device), &w, None);
/// assert_eq!(y.into_data().try_into_vec::<f32>().unwrap(), vec![16.0; 6]);
/// # Ok::<(), edgellm_kernels::KernelError>(())
/// ```
pub fn packed_linear(x: Tensor<2>, w: &PackedMatrix, lora: Option<&Lora>) -> Tensor<2> {
    let layout = w.layout();
    let [tokens, cols] = x.dims();
    assert_eq!(cols, layout.cols, "packed_linear: x is [{tokens}, {cols}], the weight {layout}");
    let (words, scales) = w.parts();
    let (x, words, scales) = (x.into_dispatch(), words.into_dispatch(), scales.into_dispatch());
    Tensor::from_dispatch(match lora {
        None => <Dispatch as EdgeOps>::edge_packed_linear(x, words, scales, layout),
        Some(lora) => {
            let ([rank, a_cols], [b_rows, b_rank]) = (lora.a.dims(), lora.b.dims());
            assert!(
                a_cols == cols && b_rows == layout.rows && rank == b_rank,
                "packed_linear: A is [{rank}, {a_cols}], B [{b_rows}, {b_rank}], the weight {layout}"
            );
            let (a, b) = (lora.a.clone().into_dispatch(), lora.b.clone().into_dispatch());
            <Dispatch as EdgeOps>::edge_packed_linear_lora(x, words, scales, a, b, layout, lora.scaling)
        }
    })
}

/// The rows of a packed matrix that `ids` name, as floats.
///
/// # Shapes
/// `w` `[rows, cols]`, `ids` `[T]`, result `[T, cols]`, on the matrix's device (not tracked).
///
/// # Panics
/// If an id is not below `rows` (on the GPU the result is undefined instead).
pub fn packed_embedding(w: &PackedMatrix, ids: Tensor<1, Int>) -> Tensor<2> {
    let (words, scales) = w.parts();
    let ids = if ids.device().is_autodiff() { ids.inner() } else { ids };
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_packed_embedding(
        words.into_dispatch(),
        scales.into_dispatch(),
        ids.into_dispatch(),
        w.layout(),
    ))
}

/// All values of a packed matrix, `[rows, cols]`, on its device (not tracked).
pub fn dequantize(w: &PackedMatrix) -> Tensor<2> {
    let (words, scales) = w.parts();
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_dequantize(
        words.into_dispatch(),
        scales.into_dispatch(),
        w.layout(),
    ))
}

/// Root-mean-square normalization (arXiv 1910.07467): `x / sqrt(mean(x^2) + eps) * weight` along the last dimension.
///
/// # Shapes
/// `x` `[.., d]`, `weight` `[d]`, result like `x`.
///
/// # Panics
/// If the last dimension of `x` is not `weight`'s.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let dims = x.dims();
    let [width] = weight.dims();
    assert_eq!(dims[D - 1], width, "rms_norm: x is {dims:?}, the weight [{width}]");
    let rows: usize = dims[..D - 1].iter().product();
    let x = x.reshape([rows, width]);
    let y = <Dispatch as EdgeOps>::edge_rms_norm(x.into_dispatch(), weight.into_dispatch(), eps);
    Tensor::<2>::from_dispatch(y).reshape(dims)
}

/// Rotary position embedding (arXiv 2104.09864) with Hugging Face's rotate-half convention: with `r` the columns of
/// `cos`, dimension `i < r` and `i + r` form a pair; dimensions from `2 r` on pass through.
///
/// # Shapes
/// `x` `[B, H, T, D]`, `cos` and `sin` `[T, r]` with `2 r <= D`, result like `x`.
///
/// # Panics
/// If shapes disagree.
pub fn rope(x: Tensor<4>, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let (dims, angles) = (x.dims(), cos.dims());
    assert!(
        angles == sin.dims() && angles[0] == dims[2] && 2 * angles[1] <= dims[3],
        "rope: x is {dims:?}, cos {angles:?}, sin {:?}",
        sin.dims()
    );
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_rope(x.into_dispatch(), cos, sin))
}

/// Causal attention with grouped queries: query `t` sees the keys `0 ..= offset + t` (inside the window, if there is
/// one), and head `h` uses key head `h / (H / KV)`.
///
/// The backward pass saves `q`, `k` and `v` only and computes the probabilities again.
///
/// # Shapes
/// `q` `[B, H, T, D]`, `k` and `v` `[B, KV, S, D]` with `S = offset + T`, result like `q`.
///
/// # Panics
/// If shapes disagree, `H` is not a multiple of `KV`, or a window is 0.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, p: AttentionParams) -> Tensor<4> {
    let (qd, kd, vd) = (q.dims(), k.dims(), v.dims());
    assert!(
        kd == vd && qd[0] == kd[0] && qd[3] == kd[3] && kd[1] > 0 && qd[1] % kd[1] == 0,
        "attention: q is {qd:?}, k {kd:?}, v {vd:?}"
    );
    assert!(kd[2] == p.offset + qd[2], "attention: {} keys for {} queries after {} positions", kd[2], qd[2], p.offset);
    assert!(p.window != Some(0), "attention: a window of no keys");
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_attention(q, k, v, p))
}

/// The gated activation of Llama's feed-forward layer (arXiv 2002.05202): `silu(gate) * up`.
///
/// # Panics
/// If shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: gate and up");
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// Weighted cross entropy of a packed output head, `sum_t weights[t] * -log softmax(hidden[t] W^T)[targets[t]]`.
///
/// Logits are computed for a chunk of the vocabulary at a time and never exist at once; the backward pass computes
/// them again from `hidden` and the saved log-normalizers. Gradients flow to `hidden` and `weights`.
///
/// # Shapes
/// `hidden` `[T, d]` (already normalized), `head` `[V, d]`, `targets` `[T]`, `weights` `[T]`, result `[1]`.
///
/// # Panics
/// If shapes disagree, or a target is not below `V` (on the GPU the result is undefined instead).
pub fn cross_entropy_head(
    hidden: Tensor<2>,
    head: &PackedMatrix,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    let layout = head.layout();
    let ([tokens, cols], t, w) = (hidden.dims(), targets.dims(), weights.dims());
    assert!(
        cols == layout.cols && t == [tokens] && w == [tokens],
        "cross_entropy_head: hidden is [{tokens}, {cols}], targets {t:?}, weights {w:?}, the head {layout}"
    );
    let (words, scales) = head.parts();
    Tensor::from_dispatch(<Dispatch as EdgeOps>::edge_cross_entropy_head(
        hidden.into_dispatch(),
        words.into_dispatch(),
        scales.into_dispatch(),
        targets.into_dispatch(),
        weights.into_dispatch(),
        layout,
    ))
}
