//! Sparse quantized formats: the kept weights only, with a mask that says where they are.
//!
//! **Patterns.** `2:4` and `4:8`: of every 4 (8) consecutive columns exactly 2 (4) are kept (Mishra et al.,
//! "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 3); a last group of fewer columns keeps at
//! most as many. `b<percent>`: any `ceil(cols * percent / 100)` columns of a row are kept, as many in every row,
//! because pruning compares the weights of one output feature (Wanda, arXiv 2306.11695, section 3). The number of kept
//! weights follows from the number of columns alone, so all rows have the same length.
//!
//! **Layout.** A row is its mask, then its codes. The mask is one `u32` per block of 32 columns: bit `i` of word `b` is
//! set if column `32 b + i` is kept; bits beyond the last column are 0. The codes of the kept columns follow in column
//! order, as one little-endian bit stream, padded with zero codes to a multiple of 32 codes (as in the dense formats,
//! where every column is kept). Scales are those of the dense formats: one per group of consecutive *columns*.
//!
//! **Size** in bits per weight, with `k` the kept share and `b` the bit width: `1 + k b`, and the scales' 16 (32) bits
//! per group. One bit of mask per weight is what 2-bit indices cost at `2:4`, and less than they would at `4:8`; and
//! one decoder serves all patterns. Example: 4 bits, `4:8`, group 32, symmetric: 3.5 bits per weight.
//!
//! **Values.** A kept weight is `scale * q + min` or `scale * (q - 2^(b - 1))` with a scale fitted to the kept weights
//! of its group; a dropped one is exactly 0, in asymmetric formats too.
//!
//! **Quantization** keeps the largest magnitudes of every group of the pattern (of a row), of equals the lower column.
//! Who prunes by another score sets what is pruned to 0 beforehand. Where fewer weights than the format holds are
//! non-zero, zeros are kept: exact in symmetric formats, rounded like any other value in asymmetric ones.

use core::ops::Range;

use super::grouped::{BIT_WIDTHS, BLOCK, get_code, put_code};
use super::{Format, QuantFormat, RowCodec, ScaleType};
use crate::error::{KernelError, Result};

/// Largest `m` of a pattern `n:m`.
const LARGEST_M: usize = 8;

/// Which weights of a row are stored.
///
/// ```
/// use edgellm_kernels::{Format, PackedHost, PackedLayout};
/// let format = Format::parse("q4g32s-2:4")?;
/// assert_eq!(format.bits_per_weight(4096), 3.5);
/// let values: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
/// let packed = PackedHost::quantize(&values, PackedLayout::new(1, 64, format)?)?;
/// assert_eq!(packed.dequantize().iter().filter(|v| **v == 0.0).count(), 32);
/// # Ok::<(), edgellm_kernels::KernelError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SparsePattern {
    /// All of them.
    #[default]
    Dense,
    /// `n` of every `m` consecutive columns: 2 of 4, or 4 of 8.
    NofM {
        /// Kept columns of a group.
        n: u8,
        /// Columns of a group.
        m: u8,
    },
    /// Any columns, the same number in every row.
    Bitmask {
        /// Share of the columns that are kept, in percent: 1 to 99.
        percent: u8,
    },
}

/// The members that suites cover: every pattern with every width, and with every group size and symmetry.
pub(super) fn members() -> Vec<Format> {
    let shares = [50, 25, 60, 75, 10, 95].map(|percent| SparsePattern::Bitmask { percent });
    let patterns = [[SparsePattern::NofM { n: 2, m: 4 }; 6], [SparsePattern::NofM { n: 4, m: 8 }; 6], shares];
    let groups = [(32, true), (64, false), (128, true), (32, false), (64, true), (128, false)];
    let mut formats = Vec::new();
    for (i, patterns) in patterns.into_iter().enumerate() {
        for (j, (bit_width, pattern)) in BIT_WIDTHS.into_iter().zip(patterns).enumerate() {
            let (group_size, symmetric) = groups[(2 * i + j) % groups.len()];
            let scale_type = ScaleType::F16;
            formats.push(Format::Quantized(QuantFormat { bit_width, group_size, symmetric, scale_type, pattern }));
        }
    }
    formats
}

impl SparsePattern {
    /// Kept columns of a row of `cols`.
    pub fn kept(&self, cols: usize) -> usize {
        match *self {
            SparsePattern::Dense => cols,
            SparsePattern::NofM { n, m } => {
                let (n, m) = (usize::from(n), usize::from(m).max(1));
                cols / m * n + n.min(cols % m)
            }
            SparsePattern::Bitmask { percent } => {
                let percent = usize::from(percent);
                // ceil(cols * percent / 100), without a product that could overflow.
                cols / 100 * percent + (cols % 100 * percent).div_ceil(100)
            }
        }
    }

    /// Mask words of a row of `cols` columns: none if all are kept.
    pub(crate) fn mask_words(&self, cols: usize) -> usize {
        if *self == SparsePattern::Dense { 0 } else { cols.div_ceil(BLOCK) }
    }

    pub(super) fn exists(&self) -> bool {
        match self {
            SparsePattern::Dense => true,
            SparsePattern::NofM { n, m } => matches!((n, m), (2, 4) | (4, 8)),
            SparsePattern::Bitmask { percent } => (1..=99).contains(percent),
        }
    }

    /// The inverse of `Display`.
    pub(super) fn parse(name: &str) -> Option<Self> {
        if let Some(percent) = name.strip_prefix('b') {
            return Some(SparsePattern::Bitmask { percent: percent.parse().ok()? });
        }
        let (n, m) = name.split_once(':')?;
        Some(SparsePattern::NofM { n: n.parse().ok()?, m: m.parse().ok()? })
    }

    /// The columns of a row that are kept if `values` are its weights, or their scores: the largest magnitudes, of equals the
    /// lower column. In order.
    pub fn kept_columns(&self, values: &[f32]) -> Vec<usize> {
        if *self == SparsePattern::Dense {
            return (0..values.len()).collect();
        }
        let mut mask = vec![0; self.mask_words(values.len())];
        self.choose(values, &mut mask);
        (0..values.len()).filter(|col| mask[col / BLOCK] >> (col % BLOCK) & 1 == 1).collect()
    }

    /// Sets the bits of the columns to keep in a zeroed mask.
    fn choose(&self, values: &[f32], mask: &mut [u32]) {
        let mut keep = |col: usize| mask[col / BLOCK] |= 1 << (col % BLOCK);
        match *self {
            SparsePattern::Dense => (0..values.len()).for_each(keep),
            SparsePattern::NofM { n, m } => {
                for (group, values) in values.chunks(usize::from(m)).enumerate() {
                    let first = group * usize::from(m);
                    largest_few(values, usize::from(n), |i| keep(first + i));
                }
            }
            SparsePattern::Bitmask { .. } => largest(values, self.kept(values.len()), keep),
        }
    }

    /// The first part of a row whose mask does not keep what the pattern says: its columns, how many it should keep,
    /// and how many it does, bits beyond the last column included.
    fn mismatch(&self, cols: usize, mask: &[u32]) -> Option<(Range<usize>, usize, usize)> {
        match *self {
            SparsePattern::Dense => None,
            SparsePattern::NofM { n, m } => mask.iter().enumerate().find_map(|(block, &word)| {
                let first = block * BLOCK;
                if first + BLOCK <= cols && counts(word, m) == splat(n, m) {
                    return None;
                }
                let (n, m) = (usize::from(n), usize::from(m));
                (first..first + BLOCK).step_by(m).find_map(|start| {
                    let found = (word >> (start - first) & ((1 << m) - 1)).count_ones() as usize;
                    let expected = n.min(cols.saturating_sub(start));
                    (found != expected).then_some((start..start + m, expected, found))
                })
            }),
            SparsePattern::Bitmask { .. } => {
                let found = mask.iter().map(|word| word.count_ones() as usize).sum();
                let padding = if cols.is_multiple_of(BLOCK) { 0 } else { u32::MAX << (cols % BLOCK) };
                let padded = mask.last().is_some_and(|word| word & padding != 0);
                (found != self.kept(cols) || padded).then_some((0..cols, self.kept(cols), found))
            }
        }
    }
}

impl core::fmt::Display for SparsePattern {
    /// `dense`, `2:4`, `4:8`, or `b` and the kept percentage.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            SparsePattern::Dense => f.write_str("dense"),
            SparsePattern::NofM { n, m } => write!(f, "{n}:{m}"),
            SparsePattern::Bitmask { percent } => write!(f, "b{percent}"),
        }
    }
}

/// Set bits of every 4 (8) bits of a word, in those bits.
fn counts(word: u32, m: u8) -> u32 {
    let pairs = word - (word >> 1 & 0x5555_5555);
    let fours = (pairs & 0x3333_3333) + (pairs >> 2 & 0x3333_3333);
    if m == 4 { fours } else { (fours + (fours >> 4)) & 0x0f0f_0f0f }
}

/// `n` in every 4 (8) bits of a word.
fn splat(n: u8, m: u8) -> u32 {
    u32::from(n) * if m == 4 { 0x1111_1111 } else { 0x0101_0101 }
}

/// Calls `keep` for the `n` values of largest magnitude among a few; of equals, the first.
fn largest_few(values: &[f32], n: usize, mut keep: impl FnMut(usize)) {
    debug_assert!(values.len() <= LARGEST_M);
    for (i, value) in values.iter().enumerate() {
        let before = |(j, other): &(usize, &f32)| match other.abs().total_cmp(&value.abs()) {
            core::cmp::Ordering::Greater => true,
            core::cmp::Ordering::Equal => *j < i,
            core::cmp::Ordering::Less => false,
        };
        if values.iter().enumerate().filter(before).count() < n {
            keep(i);
        }
    }
}

/// Calls `keep` for the `n` values of largest magnitude; of equals, the first.
fn largest(values: &[f32], n: usize, keep: impl FnMut(usize)) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    if n < order.len() {
        order.select_nth_unstable_by(n, |&a, &b| values[b].abs().total_cmp(&values[a].abs()).then(a.cmp(&b)));
    }
    order.truncate(n);
    order.into_iter().for_each(keep);
}

/// A row as it is stored: the mask, and the codes of the kept columns in order.
///
/// A mask read from a file may keep more columns than there are codes, or fewer: the columns without a code are 0, and
/// codes left over are not used.
#[derive(Clone, Copy)]
pub(crate) struct SparseRow<'a> {
    mask: &'a [u32],
    codes: &'a [u32],
    bit_width: usize,
    cols: usize,
    kept: usize,
}

impl<'a> SparseRow<'a> {
    /// # Panics
    /// If `words` is not a row of `cols` columns of the format.
    pub(crate) fn new(format: &QuantFormat, cols: usize, words: &'a [u32]) -> Self {
        assert_eq!(words.len(), format.row_words(cols), "words of a row of {cols} columns");
        let (mask, codes) = words.split_at(format.pattern.mask_words(cols));
        SparseRow { mask, codes, bit_width: usize::from(format.bit_width), cols, kept: format.pattern.kept(cols) }
    }

    /// Which columns of a block of 32 are kept: bit `i` for column `32 block + i`. Bits beyond the last column are 0.
    pub(crate) fn mask(&self, block: usize) -> u32 {
        let left = self.cols - block * BLOCK;
        if left < BLOCK { self.mask[block] & ((1 << left) - 1) } else { self.mask[block] }
    }

    /// Kept columns before a block: the index of its first code.
    pub(crate) fn kept_before(&self, block: usize) -> usize {
        self.mask[..block].iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The codes of the kept columns in column order, from the `first`-th on.
    pub(crate) fn codes(self, first: usize) -> impl Iterator<Item = u32> + 'a {
        (first..self.kept).map(move |i| get_code(self.codes, self.bit_width, i))
    }
}

/// Packs a row; see [`RowCodec::encode`]. The values are finite.
pub(super) fn encode(
    format: &QuantFormat,
    row: usize,
    values: &[f32],
    words: &mut [u32],
    scales: &mut [u32],
) -> Result<()> {
    let (mask, codes) = words.split_at_mut(format.pattern.mask_words(values.len()));
    format.pattern.choose(values, mask);
    let group_size = usize::from(format.group_size);
    let mut kept = Vec::with_capacity(group_size);
    let mut next = 0;
    for (group, chunk) in values.chunks(group_size).enumerate() {
        let first = group * group_size;
        let is_kept = |col: usize| mask[col / BLOCK] >> (col % BLOCK) & 1 == 1;
        kept.clear();
        kept.extend(chunk.iter().enumerate().filter(|(i, _)| is_kept(first + i)).map(|(_, &value)| value));
        format.encode_group(row, group, &kept, scales, |i, code| {
            put_code(codes, usize::from(format.bit_width), next + i, code);
        })?;
        next += kept.len();
    }
    Ok(())
}

/// Unpacks the blocks of a row of `cols` columns from `first` on. `out` ends with a block or with the row; what lies
/// beyond the row is set to 0.
pub(super) fn decode(format: &QuantFormat, cols: usize, words: &[u32], scales: &[u32], first: usize, out: &mut [f32]) {
    let row = SparseRow::new(format, cols, words);
    let mut codes = row.codes(row.kept_before(first));
    out.fill(0.0);
    for (block, out) in (first..).zip(out.chunks_mut(BLOCK)) {
        let (scale, min) = format.scale_and_min(scales, block * BLOCK / usize::from(format.group_size));
        let mut mask = row.mask(block);
        while mask != 0 {
            let Some(code) = codes.next() else { return };
            out[mask.trailing_zeros() as usize] = format.value(code, scale, min);
            mask &= mask - 1;
        }
    }
}

/// Checks that the mask of a row keeps what the format says; a dense row has none.
///
/// # Errors
/// [`KernelError::Mask`].
pub(super) fn check(format: &QuantFormat, row: usize, cols: usize, words: &[u32]) -> Result<()> {
    let mask = &words[..format.pattern.mask_words(cols)];
    match format.pattern.mismatch(cols, mask) {
        None => Ok(()),
        Some((range, expected, found)) => {
            let first = range.start;
            let end = if first < cols { range.end.min(cols) } else { range.end };
            Err(KernelError::Mask { row, first, end, expected, found, format: format.name() })
        }
    }
}
