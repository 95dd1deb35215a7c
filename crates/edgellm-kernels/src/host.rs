//! Packed matrices on the host: quantizing, checking, decoding and permuting rows.
//!
//! Everything here is the scalar reference; rows are independent and are spread over threads.

use burn::tensor::Bytes;
use rayon::prelude::*;

use crate::error::{KernelError, Result};
use crate::format::{Arrangement, Format, PackedLayout};
use crate::panels::Panels;

/// A packed matrix in host memory.
///
/// The buffers are shared, never copied where alignment allows: they may be views of a memory-mapped file.
/// Both are little-endian `u32`, of the shapes [`PackedLayout::words_shape`] and [`PackedLayout::scales_shape`].
#[derive(Debug, Clone)]
pub struct PackedHost {
    /// Shape and format.
    pub layout: PackedLayout,
    /// Codes (or raw floats), row-major.
    pub words: Bytes,
    /// Scales, row-major; empty for float formats.
    pub scales: Bytes,
}

impl PackedHost {
    /// Rounds `values` (row-major, `rows * cols`) to the layout's format.
    ///
    /// Quantized formats round to nearest as described in the crate's documentation; 16-bit floats round to nearest, ties to
    /// even.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `rows * cols` values, [`KernelError::NonFinite`] at the first NaN or
    /// infinity, [`KernelError::Overflow`] if a value or scale does not fit 16 bits, and the errors of
    /// [`PackedLayout::check`].
    ///
    /// ```
    /// use edgellm_kernels::{Format, PackedHost, PackedLayout};
    /// let values: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
    /// let packed = PackedHost::quantize(&values, PackedLayout::new(2, 32, Format::parse("q4g32a")?)?)?;
    /// let back = packed.dequantize();
    /// assert!(values.iter().zip(&back).all(|(a, b)| (a - b).abs() < 0.02));
    /// # Ok::<(), edgellm_kernels::KernelError>(())
    /// ```
    pub fn quantize(values: &[f32], layout: PackedLayout) -> Result<Self> {
        layout.check()?;
        if layout.arrangement == Arrangement::Panels {
            let rows = PackedLayout { arrangement: Arrangement::Rows, ..layout };
            return Self::quantize(values, rows)?.prepare();
        }
        expect_len("values", &layout, layout.rows * layout.cols, values.len())?;
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        let mut words = vec![0u32; layout.rows * row_words];
        let mut scales = vec![0u32; layout.rows * row_scales];
        let scale_rows: Vec<&mut [u32]> = if row_scales == 0 {
            (0..layout.rows).map(|_| Default::default()).collect()
        } else {
            scales.chunks_mut(row_scales).collect()
        };
        words
            .par_chunks_mut(row_words)
            .zip(scale_rows)
            .zip(values.par_chunks(layout.cols))
            .enumerate()
            .map(|(row, ((words, scales), values))| layout.format.codec().encode(row, values, words, scales))
            .collect::<Result<()>>()?;
        Ok(PackedHost { layout, words: Bytes::from_elems(words), scales: Bytes::from_elems(scales) })
    }

    /// Wraps buffers that already hold packed rows. They are used as they are if they are aligned to 4 bytes, and
    /// copied otherwise.
    ///
    /// # Errors
    /// [`KernelError::Length`] if a buffer's length does not follow from the layout, and the errors of
    /// [`PackedLayout::check`].
    pub fn from_parts(layout: PackedLayout, words: Bytes, scales: Bytes) -> Result<Self> {
        layout.check()?;
        let bytes = |[rows, cols]: [usize; 2]| rows * cols * 4;
        expect_len("bytes of codes", &layout, bytes(layout.words_shape()), words.len())?;
        expect_len("bytes of scales", &layout, bytes(layout.scales_shape()), scales.len())?;
        Ok(PackedHost { layout, words: aligned(words), scales: aligned(scales) })
    }

    /// Wraps the raw elements of an unpadded row-major float matrix (of a safetensors or GGUF file). No copy is made unless a row
    /// of 16-bit floats has an odd number of columns, or the bytes are not aligned to 4. The values are not looked at.
    ///
    /// # Errors
    /// [`KernelError::Length`] if the length is not `rows * cols` elements of the float type,
    /// [`KernelError::UnknownFormat`] if the format is not a float.
    pub fn from_raw_floats(layout: PackedLayout, bytes: Bytes) -> Result<Self> {
        layout.check()?;
        let element = match layout.format {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Quantized(q) => {
                return Err(KernelError::UnknownFormat { name: Format::Quantized(q).name() });
            }
        };
        let row_bytes = layout.cols * element;
        expect_len("bytes of floats", &layout, layout.rows * row_bytes, bytes.len())?;
        if row_bytes == layout.row_words() * 4 {
            return Self::from_parts(layout, bytes, Bytes::from_elems(Vec::<u32>::new()));
        }
        let mut words = vec![0u32; layout.rows * layout.row_words()];
        for (row, source) in words.chunks_mut(layout.row_words()).zip(bytes.chunks(row_bytes)) {
            bytemuck::cast_slice_mut::<u32, u8>(row)[..row_bytes].copy_from_slice(source);
        }
        Self::from_parts(layout, Bytes::from_elems(words), Bytes::from_elems(Vec::<u32>::new()))
    }

    /// Wraps `f32` values without rounding.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `rows * cols` values, [`KernelError::BadShape`] if there are none.
    pub fn from_f32(values: Vec<f32>, rows: usize, cols: usize) -> Result<Self> {
        let layout = PackedLayout::new(rows, cols, Format::F32)?;
        Self::from_raw_floats(layout, Bytes::from_elems(values))
    }

    /// Wraps `f16` values.
    ///
    /// # Errors
    /// As [`from_f32`](Self::from_f32).
    pub fn from_f16(values: Vec<half::f16>, rows: usize, cols: usize) -> Result<Self> {
        let layout = PackedLayout::new(rows, cols, Format::F16)?;
        let bits: Vec<u16> = values.into_iter().map(half::f16::to_bits).collect();
        Self::from_raw_floats(layout, Bytes::from_elems(bits))
    }

    /// Checks what [`from_parts`](Self::from_parts) does not look at: that every row's mask keeps as many columns as
    /// its sparse format says. Of a prepared matrix, that every
    /// panel's masks do. Dense matrices are not read.
    ///
    /// # Errors
    /// [`KernelError::Mask`] for the first row that is wrong.
    pub fn check(&self) -> Result<()> {
        if self.layout.arrangement == Arrangement::Panels {
            let (words, scales) = (bytemuck::cast_slice(&self.words), bytemuck::cast_slice(&self.scales));
            return Panels::new(self.layout, words, scales).check_masks();
        }
        let PackedLayout { rows, cols, format, .. } = self.layout;
        let check = |row| format.codec().check(row, cols, self.row_words(row)).err();
        let error = (0..rows).into_par_iter().find_map_first(check);
        error.map_or(Ok(()), Err)
    }

    /// All values, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.layout.rows * self.layout.cols];
        out.par_chunks_mut(self.layout.cols).enumerate().for_each(|(row, out)| self.dequantize_row(row, out));
        out
    }

    /// The values of one row.
    ///
    /// # Panics
    /// If `row` is not below `rows`, or `out` does not hold `cols` values.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.layout.rows, "row {row} of {}", self.layout);
        assert_eq!(out.len(), self.layout.cols, "output of a row of {}", self.layout);
        match self.layout.arrangement {
            Arrangement::Rows => self.layout.format.codec().decode(self.row_words(row), self.row_scales(row), out),
            Arrangement::Panels => {
                let (words, scales) = (bytemuck::cast_slice(&self.words), bytemuck::cast_slice(&self.scales));
                Panels::new(self.layout, words, scales).decode_row(row, out);
            }
        }
    }

    /// The matrix whose row `i` is this one's row `rows[i]`, in the row arrangement.
    ///
    /// # Errors
    /// [`KernelError::RowOutOfRange`]; [`KernelError::BadShape`] if `rows` is empty.
    pub fn gather_rows(&self, rows: &[usize]) -> Result<Self> {
        let layout = PackedLayout::new(rows.len(), self.layout.cols, self.layout.format)?;
        if let Some(&row) = rows.iter().find(|&&row| row >= self.layout.rows) {
            return Err(KernelError::RowOutOfRange { row, rows: self.layout.rows });
        }
        if self.layout.arrangement == Arrangement::Panels {
            return self.unprepare()?.gather_rows(rows);
        }
        let words: Vec<u32> = rows.iter().flat_map(|&row| self.row_words(row)).copied().collect();
        let scales: Vec<u32> = rows.iter().flat_map(|&row| self.row_scales(row)).copied().collect();
        Ok(PackedHost { layout, words: Bytes::from_elems(words), scales: Bytes::from_elems(scales) })
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> u64 {
        (self.words.len() + self.scales.len()) as u64
    }

    fn row_words(&self, row: usize) -> &[u32] {
        let n = self.layout.row_words();
        &bytemuck::cast_slice(&self.words)[row * n..(row + 1) * n]
    }

    fn row_scales(&self, row: usize) -> &[u32] {
        let n = self.layout.row_scale_words();
        &bytemuck::cast_slice(&self.scales)[row * n..(row + 1) * n]
    }
}

impl PartialEq for PackedHost {
    fn eq(&self, other: &Self) -> bool {
        self.layout == other.layout && self.words[..] == other.words[..] && self.scales[..] == other.scales[..]
    }
}

fn expect_len(what: &'static str, layout: &PackedLayout, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(KernelError::Length { what, layout: layout.to_string(), expected, found })
    }
}

/// The same bytes at an address that `u32` can be read from.
fn aligned(bytes: Bytes) -> Bytes {
    if bytemuck::try_cast_slice::<u8, u32>(&bytes).is_ok() {
        return bytes;
    }
    let mut words = vec![0u32; bytes.len() / 4];
    bytemuck::cast_slice_mut::<u32, u8>(&mut words).copy_from_slice(&bytes);
    Bytes::from_elems(words)
}

#[cfg(test)]
mod tests;
