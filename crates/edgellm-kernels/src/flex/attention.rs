//! Causal grouped-query attention, a tile of queries at a time.
//!
//! The query heads of a key head are rows below one another, as in the default body. A task takes a tile of these rows:
//! scores with the visible keys (gemm), softmax, values (gemm). Keys and values are read through their strides, so
//! that a growing cache or a transposed view is not copied. The backward pass does the same per key head, which
//! owns its `dK` and `dV`, so that sums have one order.

use core::ops::Range;

use rayon::prelude::*;

use super::pointwise::sum;
use super::{Float, dense, dims, float, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::{Kernel, softmax, vectorized};
use crate::ops::AttentionParams;

/// Query rows of a task.
const TILE: usize = 32;

/// Keys or values `[B, KV, S, D]` with any strides but the last, which is 1.
struct Cached {
    tensor: Float,
}

impl Cached {
    fn new(tensor: Float) -> Self {
        let strides = tensor.layout().strides();
        let readable = strides[3] == 1 && strides.iter().all(|&s| s >= 0);
        let tensor = if readable { tensor } else { tensor.to_contiguous() };
        Cached { tensor }
    }

    /// Some positions of a head, `[positions, D]`.
    fn head(&self, batch: usize, head: usize, positions: Range<usize>) -> MatRef<'_> {
        let layout = self.tensor.layout();
        let strides: Vec<usize> = layout.strides().iter().map(|&s| s as usize).collect();
        let first = layout.start_offset() + batch * strides[0] + head * strides[1] + positions.start * strides[2];
        let [_, _, _, dim] = dims(&self.tensor);
        MatRef::new(&self.tensor.storage::<f32>()[first..], positions.len(), dim, strides[2])
    }
}

/// The shapes of a call.
struct Shapes {
    kv_heads: usize,
    tokens: usize,
    /// Rows of a key head: query heads that share it times tokens.
    rows: usize,
    dim: usize,
    params: AttentionParams,
}

impl Shapes {
    fn new(q: &Float, k: &Float, params: AttentionParams) -> Self {
        let ([_, heads, tokens, dim], [_, kv_heads, _, _]) = (dims(q), dims(k));
        Shapes { kv_heads, tokens, rows: heads / kv_heads * tokens, dim, params }
    }

    /// The keys that some of these rows see.
    fn keys(&self, rows: Range<usize>) -> Range<usize> {
        let seen = rows.map(|row| self.params.visible(row % self.tokens));
        seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).expect("a tile has rows")
    }

    /// Softmax of the visible scores of each row; zeros elsewhere.
    fn softmax(&self, first_row: usize, keys: &Range<usize>, scores: &mut [f32]) {
        vectorized(Kernel::active(), || {
            for (i, row) in scores.chunks_mut(keys.len()).enumerate() {
                let visible = self.params.visible((first_row + i) % self.tokens);
                let visible = visible.start - keys.start..visible.end - keys.start;
                let inverse = softmax(row, visible.clone());
                row[visible].iter_mut().for_each(|weight| *weight *= inverse);
            }
        });
    }
}

pub(super) fn forward(q: Float, k: Float, v: Float, params: AttentionParams) -> Float {
    let shape = q.layout().shape().clone();
    let s = Shapes::new(&q, &k, params);
    let (q, k, v) = (dense(q), Cached::new(k), Cached::new(v));
    let q = slice::<f32>(&q);
    let mut out = vec![0.0; q.len()];
    let head_len = s.rows * s.dim;
    out.par_chunks_mut(head_len).zip(q.par_chunks(head_len)).enumerate().for_each(|(head, (out, q))| {
        let (batch, head) = (head / s.kv_heads, head % s.kv_heads);
        let tiles = out.par_chunks_mut(TILE * s.dim).zip(q.par_chunks(TILE * s.dim)).enumerate();
        tiles.for_each_init(Vec::new, |scores, (tile, (out, q))| {
            let n = q.len() / s.dim;
            let keys = s.keys(tile * TILE..tile * TILE + n);
            scores.resize(n * keys.len(), 0.0);
            let q = MatRef::new(q, n, s.dim, s.dim);
            let k = k.head(batch, head, keys.clone());
            ColumnsMut::whole(scores, n, keys.len(), keys.len()).product(q, k.t(), params.scale, false);
            s.softmax(tile * TILE, &keys, scores);
            let p = MatRef::new(scores, n, keys.len(), keys.len());
            ColumnsMut::whole(out, n, s.dim, s.dim).product(p, v.head(batch, head, keys), 1.0, false);
        });
    });
    float(out, shape)
}

pub(super) fn backward(q: Float, k: Float, v: Float, d_out: Float, params: AttentionParams) -> (Float, Float, Float) {
    let (q_shape, k_shape) = (q.layout().shape().clone(), k.layout().shape().clone());
    let s = Shapes::new(&q, &k, params);
    let [_, _, positions, _] = dims(&k);
    let (q, d_out, k, v) = (dense(q), dense(d_out), Cached::new(k), Cached::new(v));
    let (q, d_out) = (slice::<f32>(&q), slice::<f32>(&d_out));
    let kv_len = positions * s.dim;
    let head_len = s.rows * s.dim;
    let heads = q.len() / head_len;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; heads * kv_len], vec![0.0; heads * kv_len]);
    let outputs = dq.par_chunks_mut(head_len).zip(dk.par_chunks_mut(kv_len)).zip(dv.par_chunks_mut(kv_len));
    let inputs = q.par_chunks(head_len).zip(d_out.par_chunks(head_len));
    outputs.zip(inputs).enumerate().for_each(|(head, (((dq, dk), dv), (q, d_out)))| {
        let head = HeadGradient { s: &s, k: &k, v: &v, batch: head / s.kv_heads, head: head % s.kv_heads };
        head.run(q, d_out, dq, dk, dv);
    });
    (float(dq, q_shape), float(dk, k_shape.clone()), float(dv, k_shape))
}

/// The gradients of one key head and the query heads that share it; formulas as in the default body.
struct HeadGradient<'a> {
    s: &'a Shapes,
    k: &'a Cached,
    v: &'a Cached,
    batch: usize,
    head: usize,
}

impl HeadGradient<'_> {
    fn run(&self, q: &[f32], d_out: &[f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (dim, scale) = (self.s.dim, self.s.params.scale);
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        let tiles = q.chunks(TILE * dim).zip(d_out.chunks(TILE * dim)).zip(dq.chunks_mut(TILE * dim));
        for (tile, ((q, d_out), dq)) in tiles.enumerate() {
            let n = q.len() / dim;
            let keys = self.s.keys(tile * TILE..tile * TILE + n);
            let width = keys.len();
            p.resize(n * width, 0.0);
            ds.resize(n * width, 0.0);
            let (q, d_out) = (MatRef::new(q, n, dim, dim), MatRef::new(d_out, n, dim, dim));
            let k = self.k.head(self.batch, self.head, keys.clone());
            let v = self.v.head(self.batch, self.head, keys.clone());
            ColumnsMut::whole(&mut p, n, width, width).product(q, k.t(), scale, false);
            self.s.softmax(tile * TILE, &keys, &mut p);
            ColumnsMut::whole(&mut ds, n, width, width).product(d_out, v.t(), 1.0, false);
            vectorized(Kernel::active(), || {
                for (p, ds) in p.chunks(width).zip(ds.chunks_mut(width)) {
                    let dot = sum(width, |i| p[i] * ds[i]);
                    ds.iter_mut().zip(p).for_each(|(d, p)| *d = (*d - dot) * p);
                }
            });
            let (p, ds) = (MatRef::new(&p, n, width, width), MatRef::new(&ds, n, width, width));
            let part = keys.start * dim..keys.end * dim;
            ColumnsMut::whole(dq, n, dim, dim).product(ds, k, scale, false);
            ColumnsMut::whole(&mut dk[part.clone()], width, dim, dim).product(ds.t(), q, scale, true);
            ColumnsMut::whole(&mut dv[part], width, dim, dim).product(p.t(), d_out, 1.0, true);
        }
    }
}
