//! Packed matrices whose codes and scales are trained: what lies behind the rounding, and its gradients.
//!
//! A weight is `w = scale * round(clamp(p, 0, 2^b - 1)) + min`, with a position `p` on its group's grid. Rounding passes
//! gradients as they are (the straight-through estimator, Bengio et al., arXiv 1308.3432), so with `g = dL/dw`:
//! `dL/dp = scale * g` inside the grid and 0 outside, `dL/dscale = sum g q` and `dL/dmin = sum g` over the group (the idea
//! behind LSQ, arXiv 1902.08153, with a group's step and offset as in EfficientQAT, arXiv 2407.11062, section 3).

use burn::tensor::Bytes;
use rayon::prelude::*;

use super::grouped::{get_code, put_code};
use super::{Format, PackedLayout, QuantFormat};
use crate::error::{KernelError, Result};
use crate::host::PackedHost;

/// How far from its code a position starts at most.
const START: f32 = 0.49;

/// A dense quantized matrix with positions in place of codes.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainableMatrix {
    layout: PackedLayout,
    /// Scale of each group, `[rows, groups]`.
    pub scales: Vec<f32>,
    /// Minimum of each group, `[rows, groups]`; empty for symmetric formats.
    pub mins: Vec<f32>,
    /// Position of each weight on its group's grid, in steps, `[rows, cols]`.
    pub positions: Vec<f32>,
}

/// The gradients of a [`TrainableMatrix`], in its shapes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GridGradients {
    /// Of the scales.
    pub scales: Vec<f32>,
    /// Of the minima.
    pub mins: Vec<f32>,
    /// Of the positions.
    pub positions: Vec<f32>,
}

impl TrainableMatrix {
    /// Whether matrices of this format can be trained: quantized and dense.
    pub fn exists(format: Format) -> bool {
        format.quantized().is_some_and(|format| !format.is_sparse())
    }

    /// The packed matrix, with positions that lie from its codes toward `origin`, the values before they were packed,
    /// without leaving the codes: [`pack`](Self::pack) gives back what was packed.
    ///
    /// # Errors
    /// [`KernelError::UnsupportedPattern`] unless the format is [quantized and dense](Self::exists),
    /// [`KernelError::Length`] if there are not `rows * cols` values.
    pub fn new(packed: &PackedHost, origin: &[f32]) -> Result<Self> {
        let packed = packed.clone().unprepare()?;
        let layout = packed.layout;
        let format = dense_format(layout)?;
        let PackedLayout { rows, cols, .. } = layout;
        if origin.len() != rows * cols {
            let (expected, found) = (rows * cols, origin.len());
            return Err(KernelError::Length { what: "values", layout: layout.to_string(), expected, found });
        }
        let (groups, size) = (format.groups(cols), usize::from(format.group_size));
        let (mut scales, mut mins) = (vec![0.0; rows * groups], vec![0.0; rows * groups]);
        let mut positions = vec![0.0; rows * cols];
        let row_words: &[u32] = bytemuck::cast_slice(&packed.words);
        let row_scales: &[u32] = bytemuck::cast_slice(&packed.scales);
        positions
            .par_chunks_mut(cols)
            .zip(scales.par_chunks_mut(groups))
            .zip(mins.par_chunks_mut(groups))
            .zip(row_words.par_chunks(layout.row_words()))
            .zip(row_scales.par_chunks(layout.row_scale_words()))
            .zip(origin.par_chunks(cols))
            .for_each(|(((((positions, scales), mins), words), stored), origin)| {
                for group in 0..groups {
                    (scales[group], mins[group]) = format.scale_and_min(stored, group);
                }
                for (col, position) in positions.iter_mut().enumerate() {
                    let (scale, min) = (scales[col / size], mins[col / size]);
                    let code = get_code(words, usize::from(format.bit_width), col) as f32;
                    let wanted = (origin[col] - min) / scale;
                    let near = if scale == 0.0 { code } else { wanted.clamp(code - START, code + START) };
                    *position = near.clamp(0.0, top(format));
                }
            });
        if format.symmetric {
            mins.clear();
        }
        Ok(Self { layout, scales, mins, positions })
    }

    /// Shape and format.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Rounds positions to codes, and scales and minima to what the format stores.
    pub fn pack(&self) -> PackedHost {
        let (layout, format) = (self.layout, self.format());
        let (groups, top) = (format.groups(layout.cols), top(format));
        let mut words = vec![0u32; layout.rows * layout.row_words()];
        let mut stored = vec![0u32; layout.rows * layout.row_scale_words()];
        words
            .par_chunks_mut(layout.row_words())
            .zip(stored.par_chunks_mut(layout.row_scale_words()))
            .enumerate()
            .for_each(|(row, (words, stored))| {
                let scales = &self.scales[row * groups..(row + 1) * groups];
                let mins = if self.mins.is_empty() { &[][..] } else { &self.mins[row * groups..(row + 1) * groups] };
                let units = format.choose_units(scales, mins);
                format.put_units(stored, units);
                for (group, &scale) in scales.iter().enumerate() {
                    format.store(stored, units, group, scale, mins.get(group).copied().unwrap_or(0.0));
                }
                let positions = &self.positions[row * layout.cols..(row + 1) * layout.cols];
                for (col, position) in positions.iter().enumerate() {
                    put_code(words, usize::from(format.bit_width), col, position.clamp(0.0, top).round() as u32);
                }
            });
        PackedHost { layout, words: Bytes::from_elems(words), scales: Bytes::from_elems(stored) }
    }

    /// Brings positions that left their grids back to the ends, where gradients reach them.
    pub fn project(&mut self) {
        let top = top(self.format());
        self.positions.par_iter_mut().for_each(|position| *position = position.clamp(0.0, top));
    }

    /// The gradients, of `dw`, the gradient of the weights, `[rows, cols]`.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn gradients(&self, dw: &[f32], out: &mut GridGradients) {
        let (PackedLayout { rows, cols, .. }, format) = (self.layout, self.format());
        assert_eq!(dw.len(), rows * cols, "the gradient of a matrix of {}", self.layout);
        let (groups, size, top) = (format.groups(cols), usize::from(format.group_size), top(format));
        let middle = if format.symmetric { format.zero_point() as f32 } else { 0.0 };
        out.scales.resize(rows * groups, 0.0);
        out.mins.resize(rows * groups, 0.0);
        out.positions.resize(rows * cols, 0.0);
        out.positions
            .par_chunks_mut(cols)
            .zip(out.scales.par_chunks_mut(groups))
            .zip(out.mins.par_chunks_mut(groups))
            .enumerate()
            .for_each(|(row, ((d_positions, d_scales), d_mins))| {
                let at = row * cols;
                for group in 0..groups {
                    let scale = self.scales[row * groups + group];
                    let (mut d_scale, mut d_min) = (0.0f32, 0.0f32);
                    for col in group * size..((group + 1) * size).min(cols) {
                        let (g, position) = (dw[at + col], self.positions[at + col]);
                        let inside = position.clamp(0.0, top);
                        d_scale += g * (inside.round() - middle);
                        d_min += g;
                        d_positions[col] = if inside == position { g * scale } else { 0.0 };
                    }
                    (d_scales[group], d_mins[group]) = (d_scale, d_min);
                }
            });
        if format.symmetric {
            out.mins.clear();
        }
    }

    fn format(&self) -> QuantFormat {
        dense_format(self.layout).expect("checked when it was made")
    }
}

fn top(format: QuantFormat) -> f32 {
    ((1u32 << format.bit_width) - 1) as f32
}

fn dense_format(layout: PackedLayout) -> Result<QuantFormat> {
    let format = layout.format.quantized().filter(|format| !format.is_sparse());
    format.ok_or_else(|| KernelError::UnsupportedPattern { format: layout.format.name() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(name: &str) -> (PackedHost, Vec<f32>) {
        let (rows, cols) = (5, 96);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        let layout = PackedLayout::new(rows, cols, Format::parse(name).unwrap()).unwrap();
        (PackedHost::quantize(&values, layout).unwrap(), values)
    }

    #[test]
    fn untrained_it_packs_to_what_it_was() {
        for name in ["q3g32a", "q4g32a-8", "q2g64s", "q5g128a", "q8g32s-8", "q4g32a-f32"] {
            let (packed, values) = matrix(name);
            let trainable = TrainableMatrix::new(&packed, &values).unwrap();
            assert_eq!(trainable.pack().dequantize(), packed.dequantize(), "{name}");
            let prepared = packed.clone().prepare().unwrap();
            assert_eq!(TrainableMatrix::new(&prepared, &values).unwrap(), trainable, "{name}, prepared");
        }
    }

    #[test]
    fn gradients_are_those_of_the_values() {
        for name in ["q3g32a-f32", "q4g64s"] {
            let (packed, values) = matrix(name);
            let trainable = TrainableMatrix::new(&packed, &values).unwrap();
            let dw: Vec<f32> = (0..values.len()).map(|i| ((i * 13 % 29) as f32 - 14.0) / 10.0).collect();
            let mut gradients = GridGradients::default();
            trainable.gradients(&dw, &mut gradients);
            // The values are linear in scales and minima: a step of them changes `sum dw w` by the gradient times it.
            let loss = |matrix: &TrainableMatrix| -> f64 {
                let format = matrix.format();
                let groups = format.groups(matrix.layout.cols);
                let of = |i: usize| {
                    let group =
                        i / matrix.layout.cols * groups + i % matrix.layout.cols / usize::from(format.group_size);
                    let code = matrix.positions[i].clamp(0.0, top(format)).round() as u32;
                    let min = matrix.mins.get(group).copied().unwrap_or(0.0);
                    f64::from(dw[i]) * f64::from(format.value(code, matrix.scales[group], min))
                };
                (0..dw.len()).map(of).sum()
            };
            let base = loss(&trainable);
            for group in 0..gradients.scales.len() {
                let mut moved = trainable.clone();
                moved.scales[group] += 0.5;
                let expected = f64::from(gradients.scales[group]) * 0.5;
                assert!((loss(&moved) - base - expected).abs() < 1e-3, "{name}: scale {group}");
            }
            for group in 0..gradients.mins.len() {
                let mut moved = trainable.clone();
                moved.mins[group] += 0.5;
                let expected = f64::from(gradients.mins[group]) * 0.5;
                assert!((loss(&moved) - base - expected).abs() < 1e-3, "{name}: minimum {group}");
            }
            assert!(gradients.positions.iter().any(|g| *g != 0.0));
            let outside = TrainableMatrix { positions: vec![-1.0; dw.len()], ..trainable };
            outside.gradients(&dw, &mut gradients);
            assert!(gradients.positions.iter().all(|g| *g == 0.0), "{name}: outside of the grid");
        }
    }

    #[test]
    fn sparse_and_float_matrices_are_refused() {
        for name in ["q4g32s-2:4", "f16"] {
            let layout = PackedLayout::new(2, 32, Format::parse(name).unwrap()).unwrap();
            let packed = PackedHost::quantize(&[0.5; 64], layout).unwrap();
            assert!(TrainableMatrix::new(&packed, &[0.5; 64]).is_err(), "{name}");
            assert!(!TrainableMatrix::exists(layout.format));
        }
    }
}
