//! Normalization, rotation and activation in one pass over memory.

use rayon::prelude::*;

use super::exp::exp;
use super::{Float, TASK, dense, dims, float, for_chunks, slice};
use crate::arch::{Kernel, vectorized};

pub(super) fn rms_norm(x: Float, weight: Float, eps: f64) -> Float {
    let [rows, width] = dims(&x);
    let (x, weight) = (dense(x), dense(weight));
    let (x, weight) = (slice::<f32>(&x), slice::<f32>(&weight));
    let mut out = vec![0.0; rows * width];
    let size = chunk_of(width);
    for_chunks(&mut out, size, |i, out| {
        for (out, x) in out.chunks_mut(width).zip(x[i * size..].chunks(width)) {
            let r = inverse_rms(x, eps);
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * r * w;
            }
        }
    });
    float(out, [rows, width])
}

pub(super) fn rms_norm_backward(x: Float, weight: Float, dy: Float, eps: f64) -> (Float, Float) {
    let [rows, width] = dims(&x);
    let (x, weight, dy) = (dense(x), dense(weight), dense(dy));
    let (x, weight, dy) = (slice::<f32>(&x), slice::<f32>(&weight), slice::<f32>(&dy));
    let kernel = Kernel::active();
    let mut dx = vec![0.0; rows * width];
    let size = chunk_of(width);
    // Every chunk of rows sums its part of the weight's gradient; the parts are added in order.
    let parts: Vec<Vec<f32>> = dx
        .par_chunks_mut(size)
        .zip(x.par_chunks(size))
        .zip(dy.par_chunks(size))
        .map(|((dx, x), dy)| {
            let mut dw = vec![0.0; width];
            vectorized(kernel, || {
                for ((dx, x), dy) in dx.chunks_mut(width).zip(x.chunks(width)).zip(dy.chunks(width)) {
                    let r = inverse_rms(x, eps);
                    let dot: f32 = sum(width, |i| dy[i] * weight[i] * x[i]);
                    let pull = dot * r * r / width as f32;
                    for i in 0..width {
                        dx[i] = r * (weight[i] * dy[i] - x[i] * pull);
                        dw[i] += dy[i] * x[i] * r;
                    }
                }
            });
            dw
        })
        .collect();
    let mut dw = vec![0.0; width];
    for part in &parts {
        dw.iter_mut().zip(part).for_each(|(total, part)| *total += part);
    }
    (float(dx, [rows, width]), float(dw, [width]))
}

#[inline(always)]
pub(super) fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let mean = sum(x.len(), |i| x[i] * x[i]) / x.len() as f32;
    1.0 / (mean + eps as f32).sqrt()
}

/// Sums with independent accumulators: vectorizes, and loses less than one running sum.
#[inline(always)]
pub(super) fn sum(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let whole = n / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    let rest: f32 = (whole..n).map(term).sum();
    sums.iter().sum::<f32>() + rest
}

pub(super) fn rope(x: Float, cos: Float, sin: Float) -> Float {
    let [batch, heads, tokens, dim] = dims(&x);
    let [_, half] = dims(&cos);
    let (x, cos, sin) = (dense(x), dense(cos), dense(sin));
    let (x, cos, sin) = (slice::<f32>(&x), slice::<f32>(&cos), slice::<f32>(&sin));
    let mut out = vec![0.0; x.len()];
    let size = chunk_of(dim);
    for_chunks(&mut out, size, |i, out| {
        let first = i * size / dim;
        for (row, (out, x)) in out.chunks_mut(dim).zip(x[i * size..].chunks(dim)).enumerate() {
            let at = (first + row) % tokens * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            let (x1, x2) = (&x[..half], &x[half..2 * half]);
            let (out1, rest) = out.split_at_mut(half);
            let (out2, rest) = rest.split_at_mut(half);
            for j in 0..half {
                out1[j] = x1[j] * cos[j] - x2[j] * sin[j];
                out2[j] = x2[j] * cos[j] + x1[j] * sin[j];
            }
            rest.copy_from_slice(&x[2 * half..]);
        }
    });
    float(out, [batch, heads, tokens, dim])
}

pub(super) fn swiglu(gate: Float, up: Float) -> Float {
    let shape = gate.layout().shape().clone();
    let (gate, up) = (dense(gate), dense(up));
    let (gate, up) = (slice::<f32>(&gate), slice::<f32>(&up));
    let mut out = vec![0.0; gate.len()];
    for_chunks(&mut out, TASK, |i, out| {
        let start = i * TASK;
        for ((out, g), u) in out.iter_mut().zip(&gate[start..]).zip(&up[start..]) {
            *out = g * sigmoid(*g) * u;
        }
    });
    float(out, shape)
}

pub(super) fn swiglu_backward(gate: Float, up: Float, dy: Float) -> (Float, Float) {
    let shape = gate.layout().shape().clone();
    let (gate, up, dy) = (dense(gate), dense(up), dense(dy));
    let (gate, up, dy) = (slice::<f32>(&gate), slice::<f32>(&up), slice::<f32>(&dy));
    let kernel = Kernel::active();
    let (mut d_gate, mut d_up) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
    let outputs = d_gate.par_chunks_mut(TASK).zip(d_up.par_chunks_mut(TASK));
    let inputs = gate.par_chunks(TASK).zip(up.par_chunks(TASK)).zip(dy.par_chunks(TASK));
    outputs.zip(inputs).for_each(|((d_gate, d_up), ((gate, up), dy))| {
        vectorized(kernel, || {
            for ((((d_gate, d_up), gate), up), dy) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dy) {
                let s = sigmoid(*gate);
                *d_up = dy * gate * s;
                *d_gate = dy * up * s * (1.0 + gate * (1.0 - s));
            }
        });
    });
    (float(d_gate, shape.clone()), float(d_up, shape))
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Elements of a task: whole rows.
fn chunk_of(width: usize) -> usize {
    (TASK / width).max(1) * width
}
