//! Packed matrices whose scales are trained, and the gradients of these.
//!
//! A weight is `w = scale * q + min` with a code `q` that stays (`w = scale * (q - 2^(b - 1))` if symmetric). With `g = dL/dw`,
//! `dL/dscale = sum g dw/dscale` and `dL/dmin = sum g` over the group (the steps and offsets that the second stage of
//! EfficientQAT trains, arXiv 2407.11062, section 3.2). Rounding of what is stored passes gradients as they are.

use burn::tensor::Bytes;
use rayon::prelude::*;

use super::grouped::get_code;
use super::{Format, PackedLayout, QuantFormat};
use crate::error::{KernelError, Result};
use crate::host::PackedHost;

/// A dense quantized matrix with scales and minima in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainableMatrix {
    /// In the row arrangement.
    packed: PackedHost,
    format: QuantFormat,
    /// Scales and minima of the groups.
    pub grid: GroupValues,
}

/// A value for the scale and one for the minimum of each group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GroupValues {
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`; empty for symmetric formats.
    pub mins: Vec<f32>,
}

impl TrainableMatrix {
    /// Whether matrices of this format can be trained: quantized and dense.
    pub fn exists(format: Format) -> bool {
        format.quantized().is_some_and(|format| !format.is_sparse())
    }

    /// The packed matrix, with its scales as they are.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedPattern`] unless the format is [quantized and dense](Self::exists).
    pub fn new(packed: PackedHost) -> Result<Self> {
        let packed = packed.unprepare()?;
        let layout = packed.layout;
        let dense = layout.format.quantized().filter(|format| !format.is_sparse());
        let format = dense.ok_or_else(|| KernelError::UnsupportedPattern { format: layout.format.name() })?;
        let groups = format.groups(layout.cols);
        let stored: &[u32] = bytemuck::cast_slice(&packed.scales);
        let of_row = |row: &[u32]| (0..groups).map(|group| format.scale_and_min(row, group)).collect::<Vec<_>>();
        let (scales, mut mins): (Vec<f32>, Vec<f32>) = stored.chunks(layout.row_scale_words()).flat_map(of_row).unzip();
        if format.symmetric {
            mins.clear();
        }
        Ok(Self { packed, format, grid: GroupValues { scales, mins } })
    }

    /// The matrix with scales and minima as the format stores them, in the row arrangement.
    pub fn pack(&self) -> PackedHost {
        let (layout, format) = (self.packed.layout, self.format);
        let groups = format.groups(layout.cols);
        let mut stored = vec![0u32; layout.rows * layout.row_scale_words()];
        stored.par_chunks_mut(layout.row_scale_words()).enumerate().for_each(|(row, stored)| {
            let of_row = row * groups..(row + 1) * groups;
            let scales = &self.grid.scales[of_row.clone()];
            let mins = self.grid.mins.get(of_row).unwrap_or_default();
            let units = format.choose_units(scales, mins);
            format.put_units(stored, units);
            for (group, &scale) in scales.iter().enumerate() {
                format.store(stored, units, group, scale, mins.get(group).copied().unwrap_or(0.0));
            }
        });
        PackedHost { layout, words: self.packed.words.clone(), scales: Bytes::from_elems(stored) }
    }

    /// The gradients of scales and minima, of `dw`, the gradient of the weights, `[rows, cols]`.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn gradients(&self, dw: &[f32], out: &mut GroupValues) {
        let (PackedLayout { rows, cols, .. }, format) = (self.packed.layout, self.format);
        assert_eq!(dw.len(), rows * cols, "the gradient of a matrix of {}", self.packed.layout);
        let (groups, size) = (format.groups(cols), usize::from(format.group_size));
        let words: &[u32] = bytemuck::cast_slice(&self.packed.words);
        out.scales.resize(rows * groups, 0.0);
        out.mins.resize(rows * groups, 0.0);
        out.scales
            .par_chunks_mut(groups)
            .zip(out.mins.par_chunks_mut(groups))
            .zip(dw.par_chunks(cols))
            .zip(words.par_chunks(self.packed.layout.row_words()))
            .for_each(|(((d_scales, d_mins), dw), words)| {
                for (group, dw) in dw.chunks(size).enumerate() {
                    let steps = |i: usize| {
                        let code = get_code(words, usize::from(format.bit_width), group * size + i);
                        format.value(code, 1.0, 0.0)
                    };
                    d_scales[group] = dw.iter().enumerate().map(|(i, g)| g * steps(i)).sum();
                    d_mins[group] = dw.iter().sum();
                }
            });
        if format.symmetric {
            out.mins.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(name: &str) -> PackedHost {
        let (rows, cols) = (5, 96);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        let layout = PackedLayout::new(rows, cols, Format::parse(name).unwrap()).unwrap();
        PackedHost::quantize(&values, layout).unwrap()
    }

    #[test]
    fn untrained_it_packs_to_what_it_was() {
        for name in ["q3g32a", "q4g32a-8", "q2g64s", "q5g128a", "q8g32s-8", "q4g32a-f32"] {
            let packed = matrix(name);
            let trainable = TrainableMatrix::new(packed.clone()).unwrap();
            assert_eq!(trainable.pack().dequantize(), packed.dequantize(), "{name}");
            assert_eq!(TrainableMatrix::new(packed.prepare().unwrap()).unwrap(), trainable, "{name}, prepared");
        }
    }

    #[test]
    fn gradients_are_those_of_the_values() {
        for name in ["q3g32a-f32", "q3g64a-f32", "q6g16s-f32"] {
            let trainable = TrainableMatrix::new(matrix(name)).unwrap();
            let dw: Vec<f32> = (0..5 * 96).map(|i| ((i * 13 % 29) as f32 - 14.0) / 10.0).collect();
            let mut gradients = GroupValues::default();
            trainable.gradients(&dw, &mut gradients);
            // The values are linear in scales and minima: a step of them changes `sum dw w` by the gradient times it.
            let loss = |matrix: &TrainableMatrix| -> f64 {
                let values = matrix.pack().dequantize();
                values.iter().zip(&dw).map(|(w, dw)| f64::from(*w) * f64::from(*dw)).sum()
            };
            let base = loss(&trainable);
            let check = |moved: TrainableMatrix, gradient: f32, what: &str| {
                let (found, expected) = (loss(&moved) - base, f64::from(gradient) * 0.5);
                assert!((found - expected).abs() < 1e-3, "{name}: {what}: {found} is not {expected}");
            };
            for group in 0..gradients.scales.len() {
                let mut moved = trainable.clone();
                moved.grid.scales[group] += 0.5;
                check(moved, gradients.scales[group], "scale");
            }
            for group in 0..gradients.mins.len() {
                let mut moved = trainable.clone();
                moved.grid.mins[group] += 0.5;
                check(moved, gradients.mins[group], "minimum");
            }
            assert_eq!(gradients.mins.len(), trainable.grid.mins.len());
        }
    }

    #[test]
    fn sparse_and_float_matrices_are_refused() {
        for name in ["q4g32s-2:4", "f16"] {
            let layout = PackedLayout::new(2, 32, Format::parse(name).unwrap()).unwrap();
            let packed = PackedHost::quantize(&[0.5; 64], layout).unwrap();
            assert!(TrainableMatrix::new(packed).is_err(), "{name}");
            assert!(!TrainableMatrix::exists(layout.format));
        }
    }
}
