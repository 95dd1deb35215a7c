use burn::tensor::AllocationProperty;
use proptest::prelude::*;

use super::*;
use crate::format::sparse::SparseRow;
use crate::format::{QuantFormat, ScaleType, SparsePattern};

fn layout(rows: usize, cols: usize, format: Format) -> PackedLayout {
    PackedLayout::new(rows, cols, format).unwrap()
}

/// Largest error that the module documentation of `format` allows for a group of `values` of a row.
fn allowed(format: Format, row: &[f32], values: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let step = match format {
        Format::F32 => return 0.0,
        Format::F16 => return largest * 2f32.powi(-11) + 2f32.powi(-25),
        Format::BF16 => return largest * 2f32.powi(-8),
        Format::Quantized(q) if q.scale_type == ScaleType::U8 => return allowed_two_levels(q, row, values),
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

/// The same with two-level scales: a group's ends are off by up to a unit of the row, which is the largest scale or
/// minimum of the row over 127 or 255, rounded up to eight bits.
fn allowed_two_levels(q: QuantFormat, row: &[f32], values: &[f32]) -> f32 {
    let largest = |values: &[f32]| values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let above = |unit: f32| unit * (1.0 + 2f32.powi(-7)) + 1e-40;
    let slack = largest(values) * 1e-6;
    if q.symmetric {
        let zero = q.zero_point() as f32;
        return largest(values) / zero + above(largest(row) / zero / 127.0) + slack;
    }
    let (groups, levels) = (row.chunks(usize::from(q.group_size)), ((1u32 << q.bit_width) - 1) as f32);
    let low = |values: &[f32]| values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = |values: &[f32]| values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let min_unit = above(groups.clone().map(|group| low(group).abs()).fold(0.0, f32::max) / 127.0);
    let step = |values: &[f32]| (high(values) - low(values) + min_unit) / levels;
    let scale_unit = above(groups.map(step).fold(0.0, f32::max) / 255.0);
    (step(values) + scale_unit) / 2.0 + slack
}

/// Which columns of a row are stored: all of a dense format's, what the mask says of a sparse one's.
fn stored(packed: &PackedHost, row: usize) -> Vec<bool> {
    let cols = packed.layout.cols;
    match packed.layout.format.quantized().filter(QuantFormat::is_sparse) {
        None => vec![true; cols],
        Some(q) => {
            let words = SparseRow::new(&q, cols, packed.row_words(row));
            (0..cols).map(|col| words.mask(col / 32) >> (col % 32) & 1 == 1).collect()
        }
    }
}

/// The stored columns are as many as the pattern says and the largest, in every group of `m`, or in the row.
fn check_pattern(format: Format, values: &[f32], stored: &[bool]) {
    let pattern = format.quantized().map_or(SparsePattern::Dense, |q| q.pattern);
    let (n, m) = match pattern {
        SparsePattern::Dense => return,
        SparsePattern::NofM { n, m } => (usize::from(n), usize::from(m)),
        SparsePattern::Bitmask { percent } => ((values.len() * usize::from(percent)).div_ceil(100), values.len()),
    };
    for (values, stored) in values.chunks(m).zip(stored.chunks(m)) {
        let pairs = || values.iter().map(|v| v.abs()).zip(stored);
        assert_eq!(pairs().filter(|(_, stored)| **stored).count(), n.min(values.len()), "{format}");
        let least = pairs().filter(|(_, stored)| **stored).fold(f32::INFINITY, |least, (v, _)| least.min(v));
        assert!(pairs().all(|(v, stored)| *stored || v <= least), "{format}: {values:?}, {stored:?}");
    }
}

fn check_bound(format: Format, rows: usize, cols: usize, values: &[f32]) {
    let packed = PackedHost::quantize(values, layout(rows, cols, format)).unwrap();
    assert_eq!(packed.check(), Ok(()));
    let back = packed.dequantize();
    let group = format.quantized().map_or(1, |q| usize::from(q.group_size));
    for (row, (values, back)) in values.chunks(cols).zip(back.chunks(cols)).enumerate() {
        let values_of_row = values;
        let stored = stored(&packed, row);
        check_pattern(format, values, &stored);
        for ((values, back), stored) in values.chunks(group).zip(back.chunks(group)).zip(stored.chunks(group)) {
            let kept: Vec<f32> = values.iter().zip(stored).filter(|(_, stored)| **stored).map(|(v, _)| *v).collect();
            let bound = allowed(format, values_of_row, &kept);
            for ((v, b), stored) in values.iter().zip(back).zip(stored) {
                if *stored {
                    assert!((v - b).abs() <= bound, "{format}: {v} became {b}, bound {bound}");
                } else {
                    assert_eq!(*b, 0.0, "{format}: dropped");
                }
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
            let Some(q) = format.quantized().filter(|q| !q.is_sparse()) else { continue };
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
        let expected = stored(&constant, 0).into_iter().map(|stored| if stored { -1.5 } else { 0.0 });
        assert!(constant.dequantize().into_iter().eq(expected), "{format}");
    }
}

#[test]
fn extremes() {
    for format in Format::all() {
        let largest = match format {
            Format::F32 => f32::MAX,
            Format::F16 => 65504.0,
            Format::BF16 => 3.3e38,
            Format::Quantized(q) if q.scale_type != ScaleType::F16 => 1e38,
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

fn sparse_formats() -> impl Iterator<Item = (Format, QuantFormat)> {
    Format::all().into_iter().filter_map(|format| Some((format, format.quantized().filter(QuantFormat::is_sparse)?)))
}

/// Values on the grid of a symmetric scale, pruned to the pattern by someone else: what is not 0 comes back exactly,
/// and so do the zeros.
#[test]
fn pruned_values_survive() {
    for (format, q) in sparse_formats().filter(|(_, q)| q.symmetric) {
        let (cols, zero) = (301, q.zero_point() as i32);
        let kept = q.pattern.kept(cols);
        let mut values = vec![0.0f32; cols];
        // Few enough for any pattern: n:m keeps one of eight columns at least, a bitmask `kept` of them.
        for (i, col) in (0..cols).step_by(8).take(kept.min(38)).enumerate() {
            values[col] = if col % usize::from(q.group_size) < 8 { -zero } else { i as i32 % zero } as f32 * 0.5;
        }
        let packed = PackedHost::quantize(&values, layout(1, cols, format)).unwrap();
        let stored = stored(&packed, 0);
        assert!(values.iter().zip(&stored).all(|(v, stored)| *v == 0.0 || *stored), "{format}");
        let reaches = |group: &[f32]| group.iter().any(|v| *v == -zero as f32 * 0.5);
        let group = usize::from(q.group_size);
        for (values, back) in values.chunks(group).zip(packed.dequantize().chunks(group)) {
            assert!(!reaches(values) || values == back, "{format}: {values:?} became {back:?}");
        }
    }
}

#[test]
fn of_equal_magnitudes_the_first_are_kept() {
    let masks = |name: &str, values: &[f32]| {
        let packed = PackedHost::quantize(values, layout(1, values.len(), Format::parse(name).unwrap())).unwrap();
        u32::from_le_bytes(packed.words[..4].try_into().unwrap())
    };
    assert_eq!(masks("q4g32s-2:4", &[1.0, -1.0, 1.0, -1.0, 0.5, 2.0, -3.0]), 0b110_0011);
    assert_eq!(masks("q4g32s-4:8", &[0.0; 11]), 0b111_0000_1111);
    assert_eq!(masks("q4g32s-b50", &[0.0, -1.0, 1.0, 0.0, 0.0, 1.0]), 0b10_0110);
    assert_eq!(masks("q4g32a-b34", &[1.0; 6]), 0b111);
}

#[test]
fn masks_are_checked() {
    let check = |name: &str, cols: usize, change: &dyn Fn(&mut [u32])| {
        let values: Vec<f32> = (0..3 * cols).map(|i| (i as f32 * 0.7).sin()).collect();
        let packed = PackedHost::quantize(&values, layout(3, cols, Format::parse(name).unwrap())).unwrap();
        let mut words: Vec<u32> = bytemuck::cast_slice(&packed.words).to_vec();
        let row_words = packed.layout.row_words();
        change(&mut words[row_words..2 * row_words]);
        let changed = PackedHost::from_parts(packed.layout, Bytes::from_elems(words), packed.scales.clone()).unwrap();
        assert_eq!(packed.check(), Ok(()));
        assert_eq!(changed.dequantize().len(), 3 * cols, "still decodes");
        match changed.check() {
            Ok(()) => None,
            Err(KernelError::Mask { row: 1, first, end, expected, found, .. }) => Some((first, end, expected, found)),
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(check("q4g32s-2:4", 70, &|_| {}), None);
    assert_eq!(check("q4g32s-2:4", 70, &|words| words[1] &= !0xf0), Some((36, 40, 2, 0)));
    // Moved to the neighbouring group, so that the row keeps as many.
    assert_eq!(check("q4g32s-2:4", 64, &|words| words[0] = words[0] & !0xff | 0x17), Some((0, 4, 2, 3)));
    assert_eq!(check("q4g32s-4:8", 64, &|words| words[0] = words[0] & !0xff | 0x55), None);
    assert_eq!(check("q4g32s-4:8", 64, &|words| words[1] |= 0xff00_0000), Some((56, 64, 4, 8)));
    // The last group has two columns, of which both are kept; there are no others.
    assert_eq!(check("q4g32s-2:4", 70, &|words| words[2] |= 0x40), Some((68, 70, 2, 3)));
    assert_eq!(check("q4g32s-2:4", 70, &|words| words[2] |= 0x100), Some((72, 76, 0, 1)));
    assert_eq!(check("q4g32s-b50", 70, &|words| words[0] = 0), Some((0, 70, 35, 35 - 17)));
    assert_eq!(check("q4g32s-b50", 64, &|words| words.swap(0, 1)), None);
    let moved = |words: &mut [u32]| words[2] = words[2] & (words[2] - 1) | 0x80;
    assert_eq!(check("q4g32s-b50", 70, &moved), Some((0, 70, 35, 35)));
    assert_eq!(check("q4g32s", 70, &|words| words.fill(u32::MAX)), None);
}

/// A mask that keeps more columns than there are codes: those that have one are decoded, the others are 0.
#[test]
fn columns_without_a_code_are_zero() {
    for (format, q) in sparse_formats() {
        let layout = layout(1, 100, format);
        let words = Bytes::from_elems(vec![u32::MAX; layout.row_words()]);
        let scales = Bytes::from_elems(vec![0x3c00_3c00u32; layout.row_scale_words()]);
        let back = PackedHost::from_parts(layout, words, scales).unwrap().dequantize();
        let (kept, top) = (q.pattern.kept(100), (1 << q.bit_width) - 1);
        let value = if q.symmetric { top - q.zero_point() as i32 } else { top + 1 } as f32;
        let expected = (0..100).map(|col| if col < kept { value } else { 0.0 });
        assert!(back.iter().copied().eq(expected), "{format}: {back:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_of_sparse_rows_decode_alike_in_parts(
        cols in 1usize..200,
        bits in prop::sample::select(vec![2u8, 3, 4, 5, 6, 8]),
        symmetric in any::<bool>(),
        group_size in prop::sample::select(vec![32u16, 64, 128]),
        percent in 1u8..=99,
        which in 0..3,
        bytes in prop::collection::vec(any::<u32>(), 64),
    ) {
        let pattern = match which {
            0 => SparsePattern::NofM { n: 2, m: 4 },
            1 => SparsePattern::NofM { n: 4, m: 8 },
            _ => SparsePattern::Bitmask { percent },
        };
        let q = QuantFormat::new(bits, group_size, symmetric, ScaleType::F16).unwrap().with_pattern(pattern).unwrap();
        let layout = layout(2, cols, Format::Quantized(q));
        let words = |n: usize| Bytes::from_elems(bytes.iter().cycle().take(n).copied().collect::<Vec<u32>>());
        let packed =
            PackedHost::from_parts(layout, words(2 * layout.row_words()), words(2 * layout.row_scale_words())).unwrap();
        let _ = packed.check();
        let whole = packed.dequantize();
        let blocks = cols.div_ceil(32);
        for start in 0..blocks {
            for end in start + 1..=blocks {
                let mut part = vec![f32::NAN; (end - start) * 32];
                let (words, scales) = (packed.row_words(1), packed.row_scales(1));
                layout.format.codec().decode_blocks(cols, words, scales, start..end, &mut part);
                let expected = whole[cols + start * 32..].iter().chain(std::iter::repeat(&0.0)).take(part.len());
                let same = |p: &f32, e: &f32| p.to_bits() == e.to_bits() || (p.is_nan() && e.is_nan());
                prop_assert!(part.iter().zip(expected).all(|(p, e)| same(p, e)));
            }
        }
    }
}
