//! Every available instruction set against the scalar reference of the formats, on ragged shapes and every range of
//! blocks.

use super::*;
use crate::format::{BLOCK, Format, PackedLayout, ScaleType};
use crate::host::PackedHost;

fn packed(rows: usize, cols: usize, format: Format) -> PackedHost {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 1.37).sin() * 3.0).collect();
    PackedHost::quantize(&values, PackedLayout::new(rows, cols, format).unwrap()).unwrap()
}

fn rows(host: &PackedHost) -> PackedRows<'_> {
    PackedRows::new(host.layout, bytemuck::cast_slice(&host.words), bytemuck::cast_slice(&host.scales))
}

fn on_every_isa(test: impl Fn(Kernel)) {
    let mut ran = Vec::new();
    for isa in Isa::available() {
        let kernel = Kernel::new(isa).unwrap();
        assert_eq!(kernel.isa(), isa);
        test(kernel);
        ran.push(isa);
    }
    assert_eq!(ran, Isa::available());
    assert!(ran.contains(&Isa::Scalar));
}

#[test]
fn decoded_rows_are_the_reference() {
    for format in Format::all() {
        // Products of codes with arbitrary f32 scales are inexact, so that one rounding less is visible.
        let exact = format.quantized().is_none_or(|q| q.scale_type != ScaleType::F32);
        for cols in [1, 15, 32, 33, 160, 290] {
            let host = packed(3, cols, format);
            let expected = host.dequantize();
            let all = cols.div_ceil(BLOCK);
            on_every_isa(|kernel| {
                for start in 0..all {
                    for end in start + 1..=all {
                        let width = (end - start) * BLOCK;
                        let mut out = vec![f32::NAN; 2 * width];
                        rows(&host).decode(kernel, 1..3, start..end, &mut out);
                        for (row, out) in out.chunks(width).enumerate() {
                            let from = (row + 1) * cols;
                            let expected = &expected[from + start * BLOCK..from + (end * BLOCK).min(cols)];
                            for (f, e) in out.iter().zip(expected) {
                                let same = if exact { f == e } else { (f - e).abs() <= 1e-6 };
                                assert!(same, "{format}, {cols} columns, {kernel:?}: {f} instead of {e}");
                            }
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn dotted_rows_are_the_reference() {
    for format in Format::all() {
        for cols in [1, 31, 64, 161] {
            let host = packed(4, cols, format);
            let w = host.dequantize();
            for tokens in [1, 2, 3, 5, 8, 15] {
                let x: Vec<f32> = (0..tokens * cols).map(|i| (i as f32 * 0.91).cos()).collect();
                on_every_isa(|kernel| {
                    let mut out = vec![f32::NAN; 3 * tokens];
                    rows(&host).dot(kernel, 1..4, &Tokens::new(&x, cols), &mut out);
                    for (i, &found) in out.iter().enumerate() {
                        let (row, token) = (1 + i / tokens, i % tokens);
                        let pairs = w[row * cols..(row + 1) * cols].iter().zip(&x[token * cols..(token + 1) * cols]);
                        let expected: f64 = pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        let error = (f64::from(found) - expected).abs();
                        assert!(error <= 2e-5, "{format}, {cols} columns, {tokens} tokens, {kernel:?}: {error:e}");
                    }
                });
            }
        }
    }
}

#[test]
#[should_panic(expected = "words of a packed matrix")]
fn short_buffers_are_refused() {
    let layout = PackedLayout::new(2, 64, Format::F32).unwrap();
    PackedRows::new(layout, &[0; 127], &[]);
}

#[test]
#[should_panic(expected = "blocks")]
fn blocks_outside_the_matrix_are_refused() {
    let host = packed(1, 64, Format::F32);
    rows(&host).decode(Kernel::active(), 0..1, 1..3, &mut [0.0; 64]);
}
