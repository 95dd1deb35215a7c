//! Operators without packed weights: forward.

use burn::tensor::Tensor;
use edgellm_kernels::{AttentionParams, attention, rms_norm, rope, swiglu};

use crate::check::{Case, flat, values};
use crate::devices::{Present, on_every_device};
use crate::reference::{self, Heads};

pub(crate) fn rms_norm_case(device: &Present, rows: usize, width: usize, magnitude: f32, gradient: bool) {
    let eps = 1e-5;
    let x = values(rows * width, 31).iter().map(|v| v * magnitude).collect();
    let case = Case {
        name: format!("rms_norm [{rows}, {width}] x {magnitude}"),
        inputs: vec![x, values(width, 32)],
        reference: &|i| reference::rms_norm(&i[0], &i[1], eps),
        operator: &|i| flat(rms_norm(i[0].clone().reshape([1, rows, width]), i[1].clone(), eps)),
    };
    run(&case, device, gradient);
}

pub(crate) fn rope_case(device: &Present, [batch, heads, tokens, dim]: [usize; 4], half: usize, gradient: bool) {
    let angles: Vec<f32> = values(tokens * half, 33).iter().map(|v| v * 3.0).collect();
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let (cos64, sin64) = (crate::check::wide(&cos), crate::check::wide(&sin));
    let case = Case {
        name: format!("rope [{batch}, {heads}, {tokens}, {dim}], {half} pairs"),
        inputs: vec![values(batch * heads * tokens * dim, 34)],
        reference: &|i| reference::rope(&i[0], &cos64, &sin64, tokens, dim),
        operator: &|i| {
            let device = i[0].device();
            let table = |v: &[f32]| Tensor::<1>::from_floats(v, &device).reshape([tokens, half]);
            flat(rope(i[0].clone().reshape([batch, heads, tokens, dim]), table(&cos), table(&sin)))
        },
    };
    run(&case, device, gradient);
}

pub(crate) fn attention_case(device: &Present, h: &Heads, gradient: bool) {
    let (queries, keys) = ([h.batch, h.heads, h.tokens, h.dim], [h.batch, h.kv_heads, h.keys(), h.dim]);
    let n = |dims: [usize; 4]| dims.iter().product();
    let params = AttentionParams { scale: h.scale as f32, offset: h.offset, window: h.window };
    let case = Case {
        name: format!("attention q {queries:?}, k {keys:?}, window {:?}", h.window),
        inputs: vec![values(n(queries), 35), values(n(keys), 36), values(n(keys), 37)],
        reference: &|i| reference::attention(&i[0], &i[1], &i[2], h),
        operator: &|i| {
            let (q, k, v) = (i[0].clone(), i[1].clone(), i[2].clone());
            flat(attention(q.reshape(queries), k.reshape(keys), v.reshape(keys), params))
        },
    };
    run(&case, device, gradient);
}

pub(crate) fn swiglu_case(device: &Present, n: usize, magnitude: f32, gradient: bool) {
    let case = Case {
        name: format!("swiglu of {n} x {magnitude}"),
        inputs: vec![values(n, 38).iter().map(|v| v * magnitude).collect(), values(n, 39)],
        reference: &|i| reference::swiglu(&i[0], &i[1]),
        operator: &|i| swiglu(i[0].clone(), i[1].clone()),
    };
    run(&case, device, gradient);
}

fn run(case: &Case, device: &Present, gradient: bool) {
    if gradient {
        case.gradients(device);
    } else {
        case.forward(device);
    }
}

pub(crate) fn heads(batch: usize, heads: usize, kv_heads: usize, tokens: usize, dim: usize) -> Heads {
    Heads { batch, heads, kv_heads, tokens, dim, offset: 0, window: None, scale: 1.0 / (dim as f64).sqrt() }
}

#[test]
fn norms() {
    on_every_device("rms_norm", |device| {
        for (rows, width, magnitude) in [(1, 1, 1.0), (3, 33, 1.0), (70, 576, 100.0), (2, 65, 1e-4)] {
            rms_norm_case(device, rows, width, magnitude, false);
        }
    });
}

#[test]
fn rotations() {
    on_every_device("rope", |device| {
        rope_case(device, [2, 3, 5, 8], 4, false);
        rope_case(device, [1, 2, 1, 10], 3, false);
        rope_case(device, [1, 9, 70, 64], 32, false);
    });
}

#[test]
fn attentions() {
    on_every_device("attention", |device| {
        attention_case(device, &heads(2, 4, 2, 5, 8), false);
        attention_case(device, &heads(1, 3, 3, 1, 7), false);
        attention_case(device, &Heads { offset: 9, ..heads(2, 9, 3, 1, 64) }, false);
        attention_case(device, &Heads { offset: 4, window: Some(3), ..heads(1, 4, 2, 6, 5) }, false);
        if !device.slow {
            attention_case(device, &Heads { offset: 3, ..heads(1, 6, 2, 150, 16) }, false);
            attention_case(device, &Heads { offset: 40, window: Some(33), ..heads(1, 2, 1, 131, 8) }, false);
        }
    });
}

#[test]
fn gated_activations() {
    on_every_device("swiglu", |device| {
        swiglu_case(device, 1, 1.0, false);
        swiglu_case(device, 5000, 1.0, false);
        swiglu_case(device, 333, 60.0, false);
    });
}

/// Inputs that are views: transposed, sliced, expanded.
#[test]
fn views_are_read_as_views() {
    on_every_device("views", |device| {
        let h = Heads { offset: 3, ..heads(2, 4, 2, 5, 6) };
        let transposed = |t: &Tensor<1>, d: [usize; 4]| t.clone().reshape([d[0], d[2], d[1], d[3]]).swap_dims(1, 2);
        let read_transposed = |v: &[f64], d: [usize; 4]| -> Vec<f64> {
            let mut out = Vec::new();
            for b in 0..d[0] {
                for head in 0..d[1] {
                    for t in 0..d[2] {
                        out.extend_from_slice(&v[((b * d[2] + t) * d[1] + head) * d[3]..][..d[3]]);
                    }
                }
            }
            out
        };
        let (queries, keys) = ([h.batch, h.heads, h.tokens, h.dim], [h.batch, h.kv_heads, h.keys(), h.dim]);
        let n = |dims: [usize; 4]| dims.iter().product();
        let params = AttentionParams { scale: h.scale as f32, offset: h.offset, window: None };
        let case = Case {
            name: "attention on transposed tensors".into(),
            inputs: vec![values(n(queries), 41), values(n(keys), 42), values(n(keys), 43)],
            reference: &|i| {
                let (q, k, v) =
                    (read_transposed(&i[0], queries), read_transposed(&i[1], keys), read_transposed(&i[2], keys));
                reference::attention(&q, &k, &v, &h)
            },
            operator: &|i| {
                let (q, k, v) = (transposed(&i[0], queries), transposed(&i[1], keys), transposed(&i[2], keys));
                flat(attention(q, k, v, params))
            },
        };
        case.forward(device);
        case.gradients(device);

        let case = Case {
            name: "rms_norm and swiglu on columns of a wider tensor".into(),
            inputs: vec![values(4 * 20, 44), values(7, 45)],
            reference: &|i| {
                let part =
                    |from: usize| i[0].chunks(20).flat_map(|row| row[from..from + 7].to_vec()).collect::<Vec<_>>();
                reference::swiglu(&reference::rms_norm(&part(3), &i[1], 1e-6), &part(13))
            },
            operator: &|i| {
                let x = i[0].clone().reshape([4, 20]);
                let normed = rms_norm(x.clone().slice([0..4, 3..10]), i[1].clone(), 1e-6);
                flat(swiglu(normed, x.slice([0..4, 13..20])))
            },
        };
        case.forward(device);
        case.gradients(device);
    });
}
