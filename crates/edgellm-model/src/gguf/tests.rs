//! Hand-worked blocks: every byte of a block is set so that the values can be computed on paper from the published
//! structures, and a position that is decoded wrongly changes a value.

use super::*;
use edgellm_kernels::Format;

/// Decodes `content` both ways, checks that they agree bit for bit, and returns the values.
fn values(ggml_type: GgmlType, content: &[u8]) -> Vec<f32> {
    assert_eq!(content.len(), ggml_type.block_bytes());
    let len = ggml_type.block_len();
    let mut out = vec![0.0; len];
    dequantize(ggml_type, content, &mut out);
    let packed = repack(ggml_type, 1, len, content, |row| row).unwrap();
    assert_eq!(packed.layout.format, packed_format(ggml_type));
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&packed.dequantize()), bits(&out), "repacked {ggml_type}");
    out
}

fn f16_bytes(value: f32) -> [u8; 2] {
    half::f16::from_f32(value).to_le_bytes()
}

/// 16 bytes whose low halves count 0 to 15 and whose high halves count down from 15.
fn counting() -> Vec<u8> {
    (0..16u8).map(|j| j | (15 - j) << 4).collect()
}

#[test]
fn q4_0_is_scale_times_code_minus_8() {
    let content = [&f16_bytes(0.5)[..], &counting()].concat();
    let expected: Vec<f32> = (0..32).map(|i| 0.5 * (if i < 16 { i } else { 31 - i } - 8) as f32).collect();
    assert_eq!(values(GgmlType::Q4_0, &content), expected);
    assert_eq!(expected[..2], [-4.0, -3.5]);
}

#[test]
fn q4_1_is_scale_times_code_plus_minimum() {
    let content = [&f16_bytes(0.25)[..], &f16_bytes(-1.5), &counting()].concat();
    let expected: Vec<f32> = (0..32).map(|i| 0.25 * if i < 16 { i } else { 31 - i } as f32 - 1.5).collect();
    assert_eq!(values(GgmlType::Q4_1, &content), expected);
    assert_eq!(expected[15], 2.25);
}

#[test]
fn q5_0_takes_the_fifth_bits_from_a_word() {
    // Fifth bits for elements 0, 5 and 31 only.
    let content = [&f16_bytes(2.0)[..], &(1u32 | 1 << 5 | 1 << 31).to_le_bytes(), &counting()].concat();
    let expected: Vec<f32> = (0..32)
        .map(|i| {
            let low = if i < 16 { i } else { 31 - i };
            2.0 * (low + if [0, 5, 31].contains(&i) { 16 } else { 0 } - 16) as f32
        })
        .collect();
    assert_eq!(values(GgmlType::Q5_0, &content), expected);
    assert_eq!((expected[0], expected[5], expected[31]), (0.0, 10.0, 0.0));
}

#[test]
fn q5_1_takes_the_fifth_bits_from_a_word() {
    let content = [&f16_bytes(0.5)[..], &f16_bytes(3.0), &(1u32 << 15 | 1 << 16).to_le_bytes(), &counting()].concat();
    let expected: Vec<f32> = (0..32)
        .map(|i| {
            let low = if i < 16 { i } else { 31 - i };
            0.5 * (low + if [15, 16].contains(&i) { 16 } else { 0 }) as f32 + 3.0
        })
        .collect();
    assert_eq!(values(GgmlType::Q5_1, &content), expected);
    assert_eq!((expected[15], expected[16]), (18.5, 18.5));
}

#[test]
fn q8_0_is_scale_times_signed_code() {
    let signed: Vec<i8> = (0..32).map(|i| if i == 0 { -128 } else { (i * 8 - 121) as i8 }).collect();
    let content: Vec<u8> = f16_bytes(0.125).into_iter().chain(signed.iter().map(|&v| v as u8)).collect();
    let expected: Vec<f32> = signed.iter().map(|&v| 0.125 * f32::from(v)).collect();
    assert_eq!(values(GgmlType::Q8_0, &content), expected);
    assert_eq!(expected[0], -16.0);
}

/// Splits codes of `low_bits` bits as `Q2_K` and `Q3_K` store them: byte `l` of half `n` has the codes
/// `128 n + 32 j + l`, lowest `j` first.
fn quarters(codes: &[u8; 256]) -> Vec<u8> {
    (0..64).map(|b| (0..4).fold(0, |byte, j| byte | (codes[b / 32 * 128 + j * 32 + b % 32] & 3) << (2 * j))).collect()
}

/// Codes without a period that a wrong index could follow.
fn scattered(levels: u32) -> [u8; 256] {
    std::array::from_fn(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 13) as u8 % levels as u8)
}

#[test]
fn q2_k_has_scales_and_minima_on_two_levels() {
    let codes = scattered(4);
    let scales: Vec<u8> = (0..16u8).map(|g| (15 - g) | g << 4).collect();
    let content = [&scales[..], &quarters(&codes), &f16_bytes(0.5), &f16_bytes(0.25)].concat();
    let expected: Vec<f32> = (0..256)
        .map(|i| {
            let group = (i / 16) as f32;
            0.5 * (15.0 - group) * f32::from(codes[i]) - 0.25 * group
        })
        .collect();
    assert_eq!(values(GgmlType::Q2_K, &content), expected);
}

#[test]
fn q3_k_has_six_bit_scales_around_32() {
    let codes = scattered(8);
    let high: Vec<u8> = (0..32).map(|l| (0..8).fold(0, |byte, j| byte | (codes[32 * j + l] >> 2) << j)).collect();
    // Scale of group g: 4 g, so that both the low four and the high two bits matter.
    let scale = |g: usize| 4 * g as u8;
    let mut packed = [0u8; 12];
    for g in 0..16 {
        packed[g % 8] |= (scale(g) & 15) << (g / 8 * 4);
        packed[8 + g % 4] |= (scale(g) >> 4) << (g / 4 * 2);
    }
    let content = [&high[..], &quarters(&codes), &packed, &f16_bytes(0.5)].concat();
    let expected: Vec<f32> =
        (0..256).map(|i| 0.5 * (f32::from(scale(i / 16)) - 32.0) * (f32::from(codes[i]) - 4.0)).collect();
    assert_eq!(values(GgmlType::Q3_K, &content), expected);
    assert_eq!(expected[0], 0.5 * -32.0 * (f32::from(codes[0]) - 4.0));
}

/// The 12 bytes of eight 6-bit scales and minima.
fn six_bit_pairs(scales: [u8; 8], minima: [u8; 8]) -> [u8; 12] {
    let mut packed = [0u8; 12];
    for j in 0..4 {
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        packed[j + 4] = minima[j] | (minima[j + 4] >> 4) << 6;
        packed[j + 8] = (scales[j + 4] & 15) | (minima[j + 4] & 15) << 4;
    }
    packed
}

const SCALES: [u8; 8] = [1, 63, 17, 32, 45, 6, 58, 23];
const MINIMA: [u8; 8] = [0, 5, 62, 33, 20, 51, 8, 47];

fn expected_k(codes: &[u8; 256]) -> Vec<f32> {
    (0..256).map(|i| 0.5 * f32::from(SCALES[i / 32]) * f32::from(codes[i]) - 0.25 * f32::from(MINIMA[i / 32])).collect()
}

/// Low four bits: byte `32 c + l` has the codes `64 c + l` and `64 c + 32 + l`.
fn pairs(codes: &[u8; 256]) -> Vec<u8> {
    (0..128).map(|b| codes[b / 32 * 64 + b % 32] & 15 | (codes[b / 32 * 64 + 32 + b % 32] & 15) << 4).collect()
}

#[test]
fn q4_k_has_six_bit_scales_and_minima() {
    let codes = scattered(16);
    let content = [&f16_bytes(0.5)[..], &f16_bytes(0.25), &six_bit_pairs(SCALES, MINIMA), &pairs(&codes)].concat();
    assert_eq!(values(GgmlType::Q4_K, &content), expected_k(&codes));
}

#[test]
fn q5_k_adds_a_fifth_bit() {
    let codes = scattered(32);
    let high: Vec<u8> = (0..32).map(|l| (0..8).fold(0, |byte, j| byte | (codes[32 * j + l] >> 4) << j)).collect();
    let content =
        [&f16_bytes(0.5)[..], &f16_bytes(0.25), &six_bit_pairs(SCALES, MINIMA), &high, &pairs(&codes)].concat();
    assert_eq!(values(GgmlType::Q5_K, &content), expected_k(&codes));
}

#[test]
fn q6_k_has_signed_scales_for_16() {
    let codes = scattered(64);
    let mut low = [0u8; 128];
    let mut high = [0u8; 64];
    for (i, code) in codes.iter().enumerate() {
        let (n, k, l) = (i / 128, i % 128 / 32, i % 32);
        // Quarters 0 and 1 are the low halves of the first and the second 32 bytes, 2 and 3 their high halves.
        low[64 * n + [0, 32, 0, 32][k] + l] |= (code & 15) << [0, 0, 4, 4][k];
        high[32 * n + l] |= (code >> 4) << [0, 2, 4, 6][k];
    }
    let scales: Vec<i8> = (0..16).map(|g| g * 16 - 121).collect();
    let scale_bytes: Vec<u8> = scales.iter().map(|&s| s as u8).collect();
    let content = [&low[..], &high, &scale_bytes, &f16_bytes(0.5)].concat();
    let expected: Vec<f32> = (0..256).map(|i| 0.5 * f32::from(scales[i / 16]) * (f32::from(codes[i]) - 32.0)).collect();
    assert_eq!(values(GgmlType::Q6_K, &content), expected);
}

#[test]
fn floats_are_taken_as_they_are() {
    assert_eq!(values(GgmlType::F32, &1.1f32.to_le_bytes()), [1.1]);
    assert_eq!(values(GgmlType::F16, &0x3555u16.to_le_bytes()), [0.333_251_95]);
    assert_eq!(values(GgmlType::BF16, &0x3f80u16.to_le_bytes()), [1.0]);
}

#[test]
fn rows_can_be_taken_in_another_order() {
    for ggml_type in GgmlType::ALL {
        let (rows, cols) = (4, 512);
        let row_bytes = cols / ggml_type.block_len() * ggml_type.block_bytes();
        // Bytes below 0x3c keep every f16 finite.
        let content: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 7 % 59) as u8).collect();
        let order = [2, 0, 3, 1];
        let straight = repack(ggml_type, rows, cols, &content, |row| row).unwrap();
        let gathered = repack(ggml_type, rows, cols, &content, |row| order[row]).unwrap();
        assert_eq!(gathered, straight.gather_rows(&order).unwrap(), "{ggml_type}");
        let mut plain = vec![0.0; rows * cols];
        dequantize(ggml_type, &content, &mut plain);
        assert_eq!(straight.dequantize(), plain, "{ggml_type}");
    }
}

#[test]
fn a_wrong_number_of_bytes_is_an_error() {
    let error = repack(GgmlType::Q4_0, 2, 32, &[0; 35], |row| row).unwrap_err().to_string();
    assert!(error.contains("36") && error.contains("35"), "{error}");
    assert!(repack(GgmlType::Q4_K, 1, 100, &[0; 144], |row| row).is_err());
    assert!(repack(GgmlType::F32, 0, 4, &[], |row| row).is_err());
}

#[test]
fn type_numbers_are_those_of_ggml() {
    for ggml_type in GgmlType::ALL {
        assert_eq!(GgmlType::from_id(ggml_type.id()), Some(ggml_type));
    }
    assert_eq!(GgmlType::from_id(30), Some(GgmlType::BF16));
    assert_eq!(GgmlType::from_id(16), None);
    assert!(matches!(packed_format(GgmlType::BF16), Format::BF16));
}
