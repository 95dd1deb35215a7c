//! Round to nearest: the baseline compressor.
//!
//! Each row first loses its smallest weights by magnitude (Han et al., "Learning both weights and connections", 2015),
//! then every group is rounded to the nearest code ([`PackedHost::quantize`] states the rounding). Pruned formats are
//! symmetric, and symmetric codes hold zero exactly, so a pruned weight decodes to exactly 0.

use edgellm_kernels::{PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::traits::Compressor;
use edgellm_model::values::LayerFormat;
use rayon::prelude::*;

/// Magnitude pruning to the format's sparsity in every row, then round to nearest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn;

impl Compressor for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
    ) -> Result<PackedHost, ModelError> {
        let layout = PackedLayout::new(rows, cols, format.packed()?)?;
        if format.sparsity == 0.0 {
            return Ok(PackedHost::quantize(values, layout)?);
        }
        if !format.symmetric && format.bit_width < 16 {
            return Err(ModelError::Value {
                what: format!("format {format}"),
                expected: "symmetric codes, which hold zero exactly, in a pruned format".into(),
                found: "asymmetric codes".into(),
            });
        }
        let mut pruned = values.to_vec();
        let zeros = pruned_per_row(cols, format.sparsity);
        pruned.par_chunks_mut(cols).for_each(|row| prune_row(row, zeros));
        Ok(PackedHost::quantize(&pruned, layout)?)
    }
}

/// Weights of a row of `cols` that are set to zero: `sparsity * cols`, rounded to nearest.
pub fn pruned_per_row(cols: usize, sparsity: f64) -> usize {
    ((sparsity * cols as f64).round() as usize).min(cols)
}

/// Sets the `zeros` values of least magnitude to zero; of equals, the first. NaN counts as largest, so that
/// quantization reports it.
fn prune_row(row: &mut [f32], zeros: usize) {
    if zeros == 0 {
        return;
    }
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let key = |&i: &u32| (row[i as usize].abs(), i);
    order.select_nth_unstable_by(zeros - 1, |a, b| {
        let (a, b) = (key(a), key(b));
        a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
    });
    for &i in &order[..zeros] {
        row[i as usize] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0 + 0.01).collect()
    }

    #[test]
    fn rows_are_pruned_to_the_share_and_zeros_stay_exact() {
        let (rows, cols) = (3, 70);
        for bits in [2, 3, 4, 5, 6, 8, 16, 32] {
            let format = if bits < 16 { LayerFormat::quantized(bits, 32, true) } else { LayerFormat::float(bits) };
            let format = format.with_sparsity(0.4);
            let source = values(rows * cols);
            let packed = Rtn.compress(&source, rows, cols, &format).unwrap();
            let back = packed.dequantize();
            for (row, source) in back.chunks(cols).zip(source.chunks(cols)) {
                let mut magnitudes: Vec<f32> = source.iter().map(|v| v.abs()).collect();
                magnitudes.sort_by(f32::total_cmp);
                let threshold = magnitudes[27];
                for (value, source) in row.iter().zip(source) {
                    if source.abs() <= threshold {
                        assert_eq!(*value, 0.0, "{bits} bits");
                    }
                }
                if bits >= 8 {
                    assert_eq!(row.iter().filter(|v| **v == 0.0).count(), 28, "{bits} bits");
                }
            }
        }
    }

    #[test]
    fn dense_formats_are_the_kernels_rounding() {
        let format = LayerFormat::quantized(4, 64, false);
        let source = values(2 * 100);
        let expected =
            PackedHost::quantize(&source, PackedLayout::new(2, 100, format.packed().unwrap()).unwrap()).unwrap();
        assert_eq!(Rtn.compress(&source, 2, 100, &format).unwrap(), expected);
    }

    #[test]
    fn asymmetric_pruning_and_bad_values_are_refused() {
        let mut format = LayerFormat::quantized(4, 32, false);
        format.sparsity = 0.5;
        assert!(Rtn.compress(&values(64), 1, 64, &format).unwrap_err().to_string().contains("symmetric"));
        let mut bad = values(64);
        bad[3] = f32::NAN;
        let format = LayerFormat::quantized(4, 32, true).with_sparsity(0.5);
        assert!(Rtn.compress(&bad, 1, 64, &format).is_err());
        assert!(Rtn.compress(&values(63), 1, 64, &format).is_err());
    }

    #[test]
    fn equal_magnitudes_go_in_order() {
        let mut row = [1.0f32, -1.0, 1.0, -1.0];
        prune_row(&mut row, 2);
        assert_eq!(row, [0.0, 0.0, 1.0, -1.0]);
    }
}
