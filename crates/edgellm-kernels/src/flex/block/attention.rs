//! Attention of a block on slices: forward over the caches, backward by recomputation.

use core::ops::Range;

use super::BlockCache;
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::{for_each_mut, threads};
use crate::arch::{Attend, Kernel, softmax, vectorized};
use crate::flex::pointwise::sum;
use crate::ops::AttentionParams;

/// Tokens of an item of attention.
const QUERIES: usize = 16;
/// Queries of a tile of the backward pass.
const TILE: usize = 64;

/// Attention of `[tokens, heads * dim]` queries over the cache, whose last positions are theirs.
pub(super) fn attend(
    kernel: Kernel,
    q: &[f32],
    tokens: usize,
    cache: &BlockCache,
    params: AttentionParams,
    out: &mut [f32],
) {
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

/// Queries, keys and values, or their gradients: `[tokens, heads * dim]`.
#[derive(Clone, Copy)]
pub(super) struct Parts<T> {
    pub(super) q: T,
    pub(super) k: T,
    pub(super) v: T,
}

/// The backward pass of one sequence, without a cache before it.
pub(super) struct Backward<'a> {
    pub(super) parts: Parts<&'a [f32]>,
    /// The gradient of the attention's output.
    pub(super) d_out: &'a [f32],
    /// The gradients to write; those of keys and values are zero.
    pub(super) out: Parts<&'a mut [f32]>,
    pub(super) tokens: usize,
}

/// A key head with the query heads that share it, which own their part of every gradient, so that sums have one order.
struct Head<'a> {
    parts: Parts<&'a [f32]>,
    d_out: &'a [f32],
    tokens: usize,
    head: usize,
    dq: ColumnsMut<'a>,
    dk: ColumnsMut<'a>,
    dv: ColumnsMut<'a>,
}

/// Computes the gradients of all sequences.
pub(super) fn backward<'a>(
    kernel: Kernel,
    sequences: impl Iterator<Item = Backward<'a>>,
    dim: usize,
    params: AttentionParams,
) {
    let mut heads = Vec::new();
    for Backward { parts, d_out, out, tokens } in sequences {
        let (width, kv_width) = (parts.q.len() / tokens, parts.k.len() / tokens);
        let dq = ColumnsMut::split(out.q, tokens, width, width / kv_width * dim);
        let dk = ColumnsMut::split(out.k, tokens, kv_width, dim);
        let dv = ColumnsMut::split(out.v, tokens, kv_width, dim);
        let gradients = dq.into_iter().zip(dk).zip(dv).enumerate();
        heads.extend(gradients.map(|(head, ((dq, dk), dv))| Head { parts, d_out, tokens, head, dq, dk, dv }));
    }
    for_each_mut(&mut heads, |_, head| head.run(kernel, dim, params));
}

impl Head<'_> {
    /// A tile of queries at a time: scores, softmax and the products with them.
    fn run(&mut self, kernel: Kernel, dim: usize, params: AttentionParams) {
        let Head { parts, d_out, tokens, head, dq, dk, dv } = self;
        let (width, kv_width) = (parts.q.len() / *tokens, parts.k.len() / *tokens);
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for first in (0..*tokens).step_by(TILE) {
            let n = TILE.min(*tokens - first);
            // Causal: the keys that the tile's queries see end with the last of them.
            let keys = params.visible(first).start..first + n;
            let len = keys.len();
            let key_rows = |x| matrix(x, kv_width, keys.clone(), *head * dim, dim);
            let (k, v) = (key_rows(parts.k), key_rows(parts.v));
            for member in 0..width / kv_width {
                let rows = |x| matrix(x, width, first..first + n, (*head * width / kv_width + member) * dim, dim);
                let (q, d_out) = (rows(parts.q), rows(d_out));
                p.resize(n * len, 0.0);
                ds.resize(n * len, 0.0);
                ColumnsMut::whole(&mut p, n, len, len).product(q, k.t(), params.scale, false);
                ColumnsMut::whole(&mut ds, n, len, len).product(d_out, v.t(), 1.0, false);
                vectorized(kernel, || {
                    for (i, (p, ds)) in p.chunks_exact_mut(len).zip(ds.chunks_exact_mut(len)).enumerate() {
                        let visible = params.visible(first + i);
                        let visible = visible.start - keys.start..visible.end - keys.start;
                        let inverse = softmax(p, visible.clone());
                        p[visible].iter_mut().for_each(|p| *p *= inverse);
                        let dot = sum(len, |i| p[i] * ds[i]);
                        ds.iter_mut().zip(p).for_each(|(d, p)| *d = (*d - dot) * *p);
                    }
                });
                let (p, ds) = (MatRef::new(&p, n, len, len), MatRef::new(&ds, n, len, len));
                dq.part(first..first + n, member * dim..(member + 1) * dim).product(ds, k, params.scale, false);
                dk.part(keys.clone(), 0..dim).product(ds.t(), q, params.scale, true);
                dv.part(keys.clone(), 0..dim).product(p.t(), d_out, 1.0, true);
            }
        }
    }
}

/// Some rows of `data`, `[_, width]`, and `cols` columns from `col` on.
fn matrix(data: &[f32], width: usize, rows: Range<usize>, col: usize, cols: usize) -> MatRef<'_> {
    MatRef::new(&data[rows.start * width + col..], rows.len(), cols, width)
}
