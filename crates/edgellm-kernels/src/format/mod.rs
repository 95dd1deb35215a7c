//! Packed formats: what packed bytes mean.
//!
//! A matrix is `[rows, cols]`, one row per output feature as in Hugging Face's `weight`. Every row is coded on its
//! own, so that rows can be permuted, gathered (embeddings) and split over threads. A row has
//! [`Format::row_words`] `u32` words of codes and [`Format::row_scale_words`] `u32` words of scales; the two are
//! separate arrays. Everything is little-endian.
//!
//! A family of formats is one file of this folder and one line in [`FAMILIES`]; test suites take the formats from
//! [`Format::all`], so that a new one is tested on every device and instruction set at once.

mod compensated;
mod float;
mod grids;
mod grouped;
mod refit;
mod scales;
pub(crate) mod sparse;
mod trainable;

use core::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{KernelError, Result};

pub use compensated::{Compensation, InputGram, prune_compensated};
pub(crate) use float::decode_f16;
pub use grouped::QuantFormat;
pub(crate) use grouped::{BLOCK, put_code};
pub use refit::RoundingGoal;
pub use scales::ScaleType;
pub(crate) use scales::Units;
pub use sparse::SparsePattern;
pub use trainable::{GroupValues, TrainableMatrix};

/// Rows of a panel of a prepared matrix.
pub(crate) const PANEL_ROWS: usize = 16;

/// How the elements of a matrix are stored.
///
/// Written as its [`name`](Format::name) in TOML and JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Format {
    /// IEEE 754 single precision, as is.
    F32,
    /// IEEE 754 half precision, as is.
    F16,
    /// The upper half of a single-precision float, as is.
    BF16,
    /// Integer codes with a scale per group.
    Quantized(QuantFormat),
}

/// A family of formats that share their layout rules.
pub struct Family {
    /// Short name.
    pub name: &'static str,
    /// The members that every suite covers.
    pub members: fn() -> Vec<Format>,
}

/// The registry: every family of formats.
pub const FAMILIES: &[Family] = &[
    Family { name: "float", members: float::members },
    Family { name: "grouped", members: grouped::members },
    Family { name: "sparse", members: sparse::members },
];

/// What a family of formats has to know: sizes of a row, and a row's scalar encoder and decoder, which are the
/// reference for every kernel.
pub(crate) trait RowCodec {
    /// `u32` words of codes for `cols` columns.
    fn row_words(&self, cols: usize) -> usize;
    /// `u32` words of scales for `cols` columns.
    fn row_scale_words(&self, cols: usize) -> usize;
    /// Packs `values` into zeroed `words` and `scales`; `row` is only for messages.
    fn encode(&self, row: usize, values: &[f32], words: &mut [u32], scales: &mut [u32]) -> Result<()>;
    /// Unpacks into `out`, one value per column.
    fn decode(&self, words: &[u32], scales: &[u32], out: &mut [f32]);
    /// Checks what decoding does not need, that the words of a row of `cols` columns are what the encoder could have
    /// written; `row` is only for messages.
    fn check(&self, _row: usize, _cols: usize, _words: &[u32]) -> Result<()> {
        Ok(())
    }
    /// Unpacks some whole blocks of 32 columns of a row of `cols` columns, with zeros behind the last column.
    fn decode_blocks(&self, cols: usize, words: &[u32], scales: &[u32], blocks: Range<usize>, out: &mut [f32]) {
        let mut row = vec![0.0; cols.next_multiple_of(BLOCK)];
        self.decode(words, scales, &mut row[..cols]);
        out.copy_from_slice(&row[blocks.start * BLOCK..blocks.end * BLOCK]);
    }
}

impl Format {
    /// The formats that suites cover: the dense ones that `compress` offers, those that lossless import needs, and
    /// every sparse pattern with every bit width.
    pub fn all() -> Vec<Format> {
        FAMILIES.iter().flat_map(|family| (family.members)()).collect()
    }

    /// The format's name: `f32`, `f16`, `bf16`, or `q<bits>g<group>` with `s` (symmetric) or `a` (asymmetric) and
    /// perhaps a suffix: `-f32` for single-precision scales, `-8` for scales of 8 bits times a unit of the row, or a
    /// sparse pattern (`-2:4`, `-4:8`, or `-b` with the kept percentage). Examples: `q4g32a`, `q3g64s`, `q4g32a-8`,
    /// `q6g16s-f32`, `q4g32s-2:4`, `q3g64a-b60`.
    pub fn name(&self) -> String {
        match self {
            Format::F32 => "f32".into(),
            Format::F16 => "f16".into(),
            Format::BF16 => "bf16".into(),
            Format::Quantized(q) => q.name(),
        }
    }

    /// The inverse of [`name`](Format::name).
    ///
    /// # Errors
    /// [`KernelError::UnknownFormat`] if the text is not a name, [`KernelError::UnsupportedFormat`] if it names a
    /// width or group size that does not exist, [`KernelError::UnsupportedPattern`] if it names such a sparse pattern.
    pub fn parse(name: &str) -> Result<Format> {
        match name {
            "f32" => Ok(Format::F32),
            "f16" => Ok(Format::F16),
            "bf16" => Ok(Format::BF16),
            _ => QuantFormat::parse(name).map(Format::Quantized),
        }
    }

    /// `u32` words of codes in a row of `cols` columns.
    pub fn row_words(&self, cols: usize) -> usize {
        self.codec().row_words(cols)
    }

    /// `u32` words of scales in a row of `cols` columns; 0 for float formats.
    pub fn row_scale_words(&self, cols: usize) -> usize {
        self.codec().row_scale_words(cols)
    }

    /// Bytes of a matrix: codes and scales. Saturates at `u64::MAX`.
    pub fn matrix_bytes(&self, rows: usize, cols: usize) -> u64 {
        let row = self.row_words(cols) as u64 + self.row_scale_words(cols) as u64;
        row.saturating_mul(4).saturating_mul(rows as u64)
    }

    /// Bits of storage per element of a row of `cols` columns, scales and padding included.
    pub fn bits_per_weight(&self, cols: usize) -> f64 {
        (self.row_words(cols) + self.row_scale_words(cols)) as f64 * 32.0 / cols as f64
    }

    /// The quantized description, if the format is not a float.
    pub fn quantized(&self) -> Option<QuantFormat> {
        match self {
            Format::Quantized(q) => Some(*q),
            _ => None,
        }
    }

    /// Whether the format's numbers are supported.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedFormat`], [`KernelError::UnsupportedPattern`].
    pub fn check(&self) -> Result<()> {
        match self {
            Format::Quantized(q) => q.check(),
            _ => Ok(()),
        }
    }

    pub(crate) fn codec(&self) -> &dyn RowCodec {
        match self {
            Format::F32 => &float::F32Rows,
            Format::F16 => &float::F16Rows,
            Format::BF16 => &float::Bf16Rows,
            Format::Quantized(q) => q,
        }
    }
}

impl core::fmt::Display for Format {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.name())
    }
}

impl core::str::FromStr for Format {
    type Err = KernelError;
    fn from_str(name: &str) -> Result<Format> {
        Format::parse(name)
    }
}

impl TryFrom<String> for Format {
    type Error = KernelError;
    fn try_from(name: String) -> Result<Format> {
        Format::parse(&name)
    }
}

impl From<Format> for String {
    fn from(format: Format) -> String {
        format.name()
    }
}

/// The order of a packed matrix's words in memory. The values are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arrangement {
    /// Row after row: the order of files, which every device reads. The CPU multiplies such a matrix with `f32`
    /// activations.
    #[default]
    Rows,
    /// Prepared for the CPU's integer dot products: panels of 16 rows, in which the codes lie in the order in which
    /// the inner loops use them. The CPU multiplies such a matrix with activations rounded to 8 bits per token and
    /// 32 columns. See [`PackedHost::prepare`](crate::PackedHost::prepare).
    Panels,
}

/// Shape and format of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackedLayout {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// How a row is stored.
    pub format: Format,
    /// In which order the words lie.
    #[serde(default)]
    pub arrangement: Arrangement,
}

impl PackedLayout {
    /// A checked layout.
    ///
    /// # Errors
    /// [`KernelError::BadShape`] if the matrix is empty or its buffers would not fit the address space,
    /// [`KernelError::UnsupportedFormat`] if the format does not exist.
    pub fn new(rows: usize, cols: usize, format: Format) -> Result<Self> {
        let layout = PackedLayout { rows, cols, format, arrangement: Arrangement::Rows };
        layout.check()?;
        Ok(layout)
    }

    /// Checks what [`new`](Self::new) checks; the fields are public.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn check(&self) -> Result<()> {
        self.format.check()?;
        let bad = KernelError::BadShape { rows: self.rows, cols: self.cols };
        // 2^40 columns keep every product of a row below 2^64; the whole matrix is checked with its rows.
        if self.rows == 0 || self.cols == 0 || self.cols as u64 > 1 << 40 {
            return Err(bad);
        }
        let dense = (self.rows as u128) * (self.cols as u128) * 4;
        let packed = u128::from(self.format.matrix_bytes(self.rows, self.cols));
        if dense.max(packed) > isize::MAX as u128 {
            return Err(bad);
        }
        Ok(())
    }

    /// `u32` words of codes in a row.
    pub fn row_words(&self) -> usize {
        self.format.row_words(self.cols)
    }

    /// `u32` words of scales in a row.
    pub fn row_scale_words(&self) -> usize {
        self.format.row_scale_words(self.cols)
    }

    /// Bytes of the matrix: codes and scales.
    pub fn bytes(&self) -> u64 {
        self.format.matrix_bytes(self.rows, self.cols)
    }

    /// Rows and columns of the matrix of code words: a row of it is a row, or a panel.
    pub fn words_shape(&self) -> [usize; 2] {
        match self.arrangement {
            Arrangement::Rows => [self.rows, self.row_words()],
            Arrangement::Panels => [self.panels(), PANEL_ROWS * self.row_words()],
        }
    }

    /// Rows and columns of the matrix of scale words; no columns for float formats.
    pub fn scales_shape(&self) -> [usize; 2] {
        match self.arrangement {
            Arrangement::Rows => [self.rows, self.row_scale_words()],
            Arrangement::Panels => [self.panels(), crate::panels::panel_scale_words(self)],
        }
    }

    /// Panels of 16 rows, the last one padded.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// The same format with another number of rows.
    pub fn with_rows(&self, rows: usize) -> Self {
        PackedLayout { rows, ..*self }
    }
}

impl core::fmt::Display for PackedLayout {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "[{}, {}] {}", self.rows, self.cols, self.format)
    }
}

#[cfg(test)]
mod tests;
