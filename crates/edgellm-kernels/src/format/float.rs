//! Float formats: `f32`, `f16` and `bf16` values as they are, without scales.
//!
//! Two 16-bit values share a `u32` word (the even column in the low half); a row is padded with zeros to a whole
//! word. So a matrix of a safetensors or GGUF file with an even number of columns is used without a copy.

use half::{bf16, f16};

use super::{Format, RowCodec};
use crate::error::{KernelError, Result};

/// The members of this family.
pub(super) fn members() -> Vec<Format> {
    vec![Format::F32, Format::F16, Format::BF16]
}

/// Rows of single-precision values.
pub(super) struct F32Rows;
/// Rows of half-precision values.
pub(super) struct F16Rows;
/// Rows of bfloat16 values.
pub(super) struct Bf16Rows;

/// The value of the half-precision float with these bits.
pub(crate) fn decode_f16(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

impl RowCodec for F32Rows {
    fn row_words(&self, cols: usize) -> usize {
        cols
    }

    fn row_scale_words(&self, _cols: usize) -> usize {
        0
    }

    fn encode(&self, row: usize, values: &[f32], words: &mut [u32], _scales: &mut [u32]) -> Result<()> {
        for (col, (word, &value)) in words.iter_mut().zip(values).enumerate() {
            finite(row, col, value)?;
            *word = value.to_bits();
        }
        Ok(())
    }

    fn decode(&self, words: &[u32], _scales: &[u32], out: &mut [f32]) {
        for (value, &word) in out.iter_mut().zip(words) {
            *value = f32::from_bits(word);
        }
    }
}

impl RowCodec for F16Rows {
    fn row_words(&self, cols: usize) -> usize {
        cols.div_ceil(2)
    }

    fn row_scale_words(&self, _cols: usize) -> usize {
        0
    }

    fn encode(&self, row: usize, values: &[f32], words: &mut [u32], _scales: &mut [u32]) -> Result<()> {
        encode_halves(row, Format::F16, values, words, |v| (f16::from_f32(v).to_bits(), f16::from_f32(v).is_finite()))
    }

    fn decode(&self, words: &[u32], _scales: &[u32], out: &mut [f32]) {
        decode_halves(words, out, decode_f16);
    }
}

impl RowCodec for Bf16Rows {
    fn row_words(&self, cols: usize) -> usize {
        cols.div_ceil(2)
    }

    fn row_scale_words(&self, _cols: usize) -> usize {
        0
    }

    fn encode(&self, row: usize, values: &[f32], words: &mut [u32], _scales: &mut [u32]) -> Result<()> {
        encode_halves(row, Format::BF16, values, words, |v| {
            (bf16::from_f32(v).to_bits(), bf16::from_f32(v).is_finite())
        })
    }

    fn decode(&self, words: &[u32], _scales: &[u32], out: &mut [f32]) {
        decode_halves(words, out, |bits| bf16::from_bits(bits).to_f32());
    }
}

fn encode_halves(
    row: usize,
    format: Format,
    values: &[f32],
    words: &mut [u32],
    encode: impl Fn(f32) -> (u16, bool),
) -> Result<()> {
    for (col, &value) in values.iter().enumerate() {
        finite(row, col, value)?;
        let (bits, is_finite) = encode(value);
        if !is_finite {
            return Err(KernelError::Overflow { row, col, value, format: format.name() });
        }
        words[col / 2] |= u32::from(bits) << (16 * (col % 2));
    }
    Ok(())
}

fn decode_halves(words: &[u32], out: &mut [f32], decode: impl Fn(u16) -> f32) {
    for (col, value) in out.iter_mut().enumerate() {
        *value = decode((words[col / 2] >> (16 * (col % 2))) as u16);
    }
}

/// Refuses NaN and infinities.
pub(super) fn finite(row: usize, col: usize, value: f32) -> Result<()> {
    if value.is_finite() { Ok(()) } else { Err(KernelError::NonFinite { row, col, value: value.to_string() }) }
}
