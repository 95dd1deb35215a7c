//! Default bodies of the operators, in Burn primitives: their definition on every backend.
//!
//! Nothing here holds a whole dequantized matrix or whole logits: rows of packed matrices are decoded a chunk at a
//! time.

use core::ops::Range;

use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{Shape, Slice, TensorData};

use super::{AttentionParams, EdgeOps, decode};
use crate::format::PackedLayout;

/// Elements of a decoded chunk of rows; few in unit tests, so that small matrices have several chunks.
const CHUNK: usize = if cfg!(test) { 256 } else { 1 << 22 };
/// Added to the scores of keys that a query does not see. Finite, so that no device computes `inf - inf`; after the softmax
/// it is an exact zero, because every query sees at least its own position.
const MASKED: f32 = -1e30;

/// The chunks of rows of a matrix; at most `cap` elements, for `per_row` elements a row.
fn chunks(rows: usize, per_row: usize, cap: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (cap / per_row.max(1)).max(1);
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

/// A range of rows, decoded.
fn decode_rows<B: Backend>(
    words: &IntTensor<B>,
    scales: &IntTensor<B>,
    layout: PackedLayout,
    rows: Range<usize>,
) -> FloatTensor<B> {
    let slice = |tensor: &IntTensor<B>| {
        let width = tensor.shape()[1];
        B::int_slice(tensor.clone(), &[Slice::from(rows.clone()), Slice::from(0..width)])
    };
    let scales = if layout.row_scale_words() == 0 { scales.clone() } else { slice(scales) };
    decode::rows::<B>(slice(words), scales, layout.with_rows(rows.len()))
}

pub(crate) fn dequantize<B: Backend>(
    words: IntTensor<B>,
    scales: IntTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let parts = chunks(layout.rows, layout.cols, CHUNK).map(|rows| decode_rows::<B>(&words, &scales, layout, rows));
    concat::<B>(parts.collect(), 0)
}

pub(crate) fn packed_embedding<B: Backend>(
    words: IntTensor<B>,
    scales: IntTensor<B>,
    ids: IntTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let count = ids.shape()[0];
    let words = B::int_select(words, 0, ids.clone());
    let scales = if layout.row_scale_words() == 0 { scales } else { B::int_select(scales, 0, ids) };
    decode::rows::<B>(words, scales, layout.with_rows(count))
}

pub(crate) fn packed_linear<B: Backend>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let parts = chunks(layout.rows, layout.cols, CHUNK).map(|rows| {
        let w = decode_rows::<B>(&words, &scales, layout, rows);
        B::float_matmul(x.clone(), B::float_transpose(w))
    });
    concat::<B>(parts.collect(), 1)
}

pub(crate) fn packed_linear_backward<B: Backend>(
    dy: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let parts = chunks(layout.rows, layout.cols, CHUNK).map(|rows| {
        let w = decode_rows::<B>(&words, &scales, layout, rows.clone());
        B::float_matmul(columns::<B>(dy.clone(), rows), w)
    });
    sum::<B>(parts)
}

/// The result, and `x A^T`, which the backward pass needs.
pub(crate) fn packed_linear_lora<B: EdgeOps>(
    x: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    layout: PackedLayout,
    scaling: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let down = B::float_matmul(x.clone(), B::float_transpose(a));
    let up = B::float_matmul(down.clone(), B::float_transpose(b));
    let up = B::float_mul_scalar(up, scaling.into());
    (B::float_add(B::edge_packed_linear(x, words, scales, layout), up), down)
}

pub(crate) fn rms_norm<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    let width = weight.shape()[0];
    let weight = B::float_reshape(weight, Shape::new([1, width]));
    B::float_mul(B::float_mul(x.clone(), inverse_rms::<B>(x, eps)), weight)
}

/// With `r = 1 / rms` and `n = x r`: `dw = sum_rows dy n` and `dx = r (w dy - n mean(w dy n))`.
pub(crate) fn rms_norm_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let width = weight.shape()[0];
    let weight = B::float_reshape(weight, Shape::new([1, width]));
    let r = inverse_rms::<B>(x.clone(), eps);
    let normed = B::float_mul(x, r.clone());
    let dw = B::float_sum_dim(B::float_mul(dy.clone(), normed.clone()), 0);
    let scaled = B::float_mul(dy, weight);
    let mean = B::float_mean_dim(B::float_mul(scaled.clone(), normed.clone()), 1);
    let dx = B::float_mul(B::float_sub(scaled, B::float_mul(normed, mean)), r);
    (dx, B::float_reshape(dw, Shape::new([width])))
}

fn inverse_rms<B: Backend>(x: FloatTensor<B>, eps: f64) -> FloatTensor<B> {
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x), 1);
    B::float_recip(B::float_sqrt(B::float_add_scalar(mean, eps.into())))
}

pub(crate) fn rope<B: Backend>(x: FloatTensor<B>, cos: FloatTensor<B>, sin: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, heads, tokens, dim] = dims::<B, 4>(&x);
    let half = cos.shape()[1];
    let part = |range: Range<usize>| {
        let full = [0..batch, 0..heads, 0..tokens].map(Slice::from);
        B::float_slice(x.clone(), &[full[0], full[1], full[2], Slice::from(range)])
    };
    let angle = |t: FloatTensor<B>| B::float_reshape(t, Shape::new([1, 1, tokens, half]));
    let (cos, sin) = (angle(cos), angle(sin));
    let (first, second) = (part(0..half), part(half..2 * half));
    let rotated_first =
        B::float_sub(B::float_mul(first.clone(), cos.clone()), B::float_mul(second.clone(), sin.clone()));
    let rotated_second = B::float_add(B::float_mul(second, cos), B::float_mul(first, sin));
    let mut parts = vec![rotated_first, rotated_second];
    if 2 * half < dim {
        parts.push(part(2 * half..dim));
    }
    B::float_cat(parts, 3)
}

pub(crate) fn attention<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    params: AttentionParams,
) -> FloatTensor<B> {
    let shape = q.shape();
    let q = fold_groups::<B>(q, k.shape()[1]);
    let out = B::float_matmul(probabilities::<B>(q, k, shape[2], params), v);
    B::float_reshape(out, shape)
}

/// With `P` the probabilities: `dV = P^T dO`, `dS = P (dP - sum(dP P))` where `dP = dO V^T`, `dQ = scale dS K`,
/// `dK = scale dS^T Q`. The heads that share a key head are rows of one matrix, so their sum is part of the products.
pub(crate) fn attention_backward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    d_out: FloatTensor<B>,
    params: AttentionParams,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let shape = q.shape();
    let kv_heads = k.shape()[1];
    let (q, d_out) = (fold_groups::<B>(q, kv_heads), fold_groups::<B>(d_out, kv_heads));
    let p = probabilities::<B>(q.clone(), k.clone(), shape[2], params);
    let dv = B::float_matmul(B::float_transpose(p.clone()), d_out.clone());
    let dp = B::float_matmul(d_out, B::float_transpose(v));
    let row_sum = B::float_sum_dim(B::float_mul(dp.clone(), p.clone()), 3);
    let ds = B::float_mul(B::float_sub(dp, row_sum), p);
    let ds = B::float_mul_scalar(ds, params.scale.into());
    let dk = B::float_matmul(B::float_transpose(ds.clone()), q);
    let dq = B::float_reshape(B::float_matmul(ds, k), shape);
    (dq, dk, dv)
}

/// `[B, H, T, D]` to `[B, KV, H / KV * T, D]`: the heads of a key head below one another.
fn fold_groups<B: Backend>(x: FloatTensor<B>, kv_heads: usize) -> FloatTensor<B> {
    let [batch, heads, tokens, dim] = dims::<B, 4>(&x);
    B::float_reshape(x, Shape::new([batch, kv_heads, heads / kv_heads * tokens, dim]))
}

/// Softmax of the masked scores, `[B, KV, H / KV * T, S]`.
fn probabilities<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    tokens: usize,
    params: AttentionParams,
) -> FloatTensor<B> {
    let (rows, keys, device) = (q.shape()[2], k.shape()[2], q.device());
    let scores = B::float_matmul(q, B::float_transpose(k));
    let scores = B::float_mul_scalar(scores, params.scale.into());
    let scores = B::float_add(scores, mask::<B>(rows, tokens, keys, params, &device));
    let max = B::float_max_dim(scores.clone(), 3);
    let exp = B::float_exp(B::float_sub(scores, max));
    let sum = B::float_sum_dim(exp.clone(), 3);
    B::float_div(exp, sum)
}

fn mask<B: Backend>(
    rows: usize,
    tokens: usize,
    keys: usize,
    params: AttentionParams,
    device: &Device<B>,
) -> FloatTensor<B> {
    let mut values = vec![MASKED; rows * keys];
    for (row, values) in values.chunks_mut(keys).enumerate() {
        values[params.visible(row % tokens)].fill(0.0);
    }
    B::float_from_data(TensorData::new(values, [1, 1, rows, keys]), device)
}

pub(crate) fn swiglu<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(B::float_mul(gate.clone(), sigmoid::<B>(gate)), up)
}

/// With `s = sigmoid(g)`: `d up = dy g s` and `d gate = dy up s (1 + g (1 - s))`.
pub(crate) fn swiglu_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let s = sigmoid::<B>(gate.clone());
    let silu = B::float_mul(gate.clone(), s.clone());
    let d_up = B::float_mul(dy.clone(), silu.clone());
    let slope = B::float_add(s.clone(), B::float_mul(silu, B::float_add_scalar(B::float_neg(s), 1.0.into())));
    (B::float_mul(B::float_mul(dy, up), slope), d_up)
}

fn sigmoid<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_recip(B::float_add_scalar(B::float_exp(B::float_neg(x)), 1.0.into()))
}

pub(crate) fn log_normalizer<B: Backend>(
    hidden: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let tokens = hidden.shape()[0];
    let mut state: Option<(FloatTensor<B>, FloatTensor<B>)> = None;
    for rows in chunks(layout.rows, layout.cols + tokens, CHUNK) {
        let w = decode_rows::<B>(&words, &scales, layout, rows);
        let logits = B::float_matmul(hidden.clone(), B::float_transpose(w));
        let chunk_max = B::float_max_dim(logits.clone(), 1);
        let (max, carried) = match state {
            None => (chunk_max, None),
            Some((old_max, total)) => {
                let max = B::float_max_dim(B::float_cat(vec![old_max.clone(), chunk_max], 1), 1);
                let kept = B::float_mul(total, B::float_exp(B::float_sub(old_max, max.clone())));
                (max, Some(kept))
            }
        };
        let sum = B::float_sum_dim(B::float_exp(B::float_sub(logits, max.clone())), 1);
        let total = match carried {
            None => sum,
            Some(kept) => B::float_add(kept, sum),
        };
        state = Some((max, total));
    }
    let (max, total) = state.expect("a packed matrix has rows");
    B::float_reshape(B::float_add(B::float_log(total), max), Shape::new([tokens]))
}

/// `[T]` losses `log_normalizer - hidden . W[target]`, and the log-normalizers.
pub(crate) fn token_losses<B: EdgeOps>(
    hidden: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    targets: IntTensor<B>,
    layout: PackedLayout,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let tokens = hidden.shape()[0];
    let rows = B::edge_packed_embedding(words.clone(), scales.clone(), targets, layout);
    let logits = B::float_sum_dim(B::float_mul(hidden.clone(), rows), 1);
    let logits = B::float_reshape(logits, Shape::new([tokens]));
    let normalizers = B::edge_log_normalizer(hidden, words, scales, layout);
    (B::float_sub(normalizers.clone(), logits), normalizers)
}

pub(crate) fn weighted_sum<B: Backend>(losses: FloatTensor<B>, weights: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sum(B::float_mul(losses, weights))
}

pub(crate) fn cross_entropy_backward<B: EdgeOps>(
    hidden: FloatTensor<B>,
    words: IntTensor<B>,
    scales: IntTensor<B>,
    targets: IntTensor<B>,
    factor: FloatTensor<B>,
    log_normalizer: FloatTensor<B>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let tokens = hidden.shape()[0];
    let column = |t: FloatTensor<B>| B::float_reshape(t, Shape::new([tokens, 1]));
    let (factor, log_normalizer) = (column(factor), column(log_normalizer));
    let parts = chunks(layout.rows, layout.cols + tokens, CHUNK).map(|rows| {
        let w = decode_rows::<B>(&words, &scales, layout, rows);
        let logits = B::float_matmul(hidden.clone(), B::float_transpose(w.clone()));
        let p = B::float_exp(B::float_sub(logits, log_normalizer.clone()));
        B::float_matmul(B::float_mul(p, factor.clone()), w)
    });
    let expected = sum::<B>(parts);
    let target_rows = B::edge_packed_embedding(words.clone(), scales.clone(), targets, layout);
    B::float_sub(expected, B::float_mul(target_rows, factor.clone()))
}

fn dims<B: Backend, const D: usize>(x: &FloatTensor<B>) -> [usize; D] {
    let shape = x.shape();
    core::array::from_fn(|i| shape[i])
}

fn columns<B: Backend>(x: FloatTensor<B>, range: Range<usize>) -> FloatTensor<B> {
    let rows = x.shape()[0];
    B::float_slice(x, &[Slice::from(0..rows), Slice::from(range)])
}

fn concat<B: Backend>(mut parts: Vec<FloatTensor<B>>, dim: usize) -> FloatTensor<B> {
    if parts.len() == 1 { parts.remove(0) } else { B::float_cat(parts, dim) }
}

fn sum<B: Backend>(parts: impl Iterator<Item = FloatTensor<B>>) -> FloatTensor<B> {
    parts.reduce(|total, part| B::float_add(total, part)).expect("a packed matrix has rows")
}

#[cfg(test)]
mod tests;
