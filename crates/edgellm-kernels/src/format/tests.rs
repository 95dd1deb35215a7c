use super::*;

#[test]
fn names_round_trip() {
    let formats = Format::all();
    assert_eq!(formats.len(), 69);
    let names: std::collections::BTreeSet<String> = formats.iter().map(Format::name).collect();
    assert_eq!(names.len(), formats.len());
    for format in formats {
        assert_eq!(Format::parse(&format.name()), Ok(format));
        assert_eq!(format.check(), Ok(()));
    }
}

/// Every pattern with every width, group size and symmetry exists, whether suites cover it or not.
#[test]
fn sparse_formats_are_a_product() {
    for bits in grouped::BIT_WIDTHS {
        for group in [32, 64, 128] {
            for symmetric in ['s', 'a'] {
                for pattern in ["2:4", "4:8", "b1", "b50", "b99"] {
                    let name = format!("q{bits}g{group}{symmetric}-{pattern}");
                    assert_eq!(Format::parse(&name).unwrap().name(), name);
                }
            }
        }
    }
}

#[test]
fn names_that_are_not_formats() {
    for name in [
        "",
        "q",
        "q4",
        "q4g32",
        "q7g32a",
        "q4g48s",
        "q4g32x",
        "Q4G32A",
        "q+4g32a",
        "q04g32a",
        "q4g32a-f16",
        "f64",
        "q4g32a-08",
        "q4g48a-8",
    ] {
        assert!(Format::parse(name).is_err(), "{name}");
    }
    for name in [
        "q4g32s-",
        "q4g32s-b",
        "q4g32s-b050",
        "q4g32s-b+5",
        "q4g32s-dense",
        "q4g32s-2:4-f32",
        "q4g32s-2:04",
        "q4g32s-2:4-8",
    ] {
        assert!(matches!(Format::parse(name), Err(KernelError::UnknownFormat { .. })), "{name}");
    }
    for name in ["q4g32s-1:4", "q4g32s-4:4", "q4g32s-0:0", "q4g32s-b0", "q4g32s-b100", "q4g16s-2:4"] {
        assert!(matches!(Format::parse(name), Err(KernelError::UnsupportedPattern { .. })), "{name}");
    }
    for scale_type in [ScaleType::F32, ScaleType::U8] {
        let dense = QuantFormat::new(4, 32, true, scale_type).unwrap();
        assert!(dense.with_pattern(SparsePattern::NofM { n: 2, m: 4 }).is_err());
    }
}

#[test]
fn sizes() {
    let check = |name: &str, cols, words, scale_words| {
        let format = Format::parse(name).unwrap();
        assert_eq!((format.row_words(cols), format.row_scale_words(cols)), (words, scale_words), "{name} {cols}");
    };
    check("f32", 33, 33, 0);
    check("f16", 33, 17, 0);
    check("bf16", 32, 16, 0);
    check("q4g32a", 64, 8, 2);
    check("q4g32s", 65, 12, 2);
    check("q3g64s", 65, 9, 1);
    check("q6g16s-f32", 40, 12, 3);
    check("q2g16a-f32", 40, 4, 6);
    // A word of units; 5 groups are 2 words of codes.
    check("q4g32a-8", 130, 20, 1 + 2 + 2);
    check("q4g32s-8", 130, 20, 1 + 2);
    check("q2g16a-8", 64, 4, 1 + 1 + 1);
    // A mask word for 32 columns, and a block of codes for 32 kept ones.
    check("q4g32s-4:8", 64, 2 + 4, 1);
    check("q4g32s-2:4", 70, 3 + 2 * 4, 2);
    check("q3g64a-b10", 330, 11 + 2 * 3, 6);
    check("q8g128s-b99", 1, 1 + 8, 1);
    let bits = |name: &str, cols| Format::parse(name).unwrap().bits_per_weight(cols);
    assert_eq!(bits("q4g32a", 64), 5.0);
    assert_eq!(bits("q4g32s", 64), 4.5);
    assert_eq!(bits("q4g32a-8", 2048), 4.515625);
    assert_eq!(bits("q2g16a-8", 2048), 3.015625);
    assert_eq!(bits("q4g32s-4:8", 64), 3.5);
    assert_eq!(bits("q2g128s-2:4", 256), 2.125);
    assert_eq!(bits("q8g64a-b25", 128), 3.5);
    assert_eq!(Format::F16.matrix_bytes(3, 5), 36);
}

#[test]
fn kept_columns() {
    let check = |name: &str, cols, kept| {
        let format = Format::parse(name).unwrap().quantized().unwrap();
        assert_eq!(format.pattern.kept(cols), kept, "{name} {cols}");
    };
    for (cols, kept) in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (7, 4), (8, 4)] {
        check("q4g32s-2:4", cols, kept);
    }
    for (cols, kept) in [(3, 3), (4, 4), (7, 4), (8, 4), (13, 8), (14, 8)] {
        check("q4g32s-4:8", cols, kept);
    }
    for (cols, kept) in [(1, 1), (2, 1), (3, 2), (101, 51), (576, 288)] {
        check("q4g32s-b50", cols, kept);
    }
    check("q4g32s-b1", 100, 1);
    check("q4g32s-b1", 101, 2);
    check("q4g32s-b99", usize::MAX, usize::MAX / 100 * 99 + 15);
}

#[test]
fn layouts_that_cannot_exist() {
    assert!(PackedLayout::new(0, 1, Format::F32).is_err());
    assert!(PackedLayout::new(1, 0, Format::F32).is_err());
    assert!(PackedLayout::new(usize::MAX, usize::MAX, Format::F32).is_err());
    assert!(PackedLayout::new(usize::MAX / 8, 1 << 30, Format::parse("q2g64s").unwrap()).is_err());
    let good = QuantFormat::new(4, 32, true, ScaleType::F16).unwrap();
    let bad = QuantFormat { bit_width: 7, ..good };
    assert!(PackedLayout::new(1, 1, Format::Quantized(bad)).is_err());
    let bad = QuantFormat { pattern: SparsePattern::NofM { n: 3, m: 0 }, ..good };
    assert!(PackedLayout::new(1, 1, Format::Quantized(bad)).is_err());
}

#[test]
fn serialized_as_its_name() {
    let format = Format::parse("q3g64s").unwrap();
    let text: String = format.into();
    assert_eq!(text, "q3g64s");
    assert_eq!(Format::try_from(text), Ok(format));
}

#[test]
fn codes_are_a_little_endian_bit_stream() {
    for bits in [2, 3, 4, 5, 6, 8] {
        let mut words = vec![0u32; 2 * bits];
        let code = |col: usize| (col as u32 * 7 + 3) & ((1 << bits) - 1);
        for col in 0..64 {
            grouped::put_code(&mut words, bits, col, code(col));
        }
        for col in 0..64 {
            assert_eq!(grouped::get_code(&words, bits, col), code(col));
            // Bit by bit, from the definition.
            for bit in 0..bits {
                let at = (col % 32) * bits + bit;
                let found = words[col / 32 * bits + at / 32] >> (at % 32) & 1;
                assert_eq!(found, code(col) >> bit & 1);
            }
        }
    }
}

/// A row of three groups by hand: their ends are -8 and 7, -1 and 0.5, and 0 and 0.
#[test]
fn two_level_scales_by_hand() {
    let mut values = vec![0.0f32; 96];
    values[..4].copy_from_slice(&[-8.0, 7.0, 1.0, 0.25]);
    values[32..36].copy_from_slice(&[-1.0, 0.5, 0.0, -0.25]);
    let packed = |name: &str| {
        let layout = PackedLayout::new(1, 96, Format::parse(name).unwrap()).unwrap();
        let packed = crate::PackedHost::quantize(&values, layout).unwrap();
        (bytemuck::cast_slice::<u8, u32>(&packed.scales).to_vec(), packed.dequantize())
    };
    // The minima -8, -1 and 0 are whole multiples of 8 and 1, of which 1 is the unit, 0x3f80 in bfloat16: -8, -1, 0.
    // The steps are 15 / 15 = 1, 1.5 / 15 = 0.1 and 0: not multiples of one unit of 8 bits. The unit is 1 / 255, rounded
    // up from 0x3b80_8081 to 0x3b81, 0.003936767578125: codes are 254.02 and 25.4, rounded up: 255, 26 and 0.
    let (scales, values) = packed("q4g32a-8");
    assert_eq!(scales, [0x3f80_3b81, 26 << 8 | 255, 0xff << 8 | 0xf8]);
    let unit = 0.003_936_767_6_f32;
    let (first, second) = (255.0 * unit, 26.0 * unit);
    assert_eq!(values[..4], [-8.0, 15.0 * first - 8.0, 9.0 * first - 8.0, 8.0 * first - 8.0]);
    assert_eq!(values[32..36], [-1.0, 15.0 * second - 1.0, 10.0 * second - 1.0, 7.0 * second - 1.0]);
    assert_eq!(values[64..], [0.0; 32]);
    // Extremes of -8, -1 and 0 are scales of 1, 1/8 and 0: multiples of 1/8, which is 0x3e00.
    let (scales, values) = packed("q4g32s-8");
    assert_eq!(scales, [0x3e00, 1 << 8 | 8]);
    assert_eq!(values[..4], [-8.0, 7.0, 1.0, 0.0]);
    assert_eq!(values[32..36], [-1.0, 0.5, 0.0, -0.25]);
}
