//! Quantization and pruning with error feedback: the rounding error of a weight is made up for by the weights that are
//! rounded after it, as far as the inputs are correlated (GPTQ, Frantar et al., arXiv 2210.17323; SparseGPT, arXiv
//! 2301.00774, prunes in the same pass).
//!
//! For every row `w`, `e^T H e` with `e = w - Q(w)` is made small, in three steps that repeat:
//!
//! 1. the grid of every group is searched for the least error, weighed by what the inputs of the other columns cannot
//!    predict; then it is rounded to what the format stores;
//! 2. column by column, the weight with the feedback of all errors so far is rounded ([`factor`]'s identity);
//! 3. with the codes as they are, scales and minima are fitted again by least squares in `H`, group after group
//!    (Gauss-Seidel), and the columns are rounded anew. Of all rounds, a row keeps the best.
//!
//! Cost: for a matrix `[n, k]`, `n k^2 / 2` multiply-adds a pass of step 2, and about `n k^2` for step 3; 16 rows at a time
//! are the lanes of vectors. The factorization, `k^3 / 3`, is shared by all matrices and formats with the same inputs.

mod factor;
mod tile;

use rayon::prelude::*;

use super::{Arrangement, PackedLayout, SparsePattern};
use crate::arch::{Kernel, run_vectorized};
use crate::error::{KernelError, Result};
use crate::host::PackedHost;

pub use factor::InputGram;

use tile::{Feedback, LANES, Lanes, Tile, ZERO, keep};

/// How [`PackedHost::quantize_compensated`] works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compensation {
    /// Columns of most energy first (GPTQ's `act_order`); else, and for sparse formats always, in their order.
    pub by_energy: bool,
    /// Times that grids are fitted again to the codes.
    pub refits: usize,
    /// What is kept in formats that store all weights; what is pruned is exactly 0. Needs symmetric codes.
    pub pruned: SparsePattern,
}

impl Default for Compensation {
    fn default() -> Self {
        Self { by_energy: true, refits: 2, pruned: SparsePattern::Dense }
    }
}

impl PackedHost {
    /// Rounds `values` (row-major, `rows * cols`) to the layout's format so that the outputs for inputs with the moments
    /// `gram` change least. Sparse formats prune in the same pass: of every row (or group of its pattern) the weights of
    /// least `w^2 D` go. Float formats round to nearest what [`prune_compensated`] leaves.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and [`KernelError::Length`] if the moments are of another number of columns.
    pub fn quantize_compensated(
        values: &[f32],
        layout: PackedLayout,
        gram: &InputGram,
        how: Compensation,
    ) -> Result<Self> {
        let Some(format) = layout.format.quantized() else {
            if how.pruned == SparsePattern::Dense {
                return Self::quantize(values, layout);
            }
            return Self::quantize(&prune_compensated(values, how.pruned, gram)?, layout);
        };
        // It also checks everything, and gives the buffers.
        let nearest = Self::quantize(values, PackedLayout { arrangement: Arrangement::Rows, ..layout })?;
        if gram.cols() != layout.cols {
            let (expected, found) = (layout.cols, gram.cols());
            return Err(KernelError::Length { what: "columns of inputs", layout: layout.to_string(), expected, found });
        }
        if how.pruned != SparsePattern::Dense && !format.symmetric && !format.is_sparse() {
            return Err(KernelError::UnsupportedPattern { format: format!("{} of {}", how.pruned, layout.format) });
        }
        let is_pruned = format.is_sparse() || how.pruned != SparsePattern::Dense;
        let factor = gram.factor(how.by_energy && !is_pruned);
        let PackedHost { layout: rows_layout, mut words, mut scales } = nearest;
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        let words_u32: &mut [u32] = bytemuck::cast_slice_mut(&mut words);
        let scales_u32: &mut [u32] = bytemuck::cast_slice_mut(&mut scales);
        words_u32
            .par_chunks_mut(LANES * row_words)
            .zip(scales_u32.par_chunks_mut(LANES * row_scales))
            .zip(values.par_chunks(LANES * layout.cols))
            .for_each(|((words, scales), values)| {
                let mut tile = Tile::new(format, how.pruned, factor, values);
                tile.round(how.refits);
                for (lane, (words, scales)) in
                    words.chunks_mut(row_words).zip(scales.chunks_mut(row_scales)).enumerate()
                {
                    words.fill(0);
                    scales.fill(0);
                    tile.row(lane).store(&format, layout.cols, words, scales);
                }
            });
        let packed = PackedHost { layout: rows_layout, words, scales };
        if layout.arrangement == Arrangement::Panels { packed.prepare() } else { Ok(packed) }
    }
}

/// Prunes `values` (row-major, rows of the moments' columns) to a pattern; the weights that are left make up for those
/// that go, as far as the inputs are correlated (SparseGPT, without quantization).
///
/// # Errors
/// [`KernelError::Length`] if there is no whole number of rows, [`KernelError::NonFinite`].
pub fn prune_compensated(values: &[f32], pattern: SparsePattern, gram: &InputGram) -> Result<Vec<f32>> {
    let cols = gram.cols();
    if !values.len().is_multiple_of(cols) {
        let layout = format!("rows of {cols} columns");
        let (expected, found) = (values.len() / cols * cols, values.len());
        return Err(KernelError::Length { what: "weights to prune", layout, expected, found });
    }
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(KernelError::NonFinite { row: at / cols, col: at % cols, value: values[at].to_string() });
    }
    let (factor, kernel) = (gram.factor(false), Kernel::active());
    let mut out = values.to_vec();
    out.par_chunks_mut(LANES * cols).for_each(|values| {
        let rows = values.len() / cols;
        let lanes = |col: usize| std::array::from_fn(|l| if l < rows { values[l * cols + col] } else { 0.0 });
        let w: Vec<Lanes> = (0..cols).map(lanes).collect();
        let kept = keep(pattern, factor, &w, rows);
        let mut errors = vec![ZERO; cols];
        for k in 0..cols {
            let fed = Feedback { factors: factor.above(k), errors: &errors[..k], start: &w[k] };
            let target = run_vectorized(kernel, fed);
            for l in 0..rows {
                let value = target[l] * kept[k][l];
                errors[k][l] = w[k][l] - value;
                values[l * cols + k] = value;
            }
        }
    });
    Ok(out)
}

#[cfg(test)]
mod tests;
