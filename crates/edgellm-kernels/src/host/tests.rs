use burn::tensor::AllocationProperty;
use proptest::prelude::*;

use super::*;
use crate::format::ScaleType;

fn layout(rows: usize, cols: usize, format: Format) -> PackedLayout {
    PackedLayout::new(rows, cols, format).unwrap()
}

/// Largest error that the module documentation of `format` allows for a group of `values` that decode to `back`.
fn allowed(format: Format, values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let step = match format {
        Format::F32 => return 0.0,
        Format::F16 => return largest * 2f32.powi(-11) + 2f32.powi(-25),
        Format::BF16 => return largest * 2f32.powi(-8),
        Format::Quantized(q) => {
            let levels = ((1u32 << q.bit_width) - 1) as f32;
            if q.symmetric {
                // Rounded to f16: relative 2^-11, or half the smallest subnormal, times the code.
                let zero = q.zero_point() as f32;
                let scale = largest / zero;
                let rounding = if q.scale_type == ScaleType::F16 { scale * 2f32.powi(-11) + 3e-8 } else { 0.0 };
                return scale + 2.0 * rounding * zero + largest * 1e-6;
            }
            let low = values.iter().copied().fold(f32::INFINITY, f32::min);
            let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let f16 = q.scale_type == ScaleType::F16;
            let low_slack = if f16 { low.abs() * 2f32.powi(-10) + 6e-8 } else { 0.0 };
            let step = (high - low + low_slack) / levels;
            if f16 { step * (1.0 + 2f32.powi(-10)) + 6e-8 } else { step }
        }
    };
    step / 2.0 + largest * 1e-6
}

fn check_bound(format: Format, rows: usize, cols: usize, values: &[f32]) {
    let packed = PackedHost::quantize(values, layout(rows, cols, format)).unwrap();
    let back = packed.dequantize();
    let group = format.quantized().map_or(1, |q| usize::from(q.group_size));
    for (values, back) in values.chunks(cols).zip(back.chunks(cols)) {
        for (values, back) in values.chunks(group).zip(back.chunks(group)) {
            let bound = allowed(format, values);
            for (v, b) in values.iter().zip(back) {
                assert!((v - b).abs() <= bound, "{format}: {v} became {b}, bound {bound}");
            }
        }
    }
    // What was packed once packs to the same values again.
    let again = PackedHost::from_parts(packed.layout, packed.words.clone(), packed.scales.clone()).unwrap();
    assert_eq!(again, packed);
    assert_eq!(again.dequantize(), back);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn error_is_bounded_on_ragged_shapes(
        rows in 1usize..4,
        cols in 1usize..200,
        magnitude in -6i32..4,
        offset in -2.0f32..2.0,
        seed in any::<u32>(),
    ) {
        let scale = 10f32.powi(magnitude);
        let mut state = u64::from(seed) | 1;
        let values: Vec<f32> = (0..rows * cols).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0 + offset) * scale
        }).collect();
        for format in Format::all() {
            check_bound(format, rows, cols, &values);
        }
    }

    #[test]
    fn any_codes_and_scales_decode_without_panic(cols in 1usize..140, seed in any::<u8>()) {
        for format in Format::all() {
            let layout = layout(2, cols, format);
            let bytes = |n: usize| (0..n).map(|i| (i as u8).wrapping_mul(37) ^ seed).collect::<Vec<u8>>();
            let words = Bytes::from_bytes_vec(bytes(2 * 4 * layout.row_words()));
            let scales = Bytes::from_bytes_vec(bytes(2 * 4 * layout.row_scale_words()));
            let packed = PackedHost::from_parts(layout, words, scales).unwrap();
            prop_assert_eq!(packed.dequantize().len(), 2 * cols);
        }
    }

    #[test]
    fn exact_values_survive(rows in 1usize..3, groups in 1usize..4, seed in any::<u32>()) {
        // Values on a grid with a power-of-two step that uses both ends are reproduced exactly.
        for format in Format::all() {
            let Some(q) = format.quantized() else { continue };
            let cols = groups * usize::from(q.group_size);
            let top = (1u32 << q.bit_width) - 1;
            let zero = if q.symmetric { q.zero_point() as f32 } else { 5.0 };
            let values: Vec<f32> = (0..rows * cols).map(|i| {
                let code = match i % usize::from(q.group_size) {
                    0 => 0,
                    1 => top,
                    _ => (seed.wrapping_add(i as u32).wrapping_mul(2654435761) >> 16) & top,
                };
                (code as f32 - zero) * 0.25
            }).collect();
            let packed = PackedHost::quantize(&values, layout(rows, cols, format)).unwrap();
            prop_assert_eq!(packed.dequantize(), values, "{}", format);
        }
    }
}

#[test]
fn zeros_and_constants() {
    for format in Format::all() {
        let zeros = PackedHost::quantize(&[0.0; 70], layout(1, 70, format)).unwrap();
        assert!(zeros.dequantize().iter().all(|&v| v == 0.0), "{format}");
        let constant = PackedHost::quantize(&[-1.5; 70], layout(1, 70, format)).unwrap();
        assert!(constant.dequantize().iter().all(|&v| v == -1.5), "{format}");
    }
}

#[test]
fn extremes() {
    for format in Format::all() {
        let largest = match format {
            Format::F32 => f32::MAX,
            Format::F16 => 65504.0,
            Format::BF16 => 3.3e38,
            Format::Quantized(q) if q.scale_type == ScaleType::F32 => 1e38,
            Format::Quantized(_) => 60000.0,
        };
        check_bound(format, 1, 33, &[-largest / 4.0; 33]);
        let mut values = vec![1.0; 33];
        values[32] = largest;
        check_bound(format, 1, 33, &values);
        check_bound(format, 1, 33, &[f32::MIN_POSITIVE; 33]);
    }
}

#[test]
fn values_that_cannot_be_packed() {
    for format in Format::all() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5; 2 * 40];
            values[40 + 37] = bad;
            match PackedHost::quantize(&values, layout(2, 40, format)) {
                Err(KernelError::NonFinite { row: 1, col: 37, .. }) => {}
                other => panic!("{format}: {other:?}"),
            }
        }
        let half = format == Format::F16 || format.quantized().is_some_and(|q| q.scale_type == ScaleType::F16);
        if half {
            let values = vec![-3e38; 40];
            let result = PackedHost::quantize(&values, layout(1, 40, format));
            assert!(matches!(result, Err(KernelError::Overflow { row: 0, .. })), "{format}: {result:?}");
        }
    }
}

#[test]
fn lengths_are_checked() {
    let layout = layout(2, 40, Format::parse("q4g32a").unwrap());
    let words = |n: usize| Bytes::from_bytes_vec(vec![0; n]);
    assert!(PackedHost::from_parts(layout, words(64), words(16)).is_ok());
    assert!(matches!(
        PackedHost::from_parts(layout, words(60), words(16)),
        Err(KernelError::Length { expected: 64, found: 60, .. })
    ));
    assert!(PackedHost::from_parts(layout, words(64), words(20)).is_err());
    assert!(PackedHost::quantize(&[0.0; 79], layout).is_err());
    assert!(PackedHost::from_raw_floats(layout, words(64)).is_err());
}

#[test]
fn raw_floats_with_odd_columns_are_padded() {
    let values: Vec<half::f16> = (0..6).map(|i| half::f16::from_f32(i as f32)).collect();
    let packed = PackedHost::from_f16(values, 2, 3).unwrap();
    assert_eq!(packed.words.len(), 16);
    assert_eq!(packed.dequantize(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
}

#[test]
fn unaligned_bytes_are_copied() {
    // A view at every offset of one buffer, as of a file whose tensors are not aligned.
    let values = [1.0f32, -2.0, 3.5];
    for offset in 0..8 {
        let mut file = vec![0u8; offset];
        file.extend_from_slice(bytemuck::cast_slice(&values));
        let view = bytes::Bytes::from(file).slice(offset..);
        let view = Bytes::from_shared(view, AllocationProperty::Native);
        let packed = PackedHost::from_raw_floats(layout(1, 3, Format::F32), view).unwrap();
        assert_eq!(packed.dequantize(), values);
    }
}

#[test]
fn rows_are_gathered() {
    for format in Format::all() {
        let values: Vec<f32> = (0..4 * 37).map(|i| (i as f32 * 0.7).sin()).collect();
        let packed = PackedHost::quantize(&values, layout(4, 37, format)).unwrap();
        let all = packed.dequantize();
        let gathered = packed.gather_rows(&[2, 0, 2]).unwrap();
        let expected: Vec<f32> = [2, 0, 2].iter().flat_map(|&r| &all[r * 37..(r + 1) * 37]).copied().collect();
        assert_eq!(gathered.dequantize(), expected, "{format}");
        assert!(packed.gather_rows(&[4]).is_err());
        assert!(packed.gather_rows(&[]).is_err());
    }
}
