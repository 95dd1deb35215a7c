//! The crate's one error type.
//!
//! Bad data and bad descriptions of data are errors, with what was expected and what was found. A caller that
//! passes tensors of the wrong shape to an operator has made a programming error; operators panic then, with the
//! shapes (see each operator's `# Panics`).

use thiserror::Error;

/// What can go wrong when formats are named, and matrices are quantized, packed or read.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A quantized format with a bit width or group size that does not exist.
    #[error(
        "unsupported quantized format: bit width {bit_width} (supported: 2, 3, 4, 5, 6, 8), group size {group_size} \
         (supported: 16, 32, 64, 128)"
    )]
    UnsupportedFormat {
        /// Bits per code that were asked for.
        bit_width: u8,
        /// Columns per group that were asked for.
        group_size: u16,
    },
    /// A sparse format whose pattern does not exist, or does not combine with its group size and scales.
    #[error(
        "unsupported sparse format {format}: expected the pattern 2:4, 4:8 or b1 to b99, a group size of 32, 64 or \
         128, and f16 scales"
    )]
    UnsupportedPattern {
        /// Name of the format that was asked for.
        format: String,
    },
    /// The mask of a row of a sparse matrix does not keep as many columns as its format says.
    #[error("row {row} of a matrix {format}: expected {expected} kept columns from {first} to {end}, found {found}")]
    Mask {
        /// Row of the mask.
        row: usize,
        /// First column of the part that is wrong.
        first: usize,
        /// Column behind it.
        end: usize,
        /// Kept columns that the format asks for.
        expected: usize,
        /// Kept columns, set bits beyond the last column included.
        found: usize,
        /// Name of the format.
        format: String,
    },
    /// A format's name that does not parse.
    #[error("unknown packed format {name:?}; expected f32, f16, bf16, or a name such as q4g32a, q3g64s or q4g32s-2:4")]
    UnknownFormat {
        /// The name that was given.
        name: String,
    },
    /// A matrix without rows or columns, or one whose size does not fit in memory.
    #[error("a packed matrix of {rows} rows and {cols} columns is empty or too large")]
    BadShape {
        /// Rows that were asked for.
        rows: usize,
        /// Columns that were asked for.
        cols: usize,
    },
    /// A buffer whose length does not follow from the layout.
    #[error("{what}: expected {expected} for {layout}, found {found}")]
    Length {
        /// Which buffer, and its unit.
        what: &'static str,
        /// The layout, for people.
        layout: String,
        /// What follows from the layout.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// NaN or an infinity among values that are to be packed.
    #[error("row {row}, column {col} holds {value}, which cannot be packed")]
    NonFinite {
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value, for people.
        value: String,
    },
    /// A finite value or scale that is too large for what has to hold it.
    #[error("row {row}, columns from {col}: {value:e} does not fit format {format}")]
    Overflow {
        /// Row of the value.
        row: usize,
        /// First column of its group (or its own column).
        col: usize,
        /// The value.
        value: f32,
        /// Name of the format.
        format: String,
    },
    /// Codes and grids for a format that has none, or chooses which weights have them.
    #[error("a matrix of format {format} is not made of codes and grids; expected a dense quantized format")]
    NoGrids {
        /// Name of the format.
        format: String,
    },
    /// A scale or a minimum of a group that its format does not hold.
    #[error(
        "row {row}, group {group}: format {format} does not hold the scale {scale:e} and the minimum {min:e}; expected \
         finite ones that it has rounded"
    )]
    Grid {
        /// Row of the group.
        row: usize,
        /// Number of the group in its row.
        group: usize,
        /// The scale that was given.
        scale: f32,
        /// The minimum that was given; 0 if the format has none.
        min: f32,
        /// Name of the format.
        format: String,
    },
    /// A code that has more bits than its format's.
    #[error("row {row}, column {col}: {code} is no code of format {format}")]
    Code {
        /// Row of the code.
        row: usize,
        /// Column of the code.
        col: usize,
        /// The code.
        code: u8,
        /// Name of the format.
        format: String,
    },
    /// A row index outside the matrix.
    #[error("row {row} of a matrix with {rows} rows")]
    RowOutOfRange {
        /// The index that was given.
        row: usize,
        /// Rows of the matrix.
        rows: usize,
    },
    /// A device did not hand its data back.
    #[error("reading a packed matrix back from its device failed: {0}")]
    ReadBack(String),
    /// An instruction set that this processor, or this build, does not have.
    #[error("instruction set {name} is not available here; available: {available}")]
    IsaUnavailable {
        /// The instruction set that was asked for.
        name: &'static str,
        /// Those that exist here.
        available: String,
    },
}

/// Short form for this crate's results.
pub type Result<T> = core::result::Result<T, KernelError>;
