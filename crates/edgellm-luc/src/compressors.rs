//! The compressors that look at the inputs of a matrix: what its rounding and pruning errors do to its outputs.

use edgellm_kernels::{Compensation, InputGram, PackedHost, PackedLayout, QuantFormat, RoundingGoal, SparsePattern};
use edgellm_model::ModelError;
use edgellm_model::traits::Compressor;
use edgellm_model::values::LayerFormat;
use rayon::prelude::*;

/// GPTQ (Frantar et al., arXiv 2210.17323) with searched and refitted grids; for sparse formats it is SparseGPT (arXiv
/// 2301.00774), which prunes and quantizes in one pass. See [`PackedHost::quantize_compensated`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gptq {
    /// Order of the columns, and refits.
    pub how: Compensation,
}

impl Compressor for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn needs_inputs(&self) -> bool {
        true
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError> {
        let layout = layout(rows, cols, format)?;
        let pruned = pruned_beside(format, layout)?;
        let inputs = needed(self, inputs)?;
        Ok(PackedHost::quantize_compensated(values, layout, inputs, Compensation { pruned, ..self.how })?)
    }
}

/// Wanda (Sun et al., arXiv 2306.11695): of every row the weights of least `|w| |x|` go, `|x|` being the norm of the
/// column's input; then each group is rounded to nearest on the grid of least error, weighed by the inputs' energy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanda;

impl Compressor for Wanda {
    fn name(&self) -> &'static str {
        "wanda"
    }

    fn needs_inputs(&self) -> bool {
        true
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError> {
        let layout = layout(rows, cols, format)?;
        let beside = pruned_beside(format, layout)?;
        let energy = energy(needed(self, inputs)?, cols)?;
        let pattern = layout.format.quantized().map_or(SparsePattern::Dense, |q| q.pattern);
        let pattern = if pattern == SparsePattern::Dense { beside } else { pattern };
        let kept =
            pruned(values, cols, pattern, |row| row.iter().zip(&energy).map(|(w, e)| w.abs() * e.sqrt()).collect());
        searched(&kept, layout, &energy)
    }
}

/// Round to nearest on searched grids: each group takes the scale and minimum of least error, weighed by the energy of the
/// inputs (what llama.cpp's importance matrix is for). What is pruned is chosen by magnitude.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScaleSearch;

impl Compressor for ScaleSearch {
    fn name(&self) -> &'static str {
        "scale-search"
    }

    fn needs_inputs(&self) -> bool {
        true
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError> {
        let layout = layout(rows, cols, format)?;
        let energy = energy(needed(self, inputs)?, cols)?;
        let pattern = pruned_beside(format, layout)?;
        let kept = pruned(values, cols, pattern, <[f32]>::to_vec);
        searched(&kept, layout, &energy)
    }
}

fn layout(rows: usize, cols: usize, format: &LayerFormat) -> Result<PackedLayout, ModelError> {
    Ok(PackedLayout::new(rows, cols, format.packed()?)?)
}

/// The pattern of what is kept where a pruned format stores all weights.
fn pruned_beside(format: &LayerFormat, layout: PackedLayout) -> Result<SparsePattern, ModelError> {
    let quantized = layout.format.quantized();
    if format.sparsity == 0.0 || quantized.is_some_and(|q| q.is_sparse()) {
        return Ok(SparsePattern::Dense);
    }
    if quantized.is_some_and(|q: QuantFormat| !q.symmetric) {
        return Err(ModelError::Value {
            what: format!("format {format}"),
            expected: "symmetric codes, which hold zero exactly, in a pruned format that stores all codes".into(),
            found: "asymmetric codes".into(),
        });
    }
    Ok(match format.pattern.n_of_m() {
        Some((n, m)) => SparsePattern::NofM { n: n as u8, m: m as u8 },
        None => SparsePattern::Bitmask { percent: ((1.0 - format.sparsity) * 100.0).round().clamp(1.0, 99.0) as u8 },
    })
}

fn needed<'a>(compressor: &dyn Compressor, inputs: Option<&'a InputGram>) -> Result<&'a InputGram, ModelError> {
    inputs.ok_or_else(|| ModelError::Value {
        what: format!("compressor {}", compressor.name()),
        expected: "the moments of a matrix's inputs, from calibration text".into(),
        found: "none".into(),
    })
}

/// The energy of every column, none of them free.
fn energy(inputs: &InputGram, cols: usize) -> Result<Vec<f32>, ModelError> {
    if inputs.cols() != cols {
        return Err(ModelError::Value {
            what: "columns of inputs".into(),
            expected: cols.to_string(),
            found: inputs.cols().to_string(),
        });
    }
    let diagonal = inputs.diagonal();
    let mean = diagonal.iter().map(|v| f64::from(*v)).sum::<f64>() / cols as f64;
    let least = if mean > 0.0 { 1e-3 * mean as f32 } else { 1.0 };
    Ok(diagonal.into_iter().map(|v| v.max(least)).collect())
}

/// `values` with zeros where a row's scores are too small for the pattern.
fn pruned(values: &[f32], cols: usize, pattern: SparsePattern, scores: impl Fn(&[f32]) -> Vec<f32> + Sync) -> Vec<f32> {
    let mut kept = values.to_vec();
    if pattern != SparsePattern::Dense && cols > 0 {
        kept.par_chunks_mut(cols).for_each(|row| {
            let mut keep = vec![false; row.len()];
            pattern.kept_columns(&scores(row)).into_iter().for_each(|col| keep[col] = true);
            row.iter_mut().zip(keep).filter(|(_, keep)| !keep).for_each(|(w, _)| *w = 0.0);
        });
    }
    kept
}

fn searched(values: &[f32], layout: PackedLayout, energy: &[f32]) -> Result<PackedHost, ModelError> {
    let goal = RoundingGoal::new(layout.cols).with_weights(energy.to_vec())?;
    Ok(PackedHost::requantize(values, layout, None, &goal)?)
}

#[cfg(test)]
mod tests;
