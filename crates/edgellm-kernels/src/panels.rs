//! The prepared arrangement of packed matrices: panels of 16 rows, in the order in which integer dot products use
//! them.
//!
//! Integer dot-product instructions multiply four neighbouring bytes of a 32-bit lane with four others and add the
//! products to the lane (`vpdpbusd`, `sdot`). So four consecutive codes of a row, a *quad*, are a lane, and a vector of
//! 16 lanes holds the same four columns of 16 rows: sums need no reduction across lanes, a group's scales are one
//! vector, and every instruction set can use the layout, as one, two or four of its registers.
//!
//! **Codes.** A block of 32 columns is eight quads. Its codes are cut into bit planes whose width divides 8: 8 = 8,
//! 6 = 4 + 2, 5 = 4 + 1, 4, 3 = 2 + 1, 2 (low bits first). A plane of `p` bits is `p` vectors of 64 bytes; vector `v`
//! holds quads `8 v / p + j` at bit `p j` of its bytes. Unpacking a quad is a shift and a mask per plane, and a
//! block is as many bytes as in the row arrangement: `b` words a row.
//!
//! **Scales**, per group: 16 scales, then 16 minima if the format has them. Scales of two levels are bytes here as in
//! rows; before the first group, there are the rows' 16 units of scales, and 16 of minima, as single-precision floats.
//!
//! **Sparse formats** keep their masks and the codes of the kept weights: for each block and quad a mask of 64 bits, bit
//! `4 lane + byte`, then the kept codes in that order, one stream for the panel, in chunks of 512 that are packed like a
//! block. A quad's bytes are then `popcount(mask)` consecutive bytes of the unpacked stream, expanded by the mask. Only
//! symmetric sparse formats are prepared: there a dropped weight is a code, the zero point.
//!
//! The last panel is padded with rows of zeros.

use burn::tensor::Bytes;
use rayon::prelude::*;

use crate::error::{KernelError, Result};
use crate::format::sparse::SparseRow;
use crate::format::{Arrangement, BLOCK, PANEL_ROWS, PackedLayout, QuantFormat, ScaleType, Units, put_code};
use crate::host::PackedHost;

/// Quads of a block.
const QUADS: usize = BLOCK / 4;

/// Widths of the bit planes of a code, low bits first.
pub(crate) const fn planes(bit_width: u8) -> &'static [u32] {
    match bit_width {
        8 => &[8],
        6 => &[4, 2],
        5 => &[4, 1],
        4 => &[4],
        3 => &[2, 1],
        _ => &[2],
    }
}

/// `u32` words of scales in a panel; 0 for float formats.
pub(crate) fn panel_scale_words(layout: &PackedLayout) -> usize {
    let Some(q) = layout.format.quantized() else { return 0 };
    // Whole blocks: of groups of 16 columns, the kernels read two a block.
    let cols = layout.cols.next_multiple_of(BLOCK);
    unit_words(&q) + q.groups(cols) * group_words(&q)
}

/// Words of the rows' units in a panel of two-level scales.
fn unit_words(q: &QuantFormat) -> usize {
    if q.scale_type == ScaleType::U8 { vectors(q) * PANEL_ROWS } else { 0 }
}

/// Vectors of a group: scales, and minima if there are any.
fn vectors(q: &QuantFormat) -> usize {
    if q.symmetric { 1 } else { 2 }
}

/// Rows whose scales share a word of a panel.
fn rows_per_word(q: &QuantFormat) -> usize {
    match q.scale_type {
        ScaleType::F16 => 2,
        ScaleType::F32 => 1,
        ScaleType::U8 => 4,
    }
}

/// Words of a group's scales (and minima) in a panel.
fn group_words(q: &QuantFormat) -> usize {
    vectors(q) * PANEL_ROWS / rows_per_word(q)
}

impl PackedLayout {
    /// The layout that [`PackedHost::prepare`] gives a matrix of this one.
    pub fn prepared(&self) -> Self {
        let prepares = self.format.quantized().is_some_and(|q| !q.is_sparse() || q.symmetric);
        if prepares { PackedLayout { arrangement: Arrangement::Panels, ..*self } } else { *self }
    }
}

impl PackedHost {
    /// The same matrix in the arrangement of the CPU's integer dot products, [`Arrangement::Panels`].
    ///
    /// The values are the same; a product with the result rounds the activations to 8 bits. A matrix that is prepared
    /// already, or whose format has no such arrangement (floats, and asymmetric sparse formats), is returned as it is.
    ///
    /// # Errors
    /// The errors of [`PackedHost::from_parts`], if the public fields were changed.
    ///
    /// ```
    /// use edgellm_kernels::{Format, PackedHost, PackedLayout};
    /// let values: Vec<f32> = (0..17 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    /// let rows = PackedHost::quantize(&values, PackedLayout::new(17, 64, Format::parse("q3g32a")?)?)?;
    /// let panels = rows.prepare()?;
    /// assert_eq!(panels.layout.panels(), 2);
    /// assert_eq!(panels.dequantize(), rows.dequantize());
    /// assert_eq!(panels.unprepare()?, rows);
    /// # Ok::<(), edgellm_kernels::KernelError>(())
    /// ```
    pub fn prepare(&self) -> Result<PackedHost> {
        let layout = self.layout.prepared();
        let Some(q) = layout.format.quantized().filter(|_| layout != self.layout) else { return Ok(self.clone()) };
        let ([panels, panel_words], [_, panel_scales]) = (layout.words_shape(), layout.scales_shape());
        let (mut words, mut scales) = (vec![0u32; panels * panel_words], vec![0u32; panels * panel_scales]);
        let (from_words, from_scales) = (self.words_u32()?, self.scales_u32()?);
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        words.par_chunks_mut(panel_words).zip(scales.par_chunks_mut(panel_scales)).enumerate().for_each(
            |(panel, (words, scales))| {
                let rows = panel * PANEL_ROWS..layout.rows.min((panel + 1) * PANEL_ROWS);
                if q.is_sparse() {
                    let rows = rows.clone().map(|row| &from_words[row * row_words..][..row_words]);
                    sparse_to_panel(&q, layout.cols, rows, words);
                }
                for (lane, row) in rows.enumerate() {
                    let (codes, row_scales) =
                        (&from_words[row * row_words..][..row_words], &from_scales[row * row_scales..][..row_scales]);
                    if !q.is_sparse() {
                        codes_to_panel(&q, codes, words, lane);
                    }
                    q.copy_scales(row_scales, q.groups(layout.cols), scales, lane);
                }
            },
        );
        PackedHost::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(scales))
    }

    /// The same matrix in the arrangement of files, [`Arrangement::Rows`].
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare).
    pub fn unprepare(&self) -> Result<PackedHost> {
        let Some(q) = self.layout.format.quantized() else { return Ok(self.clone()) };
        if self.layout.arrangement == Arrangement::Rows {
            return Ok(self.clone());
        }
        let layout = PackedLayout { arrangement: Arrangement::Rows, ..self.layout };
        let panels = Panels::new(self.layout, self.words_u32()?, self.scales_u32()?);
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        let (mut words, mut scales) = (vec![0u32; layout.rows * row_words], vec![0u32; layout.rows * row_scales]);
        words.par_chunks_mut(row_words).zip(scales.par_chunks_mut(row_scales)).enumerate().for_each(
            |(row, (words, scales))| {
                let bits = usize::from(q.bit_width);
                let (mask, words) = words.split_at_mut(q.pattern.mask_words(layout.cols));
                let mut kept = 0;
                panels.for_each_block(row, |block, quads, kept_here| match mask.get_mut(block) {
                    None => {
                        for (quad, &codes) in quads.iter().enumerate() {
                            put_quad(words, bits, block * QUADS + quad, codes);
                        }
                    }
                    Some(mask) => {
                        *mask = kept_here;
                        for col in (0..BLOCK).filter(|col| kept_here >> col & 1 == 1) {
                            put_code(words, bits, kept, (quads[col / 4] >> (8 * (col % 4))) & 0xff);
                            kept += 1;
                        }
                    }
                });
                q.put_units(scales, panels.units(row));
                for group in 0..q.groups(layout.cols) {
                    let (scale, min) = panels.raw_scale(row, group);
                    q.put_raw_scale(scales, group, scale, min);
                }
            },
        );
        PackedHost::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(scales))
    }

    fn words_u32(&self) -> Result<&[u32]> {
        cast(&self.words, "bytes of codes", &self.layout, self.layout.words_shape())
    }

    fn scales_u32(&self) -> Result<&[u32]> {
        cast(&self.scales, "bytes of scales", &self.layout, self.layout.scales_shape())
    }
}

fn cast<'a>(bytes: &'a Bytes, what: &'static str, layout: &PackedLayout, shape: [usize; 2]) -> Result<&'a [u32]> {
    let expected = shape[0] * shape[1] * 4;
    let bad = || KernelError::Length { what, layout: layout.to_string(), expected, found: bytes.len() };
    let words: &[u32] = bytemuck::try_cast_slice(bytes).map_err(|_| bad())?;
    if bytes.len() == expected { Ok(words) } else { Err(bad()) }
}

/// A prepared matrix in memory, with lengths checked.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    layout: PackedLayout,
    format: QuantFormat,
    words: &'a [u32],
    scales: &'a [u32],
    /// Words of a panel's codes, and of its scales.
    sizes: [usize; 2],
}

impl<'a> Panels<'a> {
    /// # Panics
    /// If the layout is not a prepared one, or the lengths do not follow from it.
    pub(crate) fn new(layout: PackedLayout, words: &'a [u32], scales: &'a [u32]) -> Self {
        let format = layout.format.quantized().expect("only quantized formats are prepared");
        assert!(layout.check().is_ok() && layout.arrangement == Arrangement::Panels, "a prepared matrix {layout}");
        let ([panels, panel_words], [_, panel_scales]) = (layout.words_shape(), layout.scales_shape());
        assert_eq!(words.len(), panels * panel_words, "words of a prepared matrix {layout}");
        assert_eq!(scales.len(), panels * panel_scales, "scales of a prepared matrix {layout}");
        Panels { layout, format, words, scales, sizes: [panel_words, panel_scales] }
    }

    /// Some of the panels, as a matrix.
    ///
    /// # Panics
    /// If the range leaves the matrix or is empty.
    pub(crate) fn part(&self, panels: core::ops::Range<usize>) -> Panels<'a> {
        let rows = panels.start * PANEL_ROWS..(panels.end * PANEL_ROWS).min(self.layout.rows);
        assert!(
            panels.start < panels.end && panels.end <= self.layout.panels(),
            "panels {panels:?} of {}",
            self.layout
        );
        let [words, scales] = self.sizes;
        Panels {
            layout: self.layout.with_rows(rows.len()),
            words: &self.words[panels.start * words..panels.end * words],
            scales: &self.scales[panels.start * scales..panels.end * scales],
            ..*self
        }
    }

    pub(crate) fn layout(&self) -> PackedLayout {
        self.layout
    }

    pub(crate) fn format(&self) -> QuantFormat {
        self.format
    }

    /// Blocks of 32 columns.
    pub(crate) fn blocks(&self) -> usize {
        self.layout.cols.div_ceil(BLOCK)
    }

    /// Code words of a panel.
    pub(crate) fn panel_words(&self, panel: usize) -> &'a [u32] {
        let n = self.sizes[0];
        &self.words[panel * n..(panel + 1) * n]
    }

    /// Scale words of a panel.
    pub(crate) fn panel_scales(&self, panel: usize) -> &'a [u32] {
        let n = self.sizes[1];
        &self.scales[panel * n..(panel + 1) * n]
    }

    /// Writes the values of a row, one per column.
    ///
    /// # Panics
    /// If `row` is outside the matrix.
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.layout.rows, "row {row} of {}", self.layout);
        let group_size = usize::from(self.format.group_size);
        assert_eq!(out.len(), self.layout.cols, "values of a row of {}", self.layout);
        self.for_each_block(row, |block, quads, _| {
            let end = out.len().min((block + 1) * BLOCK);
            let out = &mut out[block * BLOCK..end];
            for (part, out) in out.chunks_mut(group_size.min(BLOCK)).enumerate() {
                let first = part * group_size;
                let (scale, min) = self.scale_and_min(row, (block * BLOCK + first) / group_size);
                for (i, out) in out.iter_mut().enumerate() {
                    let col = first + i;
                    let code = (quads[col / 4] >> (8 * (col % 4))) & 0xff;
                    *out = self.format.value(code, scale, min);
                }
            }
        });
    }

    /// Calls `f(block, codes, kept)` for the blocks of a row: the codes four in a word, and which columns are kept; a
    /// dropped one has the code for zero.
    fn for_each_block(&self, row: usize, mut f: impl FnMut(usize, [u32; QUADS], u32)) {
        if !self.format.is_sparse() {
            return (0..self.blocks()).for_each(|block| f(block, self.quads(row, block), u32::MAX));
        }
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        let stream = self.sparse_codes(panel);
        let mut next = 0;
        for block in 0..self.blocks() {
            let mut quads = [self.format.zero_point() * 0x0101_0101; QUADS];
            let mut kept = 0;
            for (quad, codes) in quads.iter_mut().enumerate() {
                let mask = self.sparse_mask(panel, block, quad);
                let first = next + (mask & ((1 << (4 * lane)) - 1)).count_ones() as usize;
                let bytes = (0..4).filter(|byte| mask >> (4 * lane + byte) & 1 == 1);
                for (at, byte) in (first..).zip(bytes) {
                    *codes =
                        *codes & !(0xff << (8 * byte)) | u32::from(stream.get(at).copied().unwrap_or(0)) << (8 * byte);
                    kept |= 1 << (4 * quad + byte);
                }
                next += mask.count_ones() as usize;
            }
            f(block, quads, kept);
        }
    }

    /// Words of masks before the codes of a panel; 0 for dense formats.
    pub(crate) fn mask_words(&self) -> usize {
        if self.format.is_sparse() { self.blocks() * PANEL_ROWS } else { 0 }
    }

    /// Checks that the masks of every panel of a sparse format keep as many weights as the format says.
    ///
    /// # Errors
    /// [`KernelError::Mask`] for the first panel that does not.
    pub(crate) fn check_masks(&self) -> Result<()> {
        let PackedLayout { rows, cols, .. } = self.layout;
        let check = |panel: usize| {
            let row = panel * PANEL_ROWS;
            let expected = PANEL_ROWS.min(rows - row) * self.format.pattern.kept(cols);
            let masks = &self.panel_words(panel)[..self.mask_words()];
            let found = masks.iter().map(|word| word.count_ones() as usize).sum();
            let format = self.layout.format.name();
            let error = || KernelError::Mask { row, first: 0, end: cols, expected, found, format };
            (found != expected && self.format.is_sparse()).then(error)
        };
        (0..self.layout.panels()).into_par_iter().find_map_first(check).map_or(Ok(()), Err)
    }

    /// The mask of a quad: bit `4 lane + byte`.
    pub(crate) fn sparse_mask(&self, panel: usize, block: usize, quad: usize) -> u64 {
        let at = (block * QUADS + quad) * 2;
        let words = self.panel_words(panel);
        u64::from(words[at]) | u64::from(words[at + 1]) << 32
    }

    /// The kept codes of a panel, a byte each.
    fn sparse_codes(&self, panel: usize) -> Vec<u8> {
        let chunk_words = usize::from(self.format.bit_width) * PANEL_ROWS;
        let mut codes = Vec::new();
        for chunk in self.panel_words(panel)[self.mask_words()..].chunks(chunk_words) {
            let mut quads = [[0u32; PANEL_ROWS]; QUADS];
            for_plane_parts(self.format.bit_width, |vector, quad, shift, offset, mask| {
                for (lane, codes) in quads[quad].iter_mut().enumerate() {
                    *codes |= ((chunk[vector * PANEL_ROWS + lane] >> shift) & mask) << offset;
                }
            });
            codes.extend(quads.iter().flatten().flat_map(|codes| codes.to_le_bytes()));
        }
        codes
    }

    fn scale_and_min(&self, row: usize, group: usize) -> (f32, f32) {
        let (scale, min) = self.raw_scale(row, group);
        self.format.scale_and_min_of(self.units(row), scale, min)
    }

    /// The units of a row's scales.
    fn units(&self, row: usize) -> Units {
        let units = &self.panel_scales(row / PANEL_ROWS)[..unit_words(&self.format)];
        let at = |vector: usize| units.get(vector * PANEL_ROWS + row % PANEL_ROWS).map_or(1.0, |v| f32::from_bits(*v));
        Units { scale: at(0), min: if self.format.symmetric { 0.0 } else { at(1) } }
    }

    /// The bits of a group's scale and minimum.
    fn raw_scale(&self, row: usize, group: usize) -> (u32, u32) {
        let q = &self.format;
        let words = group_words(q);
        let scales = &self.panel_scales(row / PANEL_ROWS)[unit_words(q) + group * words..][..words];
        let (n, lane) = (rows_per_word(q), row % PANEL_ROWS);
        let bits = 32 / n;
        let at =
            |vector: usize| scales[(vector * PANEL_ROWS + lane) / n] >> (bits * (lane % n)) & (u32::MAX >> (32 - bits));
        (at(0), if q.symmetric { 0 } else { at(1) })
    }

    /// The codes of a row's block, four in a word.
    fn quads(&self, row: usize, block: usize) -> [u32; QUADS] {
        let bits = usize::from(self.format.bit_width);
        let words = &self.panel_words(row / PANEL_ROWS)[block * bits * PANEL_ROWS..][..bits * PANEL_ROWS];
        let mut quads = [0; QUADS];
        for_plane_parts(self.format.bit_width, |vector, quad, shift, offset, mask| {
            quads[quad] |= ((words[vector * PANEL_ROWS + row % PANEL_ROWS] >> shift) & mask) << offset;
        });
        quads
    }
}

impl QuantFormat {
    /// Copies the scales of a row's groups, and their units, to a panel of zeros.
    fn copy_scales(&self, row: &[u32], groups: usize, panel: &mut [u32], lane: usize) {
        let (units, panel) = panel.split_at_mut(unit_words(self));
        if !units.is_empty() {
            let Units { scale, min } = self.units(row);
            for (units, unit) in units.chunks_exact_mut(PANEL_ROWS).zip([scale, min]) {
                units[lane] = unit.to_bits();
            }
        }
        let n = rows_per_word(self);
        for (group, panel) in panel.chunks_exact_mut(group_words(self)).take(groups).enumerate() {
            let (scale, min) = self.raw_scale(row, group);
            for (vector, bits) in [scale, min].into_iter().take(vectors(self)).enumerate() {
                panel[(vector * PANEL_ROWS + lane) / n] |= bits << (32 / n * (lane % n));
            }
        }
    }
}

/// Fills a panel of a sparse format from its rows.
fn sparse_to_panel<'a>(q: &QuantFormat, cols: usize, rows: impl Iterator<Item = &'a [u32]>, panel: &mut [u32]) {
    let rows: Vec<SparseRow<'_>> = rows.map(|words| SparseRow::new(q, cols, words)).collect();
    let mut codes: Vec<_> = rows.iter().map(|row| row.codes(0)).collect();
    let mut stream = Vec::new();
    let (masks, packed) = panel.split_at_mut(cols.div_ceil(BLOCK) * PANEL_ROWS);
    for (i, masks) in masks.chunks_exact_mut(2).enumerate() {
        let (block, quad) = (i / QUADS, i % QUADS);
        let mut mask = 0u64;
        for (lane, (row, codes)) in rows.iter().zip(&mut codes).enumerate() {
            let kept = row.mask(block) >> (4 * quad) & 0xf;
            for byte in (0..4).filter(|byte| kept >> byte & 1 == 1) {
                // A mask that keeps more than there is: what has no code is dropped.
                let Some(code) = codes.next() else { break };
                stream.push(code as u8);
                mask |= 1 << (4 * lane + byte);
            }
        }
        (masks[0], masks[1]) = (mask as u32, (mask >> 32) as u32);
    }
    stream.resize(stream.len().next_multiple_of(BLOCK * PANEL_ROWS), 0);
    let bits = usize::from(q.bit_width);
    for (chunk, packed) in stream.chunks(BLOCK * PANEL_ROWS).zip(packed.chunks_mut(bits * PANEL_ROWS)) {
        for_plane_parts(q.bit_width, |vector, quad, shift, offset, mask| {
            for (lane, packed) in packed[vector * PANEL_ROWS..][..PANEL_ROWS].iter_mut().enumerate() {
                let at = (quad * PANEL_ROWS + lane) * 4;
                let codes = u32::from_le_bytes([0, 1, 2, 3].map(|byte| chunk[at + byte]));
                *packed |= ((codes >> offset) & mask) << shift;
            }
        });
    }
}

fn codes_to_panel(q: &QuantFormat, codes: &[u32], panel: &mut [u32], lane: usize) {
    let bits = usize::from(q.bit_width);
    for (block, panel) in panel.chunks_mut(bits * PANEL_ROWS).enumerate() {
        let quads: [u32; QUADS] = core::array::from_fn(|quad| get_quad(codes, bits, block * QUADS + quad));
        for_plane_parts(q.bit_width, |vector, quad, shift, offset, mask| {
            panel[vector * PANEL_ROWS + lane] |= ((quads[quad] >> offset) & mask) << shift;
        });
    }
}

/// Calls `f(vector, quad, shift, offset, mask)` for every place of a quad's bits: at bit `shift` of the bytes of a
/// vector, where they are the bits of the codes from `offset` on.
#[inline(always)]
fn for_plane_parts(bit_width: u8, mut f: impl FnMut(usize, usize, u32, u32, u32)) {
    let (mut first_vector, mut offset) = (0, 0);
    for &width in planes(bit_width) {
        let parts = 8 / width as usize;
        let mask = (0xff >> (8 - width)) * 0x0101_0101;
        for vector in 0..width as usize {
            for part in 0..parts {
                f(first_vector + vector, vector * parts + part, width * part as u32, offset, mask);
            }
        }
        first_vector += width as usize;
        offset += width;
    }
}

/// Four consecutive codes of a row, one in each byte.
fn get_quad(row: &[u32], bits: usize, quad: usize) -> u32 {
    let bit = quad * 4 * bits;
    let (word, shift) = (bit / 32, bit % 32);
    let next = row.get(word + 1).copied().unwrap_or(0);
    let run = (u64::from(row[word]) | u64::from(next) << 32) >> shift;
    let mask = (1u64 << bits) - 1;
    (0..4).fold(0, |quad, i| quad | (((run >> (i * bits)) & mask) as u32) << (8 * i))
}

/// Writes four consecutive codes into a zeroed row.
fn put_quad(row: &mut [u32], bits: usize, quad: usize, codes: u32) {
    let run = (0..4).fold(0u64, |run, i| run | u64::from((codes >> (8 * i)) & 0xff) << (i * bits));
    let bit = quad * 4 * bits;
    let run = run << (bit % 32);
    row[bit / 32] |= run as u32;
    if run >> 32 != 0 {
        row[bit / 32 + 1] |= (run >> 32) as u32;
    }
}

#[cfg(test)]
mod tests {
    use crate::format::{Format, PackedLayout};
    use crate::host::PackedHost;

    #[test]
    fn prepared_matrices_hold_the_same_values() {
        for format in Format::all() {
            for (rows, cols) in [(1, 1), (16, 32), (17, 33), (40, 200), (3, 576)] {
                let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.77).sin()).collect();
                let host = PackedHost::quantize(&values, PackedLayout::new(rows, cols, format).unwrap()).unwrap();
                let panels = host.prepare().unwrap();
                assert_eq!(panels.dequantize(), host.dequantize(), "{format} [{rows}, {cols}]");
                assert_eq!(panels.unprepare().unwrap(), host, "{format} [{rows}, {cols}]");
                assert_eq!(panels.prepare().unwrap(), panels);
                let gathered = panels.gather_rows(&[rows - 1, 0]).unwrap();
                assert_eq!(gathered, host.gather_rows(&[rows - 1, 0]).unwrap());
            }
        }
    }
}
