//! The integer kernels of every instruction set, against sums in double precision.

use core::ops::Range;

use super::{Part, Task, Tokens8};
use crate::arch::matmul::ColumnsMut;
use crate::arch::{Isa, Kernel};
use crate::format::{Arrangement, BLOCK, Format, PackedLayout};
use crate::host::PackedHost;
use crate::panels::Panels;

fn on_every_isa(test: impl Fn(Kernel)) {
    for isa in Isa::available() {
        test(Kernel::new(isa).expect("available"));
    }
}

fn prepared_formats() -> Vec<Format> {
    let prepares =
        |format: &Format| packed(1, 32, *format).prepare().unwrap().layout.arrangement == Arrangement::Panels;
    Format::all().into_iter().filter(prepares).collect()
}

fn wave(n: usize, step: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * step).sin() * (1.0 + (i % 7) as f32)).collect()
}

fn product(kernel: Kernel, host: &PackedHost, x: &[f32], part: Part, accumulate: bool) -> Vec<f32> {
    let layout = host.layout;
    let (words, scales) = (bytemuck::cast_slice(&host.words), bytemuck::cast_slice(&host.scales));
    let matrix = Panels::new(layout, words, scales);
    let (from, to, parts) = match part {
        Part::Forward => (layout.cols, layout.rows, layout.panels()),
        Part::Backward => (layout.rows, layout.cols, matrix.blocks()),
    };
    let tokens = x.len() / from;
    let x = Tokens8::new(kernel, x, from);
    let mut out = vec![1.0; tokens * to];
    let width = to.div_ceil(parts).next_multiple_of(16);
    // In two tasks, as threads would.
    let cut = parts.div_ceil(2);
    for (i, columns) in ColumnsMut::split(&mut out, tokens, to, cut * width).into_iter().enumerate() {
        let range = i * cut..((i + 1) * cut).min(parts);
        Task { matrix, x: &x, part, range, out: columns, accumulate }.run(kernel);
    }
    out
}

/// The largest magnitude of some rows and columns.
fn largest(w: &[f32], stride: usize, rows: Range<usize>, cols: Range<usize>) -> f64 {
    let rows = rows.start..rows.end.min(w.len() / stride);
    let cols = cols.start..cols.end.min(stride);
    rows.flat_map(|r| w[r * stride..][cols.clone()].iter()).fold(0.0, |m, v| f64::from(v.abs()).max(m))
}

/// Compares with the exact product. Rounding to 8 bits costs at most half a step: an activation is off by the largest of
/// its block of 32 over 254; backward also a weight, by the largest of its 32 rows and its group over 254.
fn check(host: &PackedHost, tokens: usize, part: Part) {
    let PackedLayout { rows, cols, format, .. } = host.layout;
    let group = usize::from(format.quantized().unwrap().group_size).max(BLOCK);
    let w = host.dequantize();
    let panels = host.prepare().unwrap();
    let forward = matches!(part, Part::Forward);
    let (from, to) = if forward { (cols, rows) } else { (rows, cols) };
    let x = wave(tokens * from, 0.91);
    let weight_error = |block: usize, o: usize| {
        let (first, col) = (block * BLOCK, o / group * group);
        if forward { 0.0 } else { largest(&w, cols, first..first + BLOCK, col..col + group) / 254.0 }
    };
    let blocks = from.div_ceil(BLOCK);
    let x_errors: Vec<f64> = (0..tokens * blocks)
        .map(|i| {
            let (t, first) = (i / blocks, i % blocks * BLOCK);
            largest(&x, from, t..t + 1, first..first + BLOCK) / 254.0
        })
        .collect();
    let w_errors: Vec<f64> = (0..blocks * to).map(|i| weight_error(i / to, i % to)).collect();
    on_every_isa(|kernel| {
        let found = product(kernel, &panels, &x, part, false);
        let added = product(kernel, &panels, &x, part, true);
        for t in 0..tokens {
            for o in 0..to {
                let (mut sum, mut allowed, mut magnitude) = (0.0, 1e-6, 0.0);
                for i in 0..from {
                    let block = i / BLOCK;
                    let w = f64::from(if forward { w[o * cols + i] } else { w[i * cols + o] });
                    let v = f64::from(x[t * from + i]);
                    let (x_error, w_error) = (x_errors[t * blocks + block], w_errors[block * to + o]);
                    sum += w * v;
                    magnitude += (w * v).abs();
                    allowed += x_error * (w.abs() + w_error) + w_error * v.abs();
                }
                let (value, added) = (f64::from(found[t * to + o]), f64::from(added[t * to + o]));
                let (error, allowed) = ((value - sum).abs(), 1.001 * allowed + 1e-5 * magnitude);
                let what = || format!("{format} [{rows}, {cols}], token {t} of {tokens}, {o}, {kernel:?}");
                assert!(error <= allowed, "{}: {error:e}, allowed {allowed:e}", what());
                assert!((added - value - 1.0).abs() <= 1e-5 * (1.0 + magnitude), "{}: accumulated", what());
            }
        }
    });
}

fn packed(rows: usize, cols: usize, format: Format) -> PackedHost {
    PackedHost::quantize(&wave(rows * cols, 0.37), PackedLayout::new(rows, cols, format).unwrap()).unwrap()
}

#[test]
fn forward() {
    for format in prepared_formats() {
        for (rows, cols) in [(16, 32), (35, 161), (7, 64)] {
            for tokens in [1, 2, 3, 4, 5, 13, 27] {
                check(&packed(rows, cols, format), tokens, Part::Forward);
            }
        }
    }
}

#[test]
fn backward() {
    for format in prepared_formats() {
        for (rows, cols) in [(32, 32), (35, 161), (80, 48)] {
            for tokens in [1, 6, 13] {
                check(&packed(rows, cols, format), tokens, Part::Backward);
            }
        }
    }
}

/// The scalar kernels are the reference: the others differ from them only by the order of float sums.
#[test]
fn instruction_sets_agree() {
    let scalar = Kernel::new(Isa::Scalar).unwrap();
    for format in prepared_formats() {
        let host = packed(40, 96, format).prepare().unwrap();
        for (part, from) in [(Part::Forward, 96), (Part::Backward, 40)] {
            for tokens in [1, 14] {
                let x = wave(tokens * from, 0.53);
                let expected = product(scalar, &host, &x, part, false);
                let scale = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                on_every_isa(|kernel| {
                    for (found, expected) in product(kernel, &host, &x, part, false).iter().zip(&expected) {
                        assert!((found - expected).abs() <= 2e-6 * scale, "{format}, {kernel:?}: {found} {expected}");
                    }
                });
            }
        }
    }
}

#[test]
#[should_panic(expected = "tokens of 64 columns")]
fn tokens_of_another_width_are_refused() {
    let host = packed(16, 64, Format::parse("q4g32a").unwrap()).prepare().unwrap();
    product(Kernel::active(), &host, &[0.0; 32], Part::Forward, false);
}

/// Codes and activations of the largest magnitude, whose products are added in 16 bits where that is faster.
#[test]
fn the_largest_products_fit() {
    let (rows, cols) = (16, 96);
    for format in prepared_formats() {
        for [most, other] in [[1.0, -1.0], [-1.0, 1.0], [1.0, 0.0], [0.0, 1.0]] {
            let values: Vec<f32> = (0..rows * cols).map(|i| if i % 16 == 0 { other } else { most }).collect();
            let host = PackedHost::quantize(&values, PackedLayout::new(rows, cols, format).unwrap()).unwrap();
            let (w, panels) = (host.dequantize(), host.prepare().unwrap());
            for (part, from, to) in [(Part::Forward, cols, rows), (Part::Backward, rows, cols)] {
                for (tokens, x) in [(1, 1.0), (1, -1.0), (7, 1.0), (7, -1.0)] {
                    on_every_isa(|kernel| {
                        let found = product(kernel, &panels, &vec![x; tokens * from], part, false);
                        for (at, found) in found.into_iter().enumerate() {
                            let o = at % to;
                            let weight = |i: usize| if from == cols { w[o * cols + i] } else { w[i * cols + o] };
                            let expected: f32 = (0..from).map(|i| weight(i) * x).sum();
                            assert!(
                                (found - expected).abs() <= 0.01 * from as f32,
                                "{format}, {kernel:?}: {found} {expected}"
                            );
                        }
                    });
                }
            }
        }
    }
}

/// Those of one processor family add floats in the same order.
#[cfg(target_arch = "aarch64")]
#[test]
fn arm_instruction_sets_agree_exactly() {
    let neon = Kernel::new(Isa::Neon).unwrap();
    for format in prepared_formats() {
        let host = packed(40, 161, format).prepare().unwrap();
        for (part, from) in [(Part::Forward, 161), (Part::Backward, 40)] {
            for tokens in [1, 2, 4, 5, 7, 12] {
                let x = wave(tokens * from, 0.53);
                let expected = product(neon, &host, &x, part, false);
                for isa in [Isa::NeonDot, Isa::NeonI8mm] {
                    let Some(kernel) = Kernel::new(isa) else { continue };
                    assert_eq!(
                        product(kernel, &host, &x, part, false),
                        expected,
                        "{format}, {kernel:?}, {tokens} tokens"
                    );
                }
            }
        }
    }
}
