//! Normalization, activation and rotation on slices, and their gradients.

use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, vectorized};
use crate::flex::TASK;
use crate::flex::pointwise::{inverse_rms, sigmoid, sum};

/// `out = x / rms(x) * weight`, row by row.
pub(super) fn rms_norm(kernel: Kernel, x: &[f32], weight: &[f32], eps: f64, out: &mut Vec<f32>) {
    let width = weight.len();
    out.resize(x.len(), 0.0);
    in_chunks(kernel, width, [x], [out], |[x], [out]| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let r = inverse_rms(x, eps);
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * r * w;
            }
        }
    });
}

/// The gradient of [`rms_norm`] with respect to `x`, added to `dx`.
pub(super) fn rms_norm_backward(kernel: Kernel, x: &[f32], weight: &[f32], eps: f64, dy: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    in_chunks(kernel, width, [x, dy], [dx], |[x, dy], [dx]| {
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let r = inverse_rms(x, eps);
            let pull = sum(width, |i| dy[i] * weight[i] * x[i]) * r * r / width as f32;
            for (((dx, x), dy), w) in dx.iter_mut().zip(x).zip(dy).zip(weight) {
                *dx += r * (w * dy - x * pull);
            }
        }
    });
}

/// The gradient of [`rms_norm`] with respect to its weight, added to `dw`.
pub(super) fn norm_gradient(x: &[f32], eps: f64, dy: &[f32], dw: &mut [f32]) {
    let width = dw.len();
    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let r = inverse_rms(x, eps);
        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
            *dw += x * r * dy;
        }
    }
}

/// `out = silu(gate) * up`.
pub(super) fn swiglu(kernel: Kernel, gate: &[f32], up: &[f32], out: &mut Vec<f32>) {
    out.resize(gate.len(), 0.0);
    in_chunks(kernel, 1, [gate, up], [out], |[gate, up], [out]| {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(*gate) * up;
        }
    });
}

/// The gradients of [`swiglu`]: that of `gate` takes the place of `dy`, that of `up` goes to `d_up`.
pub(super) fn swiglu_backward(kernel: Kernel, gate: &[f32], up: &[f32], dy: &mut [f32], d_up: &mut [f32]) {
    in_chunks(kernel, 1, [gate, up], [dy, d_up], |[gate, up], [dy, d_up]| {
        for (((dy, d_up), gate), up) in dy.iter_mut().zip(d_up).zip(gate).zip(up) {
            let s = sigmoid(*gate);
            *d_up = *dy * gate * s;
            *dy *= up * s * (1.0 + gate * (1.0 - s));
        }
    });
}

/// Rotates the heads of `[tokens, heads * dim]`, the first `2 half` dimensions of each; with `sign = -1` back again. The
/// tables have at least `tokens` rows of `half` values.
pub(super) fn rotate(kernel: Kernel, x: &mut [f32], tokens: usize, dim: usize, half: usize, table: Table<'_>) {
    let width = x.len() / tokens;
    let Table { cos, sin, sign } = table;
    vectorized(kernel, || {
        for ((x, cos), sin) in x.chunks_exact_mut(width).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
            for head in x.chunks_exact_mut(dim) {
                let (a, rest) = head.split_at_mut(half);
                for (((a, b), cos), sin) in a.iter_mut().zip(&mut rest[..half]).zip(cos).zip(sin) {
                    let sin = sign * sin;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    });
}

/// Cosines and sines, and the direction.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) sign: f32,
}

/// Calls `f` for chunks of whole rows of slices of one length, vectorized, on several threads if it is worth it.
fn in_chunks<const R: usize, const W: usize>(
    kernel: Kernel,
    width: usize,
    read: [&[f32]; R],
    write: [&mut [f32]; W],
    f: impl Fn([&[f32]; R], [&mut [f32]; W]) + Sync,
) {
    let len = write[0].len();
    assert!(read.iter().all(|r| r.len() == len) && write.iter().all(|w| w.len() == len), "slices of one length");
    let chunk = (TASK / width).max(1) * width;
    if len <= chunk {
        return vectorized(kernel, || f(read, write));
    }
    let mut write = write.map(|w| w.chunks_mut(chunk));
    let mut items: Vec<_> = (0..len.div_ceil(chunk))
        .map(|i| {
            let part = i * chunk..((i + 1) * chunk).min(len);
            let write = write.each_mut().map(|chunks| chunks.next().expect("as many chunks"));
            Some((read.map(|r| &r[part.clone()]), write))
        })
        .collect();
    for_each_mut(&mut items, |_, item| {
        if let Some((read, write)) = item.take() {
            vectorized(kernel, || f(read, write));
        }
    });
}
