//! Quantized formats: integer codes of 2, 3, 4, 5, 6 or 8 bits with a scale per group of columns.
//!
//! **Codes.** Every block of 32 consecutive columns is `bit_width` little-endian `u32` words: a little-endian bit
//! stream in which code `i` of the block occupies bits `[i * bit_width, (i + 1) * bit_width)`. Rows are padded with
//! zero codes to a multiple of 32 columns. There is no waste at any width, and eight codes are always
//! `bit_width` whole bytes.
//!
//! **Values.** With `q` the code, in `0 ..= 2^b - 1`:
//!
//! - asymmetric: `w = scale * q + min`, like GGML's `Q4_1` and `Q5_1`;
//! - symmetric: `w = scale * (q - 2^(b - 1))`, like GGML's `Q4_0`, `Q5_0` and `Q8_0`.
//!
//! A float minimum, rather than an integer zero point, is what lets GGUF files be imported exactly. Group size 16
//! and `f32` scales exist for the same reason (GGML's K types have two-level scales whose products need more bits
//! than `f16` has).
//!
//! **Scales**, per row and group (the last group may be short), are `f16`, `f32`, or 8 bits times a unit of the row; see
//! [`super::scales`].
//!
//! **Quantization** is round to nearest. Scales are rounded to their storage type *before* codes are computed.
//! Asymmetric: `min` is the group's minimum rounded down, `scale = (max - min) / (2^b - 1)` rounded up, so that the
//! whole group lies on the grid's span and `|w - deq(w)| <= scale / 2` (and one `f32` rounding). Symmetric:
//! `scale = extreme / -2^(b - 1)` where `extreme` is the value of largest magnitude, as in `Q4_0`: code 0 is the extreme
//! itself, and only values near its opposite are clipped, by at most one `scale`. A group of zeros has scale 0 and
//! decodes to exact zeros.

use core::ops::Range;

use super::float::finite;
use super::scales::ScaleType;
use super::sparse::{self, SparsePattern};
use super::{Format, RowCodec};
use crate::error::{KernelError, Result};

/// Columns of a block of codes.
pub(crate) const BLOCK: usize = 32;

/// Bit widths that exist.
pub(super) const BIT_WIDTHS: [u8; 6] = [2, 3, 4, 5, 6, 8];
/// Group sizes that exist.
const GROUP_SIZES: [u16; 4] = [16, 32, 64, 128];

/// A quantized format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    /// Bits per code: 2, 3, 4, 5, 6 or 8.
    pub bit_width: u8,
    /// Columns that share a scale: 16, 32, 64 or 128.
    pub group_size: u16,
    /// Whether zero lies in the middle of the codes (no minimum is stored).
    pub symmetric: bool,
    /// How scales are stored.
    pub scale_type: ScaleType,
    /// Which weights are stored. Sparse patterns need a group size of 32, 64 or 128 and `f16` scales.
    pub pattern: SparsePattern,
}

/// The members of this family: what compression offers, then what lossless import of GGML's K types needs.
pub(super) fn members() -> Vec<Format> {
    let mut formats = Vec::new();
    let pattern = SparsePattern::Dense;
    for bit_width in BIT_WIDTHS {
        for group_size in [32, 64, 128] {
            for symmetric in [true, false] {
                formats.push(QuantFormat { bit_width, group_size, symmetric, scale_type: ScaleType::F16, pattern });
            }
        }
    }
    // Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.
    for (bit_width, group_size, symmetric) in
        [(2, 16, false), (3, 16, true), (4, 32, false), (5, 32, false), (6, 16, true)]
    {
        formats.push(QuantFormat { bit_width, group_size, symmetric, scale_type: ScaleType::F32, pattern });
    }
    // Two levels: every width and group size, asymmetric and symmetric.
    for (bit_width, group_size, symmetric) in
        [(2, 16, false), (3, 64, false), (4, 32, false), (5, 16, true), (6, 128, false), (4, 32, true), (8, 64, true)]
    {
        formats.push(QuantFormat { bit_width, group_size, symmetric, scale_type: ScaleType::U8, pattern });
    }
    formats.into_iter().map(Format::Quantized).collect()
}

impl QuantFormat {
    /// A checked dense format.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedFormat`].
    pub fn new(bit_width: u8, group_size: u16, symmetric: bool, scale_type: ScaleType) -> Result<Self> {
        let format = QuantFormat { bit_width, group_size, symmetric, scale_type, pattern: SparsePattern::Dense };
        format.check()?;
        Ok(format)
    }

    /// The checked format that stores only the weights of a pattern.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedFormat`], [`KernelError::UnsupportedPattern`].
    pub fn with_pattern(self, pattern: SparsePattern) -> Result<Self> {
        let format = QuantFormat { pattern, ..self };
        format.check()?;
        Ok(format)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedFormat`], [`KernelError::UnsupportedPattern`].
    pub fn check(&self) -> Result<()> {
        if !BIT_WIDTHS.contains(&self.bit_width) || !GROUP_SIZES.contains(&self.group_size) {
            return Err(KernelError::UnsupportedFormat { bit_width: self.bit_width, group_size: self.group_size });
        }
        let whole_blocks = usize::from(self.group_size) % BLOCK == 0;
        let combines = !self.is_sparse() || (whole_blocks && self.scale_type == ScaleType::F16);
        if self.pattern.exists() && combines {
            Ok(())
        } else {
            Err(KernelError::UnsupportedPattern { format: self.name() })
        }
    }

    /// Whether only some of the weights are stored.
    pub fn is_sparse(&self) -> bool {
        self.pattern != SparsePattern::Dense
    }

    /// The code that stands for zero in symmetric formats, `2^(b - 1)`.
    pub fn zero_point(&self) -> u32 {
        1 << (self.bit_width - 1)
    }

    /// Groups in a row of `cols` columns.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(usize::from(self.group_size))
    }

    pub(super) fn name(&self) -> String {
        let symmetric = if self.symmetric { 's' } else { 'a' };
        let scales = match self.scale_type {
            ScaleType::F16 => "",
            ScaleType::F32 => "-f32",
            ScaleType::U8 => "-8",
        };
        let pattern = if self.is_sparse() { format!("-{}", self.pattern) } else { String::new() };
        format!("q{}g{}{symmetric}{scales}{pattern}", self.bit_width, self.group_size)
    }

    pub(super) fn parse(name: &str) -> Result<Self> {
        let unknown = || KernelError::UnknownFormat { name: name.chars().take(64).collect() };
        let (body, suffix) = name.split_once('-').map_or((name, None), |(body, suffix)| (body, Some(suffix)));
        let (scale_type, pattern) = match suffix {
            None => (ScaleType::F16, SparsePattern::Dense),
            Some("f32") => (ScaleType::F32, SparsePattern::Dense),
            Some("8") => (ScaleType::U8, SparsePattern::Dense),
            Some(pattern) => (ScaleType::F16, SparsePattern::parse(pattern).ok_or_else(unknown)?),
        };
        let (body, symmetric) = match (body.strip_suffix('s'), body.strip_suffix('a')) {
            (Some(body), _) => (body, true),
            (_, Some(body)) => (body, false),
            _ => return Err(unknown()),
        };
        let (bits, group) = body.strip_prefix('q').and_then(|b| b.split_once('g')).ok_or_else(unknown)?;
        let format = QuantFormat {
            bit_width: bits.parse().map_err(|_| unknown())?,
            group_size: group.parse().map_err(|_| unknown())?,
            symmetric,
            scale_type,
            pattern,
        };
        // "q+4g032a" parses as numbers but is not a name.
        if format.name() != name {
            return Err(unknown());
        }
        format.check()?;
        Ok(format)
    }

    /// The value of a code.
    pub(crate) fn value(&self, code: u32, scale: f32, min: f32) -> f32 {
        if self.symmetric { scale * (code as i32 - self.zero_point() as i32) as f32 } else { scale * code as f32 + min }
    }

    /// Fits the scale of a group to finite values, stores it, and calls `put(i, code)` for every value. Without values,
    /// the scale is 0.
    pub(super) fn encode_group(
        &self,
        row: usize,
        group: usize,
        values: &[f32],
        scales: &mut [u32],
        mut put: impl FnMut(usize, u32),
    ) -> Result<()> {
        let (scale, min) = if values.is_empty() { (0.0, 0.0) } else { self.fit(values) };
        if !scale.is_finite() || !min.is_finite() {
            return Err(self.overflow(row, group, values));
        }
        self.store(scales, self.units(scales), group, scale, min);
        self.encode_values(values, scale, min, &mut put);
        Ok(())
    }

    /// As [`encode_group`](Self::encode_group) for all groups of a row, with two-level scales.
    fn encode_row(&self, row: usize, values: &[f32], words: &mut [u32], scales: &mut [u32]) -> Result<()> {
        let group_size = usize::from(self.group_size);
        let (units, grids) = self.fit_row(values.chunks(group_size));
        self.put_units(scales, units);
        let top = ((1u32 << self.bit_width) - 1) as f32;
        for (group, (values, (scale, min))) in values.chunks(group_size).zip(grids).enumerate() {
            if !(scale * top).is_finite() || !min.is_finite() {
                return Err(self.overflow(row, group, values));
            }
            self.store(scales, units, group, scale, min);
            self.encode_values(values, scale, min, &mut |i, code| {
                put_code(words, usize::from(self.bit_width), group * group_size + i, code);
            });
        }
        Ok(())
    }

    fn overflow(&self, row: usize, group: usize, values: &[f32]) -> KernelError {
        let value = values.iter().copied().fold(0.0f32, |best, v| if v.abs() > best.abs() { v } else { best });
        let col = group * usize::from(self.group_size);
        KernelError::Overflow { row, col, value, format: self.name() }
    }

    /// Calls `put(i, code)` with the nearest code of every value.
    fn encode_values(&self, values: &[f32], scale: f32, min: f32, put: &mut impl FnMut(usize, u32)) {
        let top = ((1u32 << self.bit_width) - 1) as f32;
        for (i, &value) in values.iter().enumerate() {
            let code = if scale == 0.0 {
                if self.symmetric { self.zero_point() } else { 0 }
            } else if self.symmetric {
                ((value / scale).round() + self.zero_point() as f32).clamp(0.0, top) as u32
            } else {
                // In f64: the difference of two large values neither overflows nor loses the code.
                let steps = (f64::from(value) - f64::from(min)) / f64::from(scale);
                steps.round().clamp(0.0, f64::from(top)) as u32
            };
            put(i, code);
        }
    }
}

impl RowCodec for QuantFormat {
    fn row_words(&self, cols: usize) -> usize {
        self.pattern.mask_words(cols) + self.pattern.kept(cols).div_ceil(BLOCK) * usize::from(self.bit_width)
    }

    fn row_scale_words(&self, cols: usize) -> usize {
        self.scale_words(self.groups(cols))
    }

    fn encode(&self, row: usize, values: &[f32], words: &mut [u32], scales: &mut [u32]) -> Result<()> {
        for (col, &value) in values.iter().enumerate() {
            finite(row, col, value)?;
        }
        if self.is_sparse() {
            return sparse::encode(self, row, values, words, scales);
        }
        if self.scale_type == ScaleType::U8 {
            return self.encode_row(row, values, words, scales);
        }
        let group_size = usize::from(self.group_size);
        for (group, chunk) in values.chunks(group_size).enumerate() {
            self.encode_group(row, group, chunk, scales, |i, code| {
                put_code(words, usize::from(self.bit_width), group * group_size + i, code);
            })?;
        }
        Ok(())
    }

    fn decode(&self, words: &[u32], scales: &[u32], out: &mut [f32]) {
        if self.is_sparse() {
            return sparse::decode(self, out.len(), words, scales, 0, out);
        }
        for (group, chunk) in out.chunks_mut(usize::from(self.group_size)).enumerate() {
            let (scale, min) = self.scale_and_min(scales, group);
            let first = group * usize::from(self.group_size);
            for (i, value) in chunk.iter_mut().enumerate() {
                let code = get_code(words, usize::from(self.bit_width), first + i);
                *value = self.value(code, scale, min);
            }
        }
    }
    fn check(&self, row: usize, cols: usize, words: &[u32]) -> Result<()> {
        sparse::check(self, row, cols, words)
    }

    fn decode_blocks(&self, cols: usize, words: &[u32], scales: &[u32], blocks: Range<usize>, out: &mut [f32]) {
        if self.is_sparse() {
            return sparse::decode(self, cols, words, scales, blocks.start, out);
        }
        out.fill(0.0);
        for (col, value) in (blocks.start * BLOCK..cols).zip(out) {
            let (scale, min) = self.scale_and_min(scales, col / usize::from(self.group_size));
            *value = self.value(get_code(words, usize::from(self.bit_width), col), scale, min);
        }
    }
}

/// Writes the code of column `col` into a zeroed row.
pub(crate) fn put_code(words: &mut [u32], bit_width: usize, col: usize, code: u32) {
    let (word, shift) = position(bit_width, col);
    words[word] |= code << shift;
    if shift + bit_width > 32 {
        words[word + 1] |= code >> (32 - shift);
    }
}

/// Reads the code of column `col` of a row.
pub(crate) fn get_code(words: &[u32], bit_width: usize, col: usize) -> u32 {
    let (word, shift) = position(bit_width, col);
    let mut code = words[word] >> shift;
    if shift + bit_width > 32 {
        code |= words[word + 1] << (32 - shift);
    }
    code & ((1 << bit_width) - 1)
}

fn position(bit_width: usize, col: usize) -> (usize, usize) {
    let bit = (col % BLOCK) * bit_width;
    ((col / BLOCK) * bit_width + bit / 32, bit % 32)
}
