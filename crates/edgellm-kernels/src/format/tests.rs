use super::*;

#[test]
fn names_round_trip() {
    let formats = Format::all();
    assert_eq!(formats.len(), 44);
    for format in formats {
        assert_eq!(Format::parse(&format.name()), Ok(format));
        assert_eq!(format.check(), Ok(()));
    }
}

#[test]
fn names_that_are_not_formats() {
    for name in
        ["", "q", "q4", "q4g32", "q7g32a", "q4g48s", "q4g32x", "Q4G32A", "q+4g32a", "q04g32a", "q4g32a-f16", "f64"]
    {
        assert!(Format::parse(name).is_err(), "{name}");
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
    assert_eq!(Format::parse("q4g32a").unwrap().bits_per_weight(64), 5.0);
    assert_eq!(Format::parse("q4g32s").unwrap().bits_per_weight(64), 4.5);
    assert_eq!(Format::F16.matrix_bytes(3, 5), 36);
}

#[test]
fn layouts_that_cannot_exist() {
    assert!(PackedLayout::new(0, 1, Format::F32).is_err());
    assert!(PackedLayout::new(1, 0, Format::F32).is_err());
    assert!(PackedLayout::new(usize::MAX, usize::MAX, Format::F32).is_err());
    assert!(PackedLayout::new(usize::MAX / 8, 1 << 30, Format::parse("q2g64s").unwrap()).is_err());
    let bad = QuantFormat { bit_width: 7, group_size: 32, symmetric: true, scale_type: ScaleType::F16 };
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
