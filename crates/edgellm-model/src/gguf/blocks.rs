//! The block formats: decoding them, and repacking them without loss into the packed formats of `edgellm-kernels`.
//!
//! Every quantized type is integer codes `q` and, per group of 16 or 32, a scale and perhaps a minimum:
//!
//! | type | value | packed format |
//! |---|---|---|
//! | `Q4_0`, `Q5_0`, `Q8_0` | `d (q - 2^(b-1))` | symmetric, group 32, f16 scales |
//! | `Q4_1`, `Q5_1` | `d q + m` | asymmetric, group 32, f16 scales |
//! | `Q3_K`, `Q6_K` | `(d s) (q - 2^(b-1))` | symmetric, group 16, f32 scales |
//! | `Q2_K` | `(d s) q - (dmin m)` | asymmetric, group 16, f32 scales |
//! | `Q4_K`, `Q5_K` | `(d s) q - (dmin m)` | asymmetric, group 32, f32 scales |
//!
//! `d`, `dmin` are f16 and `s`, `m` integers of a super-block of 256. Products and sums are rounded to f32 in this
//! order, as in GGML's reference (`dequantize_row_*` in `ggml-quants.c`), and the packed formats decode in the same
//! order, so that the values are equal bit for bit: `x - y` and `x + (-y)` are the same float.

use burn::tensor::Bytes;
use edgellm_kernels::{Format, KernelError, PackedHost, PackedLayout, QuantFormat, ScaleType, SparsePattern};
use half::{bf16, f16};
use rayon::prelude::*;

use super::GgmlType;
use super::ggml_type::SUPER_BLOCK;

/// Codes that are packed together: a block of 32 columns takes as many `u32` words as a code has bits.
const PACKED_BLOCK: usize = 32;

/// A decoded block: codes, and a scale and a minimum per group.
struct Block {
    codes: [u8; SUPER_BLOCK],
    /// Bits of f16 or f32 numbers, whichever the packed format has. A symmetric type has no minimum.
    groups: [(u32, u32); SUPER_BLOCK / 16],
}

impl Block {
    fn new() -> Self {
        Self { codes: [0; SUPER_BLOCK], groups: [(0, 0); SUPER_BLOCK / 16] }
    }
}

/// The packed format that holds a type without loss.
pub fn packed_format(ggml_type: GgmlType) -> Format {
    let (bit_width, group_size, symmetric, scale_type) = match ggml_type {
        GgmlType::F32 => return Format::F32,
        GgmlType::F16 => return Format::F16,
        GgmlType::BF16 => return Format::BF16,
        GgmlType::Q4_0 => (4, 32, true, ScaleType::F16),
        GgmlType::Q4_1 => (4, 32, false, ScaleType::F16),
        GgmlType::Q5_0 => (5, 32, true, ScaleType::F16),
        GgmlType::Q5_1 => (5, 32, false, ScaleType::F16),
        GgmlType::Q8_0 => (8, 32, true, ScaleType::F16),
        GgmlType::Q2_K => (2, 16, false, ScaleType::F32),
        GgmlType::Q3_K => (3, 16, true, ScaleType::F32),
        GgmlType::Q4_K => (4, 32, false, ScaleType::F32),
        GgmlType::Q5_K => (5, 32, false, ScaleType::F32),
        GgmlType::Q6_K => (6, 16, true, ScaleType::F32),
    };
    Format::Quantized(QuantFormat { bit_width, group_size, symmetric, scale_type, pattern: SparsePattern::Dense })
}

/// The values of a tensor of any type.
///
/// # Panics
/// If `content` is not the whole blocks of `out.len()` elements.
pub fn dequantize(ggml_type: GgmlType, content: &[u8], out: &mut [f32]) {
    let (len, size) = (ggml_type.block_len(), ggml_type.block_bytes());
    assert_eq!(out.len() % len, 0, "elements of whole {ggml_type} blocks");
    assert_eq!(content.len(), out.len() / len * size, "bytes of {} elements of {ggml_type}", out.len());
    let Format::Quantized(format) = packed_format(ggml_type) else {
        for (value, bits) in out.iter_mut().zip(content.chunks_exact(size)) {
            *value = match ggml_type {
                GgmlType::F32 => f32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]),
                GgmlType::F16 => f16::from_le_bytes([bits[0], bits[1]]).to_f32(),
                _ => bf16::from_le_bytes([bits[0], bits[1]]).to_f32(),
            };
        }
        return;
    };
    let half = format.scale_type == ScaleType::F16;
    let number = |bits: u32| if half { f16::from_bits(bits as u16).to_f32() } else { f32::from_bits(bits) };
    let zero = format.zero_point() as i32;
    out.par_chunks_mut(len).zip(content.par_chunks_exact(size)).for_each_init(Block::new, |block, (out, content)| {
        decode(ggml_type, content, block);
        for (i, (value, &code)) in out.iter_mut().zip(&block.codes).enumerate() {
            let (scale, min) = block.groups[i / usize::from(format.group_size)];
            *value = if format.symmetric {
                number(scale) * (i32::from(code) - zero) as f32
            } else {
                number(scale) * f32::from(code) + number(min)
            };
        }
    });
}

/// The matrix `[rows, cols]` in the format of [`packed_format`]; its row `i` is row `source_row(i)` of `content`.
///
/// # Errors
/// The length of `content` is not that of such a matrix of whole blocks.
///
/// # Panics
/// If `source_row` gives a row outside the matrix.
pub fn repack(
    ggml_type: GgmlType,
    rows: usize,
    cols: usize,
    content: &[u8],
    source_row: impl Fn(usize) -> usize + Sync,
) -> Result<PackedHost, KernelError> {
    let layout = PackedLayout::new(rows, cols, packed_format(ggml_type))?;
    let (len, size) = (ggml_type.block_len(), ggml_type.block_bytes());
    let row_bytes = cols / len * size;
    // Both factors are below 2^40 by the layout's check, and the bytes are those of an existing buffer.
    if !cols.is_multiple_of(len) || (rows as u128) * (row_bytes as u128) != content.len() as u128 {
        let expected = rows.saturating_mul(row_bytes);
        let what = "bytes of blocks";
        return Err(KernelError::Length { what, layout: layout.to_string(), expected, found: content.len() });
    }
    let source = |row: usize| &content[source_row(row) * row_bytes..][..row_bytes];
    let Format::Quantized(format) = layout.format else {
        let gathered: Vec<u8> = (0..rows).flat_map(|row| source(row).iter().copied()).collect();
        return PackedHost::from_raw_floats(layout, Bytes::from_bytes_vec(gathered));
    };
    let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
    let mut words = vec![0u32; rows * row_words];
    let mut scales = vec![0u32; rows * row_scales];
    words.par_chunks_exact_mut(row_words).zip(scales.par_chunks_exact_mut(row_scales)).enumerate().for_each_init(
        Block::new,
        |block, (row, (words, scales))| {
            for (index, content) in source(row).chunks_exact(size).enumerate() {
                decode(ggml_type, content, block);
                let first = index * len;
                let width = usize::from(format.bit_width);
                for (codes, words) in block.codes[..len]
                    .chunks_exact(PACKED_BLOCK)
                    .zip(words[first / PACKED_BLOCK * width..].chunks_exact_mut(width))
                {
                    pack(codes, u32::from(format.bit_width), words);
                }
                let group_size = usize::from(format.group_size);
                for (group, &pair) in block.groups[..len / group_size].iter().enumerate() {
                    store_scale(&format, scales, first / group_size + group, pair);
                }
            }
        },
    );
    PackedHost::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(scales))
}

/// Packs 32 codes of `width` bits into `width` words, a little-endian stream of bits.
fn pack(codes: &[u8], width: u32, words: &mut [u32]) {
    let mut stream = 0u64;
    let mut filled = 0;
    let mut words = words.iter_mut();
    for &code in codes {
        stream |= u64::from(code) << filled;
        filled += width;
        if filled >= 32 {
            if let Some(word) = words.next() {
                *word = stream as u32;
            }
            stream >>= 32;
            filled -= 32;
        }
    }
}

/// Of the formats of [`packed_format`], whose scales are floats.
fn store_scale(format: &QuantFormat, scales: &mut [u32], group: usize, (scale, min): (u32, u32)) {
    match (format.scale_type == ScaleType::F16, format.symmetric) {
        (true, true) => scales[group / 2] |= scale << (16 * (group % 2)),
        (true, false) => scales[group] = scale | min << 16,
        (false, true) => scales[group] = scale,
        (false, false) => {
            scales[2 * group] = scale;
            scales[2 * group + 1] = min;
        }
    }
}

/// Decodes one block of a quantized type.
fn decode(ggml_type: GgmlType, content: &[u8], block: &mut Block) {
    match ggml_type {
        GgmlType::Q4_0 => nibbles(half_bits(content, 0), 0, None, &content[2..], block),
        GgmlType::Q4_1 => nibbles(half_bits(content, 0), half_bits(content, 2), None, &content[4..], block),
        GgmlType::Q5_0 => nibbles(half_bits(content, 0), 0, Some(&content[2..6]), &content[6..], block),
        GgmlType::Q5_1 => {
            nibbles(half_bits(content, 0), half_bits(content, 2), Some(&content[4..8]), &content[8..], block);
        }
        GgmlType::Q8_0 => {
            block.groups[0] = (half_bits(content, 0), 0);
            for (code, &value) in block.codes.iter_mut().zip(&content[2..]) {
                // The signed value plus 128.
                *code = value ^ 0x80;
            }
        }
        GgmlType::Q2_K => q2_k(content, block),
        GgmlType::Q3_K => q3_k(content, block),
        GgmlType::Q4_K => q4_k(content, None, &content[16..], block),
        GgmlType::Q5_K => q4_k(content, Some(&content[16..48]), &content[48..], block),
        GgmlType::Q6_K => q6_k(content, block),
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => unreachable!("floats are not decoded in blocks"),
    }
}

fn half_bits(content: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([content[at], content[at + 1]]))
}

fn half(content: &[u8], at: usize) -> f32 {
    f16::from_bits(half_bits(content, at) as u16).to_f32()
}

/// `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`: 16 bytes whose low halves are codes 0 to 15 and whose high halves are codes 16 to
/// 31; the fifth bits are the bits of a `u32`.
fn nibbles(scale: u32, min: u32, high: Option<&[u8]>, qs: &[u8], block: &mut Block) {
    let high = high.map_or(0, |h| u32::from_le_bytes([h[0], h[1], h[2], h[3]]));
    block.groups[0] = (scale, min);
    for (j, &q) in qs.iter().enumerate() {
        block.codes[j] = (q & 15) | (((high >> j) & 1) as u8) << 4;
        block.codes[j + 16] = (q >> 4) | (((high >> (j + 16)) & 1) as u8) << 4;
    }
}

/// 16 bytes of scale (low half) and minimum (high half), 64 bytes of codes, `d`, `dmin`. Byte `l` of half `n` holds
/// the codes `128 n + 32 j + l` at bit `2 j`.
fn q2_k(content: &[u8], block: &mut Block) {
    let (d, dmin) = (half(content, 80), half(content, 82));
    for (group, &s) in block.groups.iter_mut().zip(&content[..16]) {
        *group = ((d * f32::from(s & 15)).to_bits(), (-(dmin * f32::from(s >> 4))).to_bits());
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        *code = content[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
    }
}

/// 32 bytes of third bits, 64 bytes of lower bits as in `Q2_K`, 12 bytes of 16 scales of 6 bits, `d`.
fn q3_k(content: &[u8], block: &mut Block) {
    let (high, low, packed, d) = (&content[..32], &content[32..96], &content[96..108], half(content, 108));
    for (i, group) in block.groups.iter_mut().enumerate() {
        let lower = packed[i % 8] >> (i / 8 * 4) & 15;
        let upper = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        *group = ((d * f32::from((lower | upper << 4) as i8 - 32)).to_bits(), 0);
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        let lower = low[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *code = lower | (high[i % 32] >> (i / 32) & 1) << 2;
    }
}

/// `Q4_K`, `Q5_K`: `d`, `dmin`, 12 bytes of 8 scales and 8 minima of 6 bits, for `Q5_K` 32 bytes of fifth bits,
/// 128 bytes of lower bits: the low halves of bytes `32 c + l` are codes `64 c + l`, the high halves `64 c + 32 + l`.
fn q4_k(content: &[u8], high: Option<&[u8]>, qs: &[u8], block: &mut Block) {
    let (d, dmin, packed) = (half(content, 0), half(content, 2), &content[4..16]);
    for (j, group) in block.groups[..8].iter_mut().enumerate() {
        let (scale, min) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        };
        *group = ((d * f32::from(scale)).to_bits(), (-(dmin * f32::from(min))).to_bits());
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        let lower = qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        let upper = high.map_or(0, |h| h[i % 32] >> (i / 32) & 1);
        *code = lower | upper << 4;
    }
}

/// 128 bytes of lower halves, 64 bytes of upper two bits, 16 signed scales, `d`.
fn q6_k(content: &[u8], block: &mut Block) {
    let (low, high, scales, d) = (&content[..128], &content[128..192], &content[192..208], half(content, 208));
    for (group, &s) in block.groups.iter_mut().zip(scales) {
        *group = ((d * f32::from(s as i8)).to_bits(), 0);
    }
    for (i, code) in block.codes.iter_mut().enumerate() {
        // Half `n` of the block, quarter `k` of the half.
        let (n, k, l) = (i / 128, i % 128 / 32, i % 32);
        let lower = low[64 * n + 32 * (k % 2) + l] >> (k / 2 * 4) & 15;
        let upper = high[32 * n + l] >> (2 * k) & 3;
        *code = lower | upper << 4;
    }
}
