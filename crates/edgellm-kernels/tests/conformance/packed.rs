//! Operators on packed matrices, for every format of the registry.

use burn::tensor::{Bytes, Int, Tensor, TensorData};
use edgellm_kernels::{
    Format, Lora, PackedHost, PackedLayout, ScaleType, cross_entropy_head, packed_embedding, packed_linear,
};

use crate::check::{Case, flat, read, values, wide};
use crate::devices::{Present, on_every_device};
use crate::reference;

fn packed(rows: usize, cols: usize, format: Format, seed: u64) -> PackedHost {
    PackedHost::quantize(&values(rows * cols, seed), PackedLayout::new(rows, cols, format).unwrap()).unwrap()
}

/// `(tokens, rows, cols)`: both sides of the switch between few and many tokens, and ragged in every way.
fn shapes(device: &Present) -> &'static [(usize, usize, usize)] {
    if device.slow {
        &[(1, 3, 161), (5, 4, 33)]
    } else {
        &[
            (1, 1, 1),
            (1, 5, 31),
            (1, 7, 33),
            (1, 37, 416),
            (2, 5, 97),
            (3, 4, 160),
            (4, 9, 32),
            (5, 3, 130),
            (7, 2, 64),
            (8, 6, 257),
            (9, 19, 100),
            (33, 70, 129),
            (64, 131, 65),
        ]
    }
}

#[test]
fn packed_linear_forward() {
    on_every_device("packed_linear", |device| {
        for format in Format::all() {
            for &(tokens, rows, cols) in shapes(device) {
                let host = packed(rows, cols, format, 3);
                let w = wide(&host.dequantize());
                let matrix = host.to_device(&device.device);
                Case {
                    name: format!("packed_linear {format} T={tokens} [{rows}, {cols}]"),
                    inputs: vec![values(tokens * cols, 5)],
                    reference: &|x| reference::matmul_t(&x[0], &w, cols),
                    operator: &|x| flat(packed_linear(x[0].clone().reshape([tokens, cols]), &matrix, None)),
                }
                .forward(device);
            }
        }
    });
}

#[test]
fn packed_linear_gradient() {
    on_every_device("packed_linear gradient", |device| {
        for format in Format::all() {
            let shapes: &[(usize, usize, usize)] =
                if device.slow { &[(2, 3, 40)] } else { &[(1, 5, 33), (3, 7, 100), (11, 6, 69)] };
            for &(tokens, rows, cols) in shapes {
                let host = packed(rows, cols, format, 4);
                let w = wide(&host.dequantize());
                let matrix = host.to_device(&device.device);
                Case {
                    name: format!("packed_linear {format} T={tokens} [{rows}, {cols}]"),
                    inputs: vec![values(tokens * cols, 6)],
                    reference: &|x| reference::matmul_t(&x[0], &w, cols),
                    operator: &|x| flat(packed_linear(x[0].clone().reshape([tokens, cols]), &matrix, None)),
                }
                .gradients(device);
            }
        }
    });
}

/// Many columns and rows, so that the tiles of the transposed product have borders inside; the gradient is known in
/// closed form.
#[test]
fn packed_linear_gradient_of_larger_matrices() {
    on_every_device("packed_linear gradient, large", |device| {
        let formats =
            ["q3g128a", "q4g32a", "q6g16s-f32", "q8g64s", "q4g32s-2:4", "q5g64a-4:8", "q3g32a-b40", "f16", "f32"];
        for format in formats.map(|name| Format::parse(name).unwrap()) {
            let (tokens, rows, cols) = if device.slow { (3, 40, 300) } else { (37, 611, 333) };
            let host = packed(rows, cols, format, 8);
            let w = wide(&host.dequantize());
            let matrix = host.to_device(&device.device);
            let upstream = values(tokens * rows, 9);
            let autodiff = device.device.clone().autodiff();
            let x = Tensor::<2>::zeros([tokens, cols], &autodiff).require_grad();
            let dy = Tensor::<1>::from_floats(upstream.as_slice(), &autodiff).reshape([tokens, rows]);
            let grads = (packed_linear(x.clone(), &matrix, None) * dy).sum().backward();
            let columns: Vec<f64> =
                (0..cols).flat_map(|c| w.iter().skip(c).step_by(cols).copied().collect::<Vec<_>>()).collect();
            let expected = reference::matmul_t(&wide(&upstream), &columns, rows);
            let found = read(flat(x.grad(&grads).unwrap()));
            crate::check::assert_close(&format!("packed_linear gradient {format}"), device, &found, &expected);
        }
    });
}

#[test]
fn packed_linear_with_a_low_rank_update() {
    on_every_device("packed_linear with LoRA", |device| {
        for format in Format::all() {
            if device.slow && format.quantized().is_some_and(|q| q.group_size != 32) {
                continue;
            }
            let (tokens, rows, cols, rank, scaling) = (3, 5, 41, 2, 1.75f32);
            let host = packed(rows, cols, format, 10);
            let w = wide(&host.dequantize());
            let matrix = host.to_device(&device.device);
            Case {
                name: format!("packed_linear + LoRA {format}"),
                inputs: vec![values(tokens * cols, 11), values(rank * cols, 12), values(rows * rank, 13)],
                reference: &|i| {
                    let base = reference::matmul_t(&i[0], &w, cols);
                    let up = reference::matmul_t(&reference::matmul_t(&i[0], &i[1], cols), &i[2], rank);
                    base.iter().zip(&up).map(|(y, u)| y + f64::from(scaling) * u).collect()
                },
                operator: &|i| {
                    let lora =
                        Lora { a: i[1].clone().reshape([rank, cols]), b: i[2].clone().reshape([rows, rank]), scaling };
                    flat(packed_linear(i[0].clone().reshape([tokens, cols]), &matrix, Some(&lora)))
                },
            }
            .gradients(device);
        }
    });
}

#[test]
fn dequantized_on_the_device_as_on_the_host() {
    on_every_device("dequantize and packed_embedding", |device| {
        for format in Format::all() {
            let cols = &[1, 31, 33, 161][if device.slow { 3..4 } else { 0..4 }];
            for &cols in cols {
                let host = packed(6, cols, format, 14);
                let expected = wide(&host.dequantize());
                let matrix = host.clone().to_device(&device.device);
                assert_eq!(matrix.to_host().unwrap(), host, "{format} on {}", device.name);
                let found = read(flat(matrix.dequantize()));
                crate::check::assert_close(&format!("dequantize {format}"), device, &found, &expected);

                let ids = [5i32, 0, 0, 3];
                let rows: Vec<f64> = ids.iter().flat_map(|&r| expected[r as usize * cols..][..cols].to_vec()).collect();
                let ids = Tensor::<1, Int>::from_ints(ids, &device.device);
                let found = read(flat(packed_embedding(&matrix, ids)));
                crate::check::assert_close(&format!("packed_embedding {format}"), device, &found, &rows);
            }
        }
    });
}

/// Every finite bit pattern of the 16-bit floats, as values and as scales, decodes exactly.
#[test]
fn half_floats_decode_exactly() {
    on_every_device("16-bit floats", |device| {
        for (format, infinity) in [(Format::F16, 0x7c00u16), (Format::BF16, 0x7f80)] {
            let bits: Vec<u16> = (0..=u16::MAX).filter(|bits| bits & infinity != infinity).collect();
            let cols = bits.len() / 8;
            let layout = PackedLayout::new(8, cols, format).unwrap();
            let host = PackedHost::from_raw_floats(layout, Bytes::from_elems(bits)).unwrap();
            let expected = host.dequantize();
            let found = read(flat(host.to_device(&device.device).dequantize()));
            for (&e, &f) in expected.iter().zip(&found) {
                // A GPU may flush single-precision subnormals (bf16 has their range) to zero.
                let flushed = device.slow && e.is_subnormal() && f == 0.0;
                assert!(e == f || flushed, "{format} on {}: {e:e} decoded as {f:e}", device.name);
            }
        }
        // As scales: code 1, so that the value is scale + min.
        for name in ["q4g32s", "q4g32a"] {
            let format = Format::parse(name).unwrap();
            let scales: Vec<u32> = (0..4 * 1024u32).map(|i| i.wrapping_mul(0x0c35_1f03) & 0xbbff_bbff).collect();
            let groups = if name.ends_with('s') { 2 * scales.len() } else { scales.len() };
            let layout = PackedLayout::new(1, groups * 32, format).unwrap();
            let words = vec![0x1111_1111u32; layout.row_words()];
            let host = PackedHost::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(scales)).unwrap();
            let expected = host.dequantize();
            let found = read(flat(host.to_device(&device.device).dequantize()));
            assert_eq!(expected, found, "{name} on {}", device.name);
        }
    });
}

/// Arbitrary bits as codes and scales: no kernel may assume that they came from this crate's quantizer.
#[test]
fn arbitrary_codes() {
    on_every_device("arbitrary codes", |device| {
        for format in Format::all() {
            let Some(q) = format.quantized() else { continue };
            let (rows, cols) = (3, 161);
            let layout = PackedLayout::new(rows, cols, format).unwrap();
            let word = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995;
            let words: Vec<u32> = (0..rows * layout.row_words()).map(word).collect();
            // Scales around 1: exponent bits fixed, mantissas arbitrary.
            let scale = |i: usize| match q.scale_type {
                ScaleType::F16 => word(i) & 0x83ff_83ff | 0x3800_3800,
                ScaleType::F32 => word(i) & 0x807f_ffff | 0x3f00_0000,
                // Units around 1/64, of both signs, and arbitrary codes.
                ScaleType::U8 if i.is_multiple_of(layout.row_scale_words()) => word(i) & 0x807f_807f | 0x3c00_3c00,
                ScaleType::U8 => word(i),
            };
            let scales: Vec<u32> = (0..rows * layout.row_scale_words()).map(scale).collect();
            let host = PackedHost::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(scales)).unwrap();
            let w = wide(&host.dequantize());
            let matrix = host.to_device(&device.device);
            for tokens in if device.slow { [2, 2] } else { [1, 12] } {
                Case {
                    name: format!("arbitrary codes {format} T={tokens}"),
                    inputs: vec![values(tokens * cols, 15)],
                    reference: &|x| reference::matmul_t(&x[0], &w, cols),
                    operator: &|x| flat(packed_linear(x[0].clone().reshape([tokens, cols]), &matrix, None)),
                }
                .forward(device);
            }
        }
    });
}

fn cross_entropy_case(device: &Present, format: Format, tokens: usize, vocabulary: usize, cols: usize, gradient: bool) {
    let host = packed(vocabulary, cols, format, 20);
    let w = wide(&host.dequantize());
    let head = host.to_device(&device.device);
    let targets: Vec<usize> = (0..tokens).map(|t| (t * 7 + vocabulary - 1) % vocabulary).collect();
    let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let mut weights = values(tokens, 22);
    weights[0] = 0.0;
    let case = Case {
        name: format!("cross_entropy_head {format} T={tokens} V={vocabulary}"),
        inputs: vec![values(tokens * cols, 21), weights],
        reference: &|i| reference::cross_entropy(&i[0], &w, &targets, &i[1], cols),
        operator: &|i| {
            let ids = TensorData::new(ids.clone(), [tokens]);
            let ids = Tensor::<1, Int>::from_data(ids, &i[0].device());
            cross_entropy_head(i[0].clone().reshape([tokens, cols]), &head, ids, i[1].clone())
        },
    };
    case.forward(device);
    if gradient {
        case.gradients(device);
    }
}

#[test]
fn cross_entropy_heads() {
    on_every_device("cross_entropy_head", |device| {
        for format in Format::all() {
            if device.slow && format.quantized().is_some_and(|q| q.group_size != 32) {
                continue;
            }
            cross_entropy_case(device, format, 4, 11, 37, true);
        }
        if !device.slow {
            let format = Format::parse("q4g32a").unwrap();
            cross_entropy_case(device, format, 19, 1500, 33, false);
            cross_entropy_case(device, format, 2, 700, 9, true);
        }
    });
}
