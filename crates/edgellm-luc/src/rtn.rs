//! Round to nearest: the baseline compressor.
//!
//! The weights of least magnitude are pruned first (Han et al., "Learning both weights and connections", 2015): of each
//! row, or of every 4 or 8 consecutive weights of it. Then every group is rounded to the nearest code
//! ([`PackedHost::quantize`] states the rounding). A pruned weight decodes to exactly 0: sparse formats do not store
//! it, and symmetric codes hold zero exactly.

use edgellm_kernels::{InputGram, PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::traits::Compressor;
use edgellm_model::values::LayerFormat;
use rayon::prelude::*;

/// Magnitude pruning to the format's sparsity and pattern, then round to nearest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rtn;

impl Compressor for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        _inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError> {
        let layout = PackedLayout::new(rows, cols, format.packed()?)?;
        if format.sparsity == 0.0 {
            return Ok(PackedHost::quantize(values, layout)?);
        }
        let sparse = layout.format.quantized().filter(|q| q.is_sparse());
        if !format.symmetric && format.bit_width < 16 && sparse.is_none() {
            return Err(ModelError::Value {
                what: format!("format {format}"),
                expected: "symmetric codes, which hold zero exactly, in a pruned format that stores all codes".into(),
                found: "asymmetric codes".into(),
            });
        }
        // Asymmetric codes round zeros that they store: exactly those are pruned that are not stored.
        let zeros = match sparse.filter(|_| !format.symmetric) {
            Some(sparse) => cols - sparse.pattern.kept(cols),
            None => pruned_per_row(cols, format.sparsity),
        };
        let mut pruned = values.to_vec();
        pruned.par_chunks_mut(cols).for_each(|row| match format.pattern.n_of_m() {
            Some((n, m)) => row.chunks_mut(m).for_each(|group| prune(group, group.len().saturating_sub(n))),
            None => prune(row, zeros),
        });
        Ok(PackedHost::quantize(&pruned, layout)?)
    }
}

/// Weights of a row of `cols` that are set to zero: `sparsity * cols`, rounded to nearest.
pub fn pruned_per_row(cols: usize, sparsity: f64) -> usize {
    ((sparsity * cols as f64).round() as usize).min(cols)
}

/// Sets the `zeros` values of least magnitude to zero; of equals, the first. NaN counts as largest, so that
/// quantization reports it.
fn prune(row: &mut [f32], zeros: usize) {
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
    use edgellm_model::values::Pattern;

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
            let packed = Rtn.compress(&source, rows, cols, &format, None).unwrap();
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
    fn sparse_formats_store_what_is_left() {
        let (rows, cols) = (3, 70);
        let source = values(rows * cols);
        for bits in [2, 4, 8, 16] {
            for pattern in [Pattern::TwoFour, Pattern::FourEight] {
                for symmetric in [true, false] {
                    let format =
                        if bits < 16 { LayerFormat::quantized(bits, 32, symmetric) } else { LayerFormat::float(bits) };
                    let format = format.with_n_of_m(pattern);
                    let packed = Rtn.compress(&source, rows, cols, &format, None).unwrap();
                    let (n, m) = pattern.n_of_m().unwrap();
                    for (row, source) in packed.dequantize().chunks(cols).zip(source.chunks(cols)) {
                        for (group, source) in row.chunks(m).zip(source.chunks(m)) {
                            let mut magnitudes: Vec<f32> = source.iter().map(|v| v.abs()).collect();
                            magnitudes.sort_by(f32::total_cmp);
                            let least = magnitudes[source.len().saturating_sub(n)];
                            for (value, source) in group.iter().zip(source) {
                                assert!(source.abs() >= least || *value == 0.0, "{format}");
                            }
                            if bits == 16 {
                                assert_eq!(group.iter().filter(|v| **v != 0.0).count(), n.min(source.len()));
                            }
                        }
                    }
                }
            }
        }
        // Any weights of a row: as many zeros as the sparsity says, and fewer bytes.
        let format = LayerFormat::quantized(8, 32, true).with_sparsity(0.6);
        let packed = Rtn.compress(&source, rows, cols, &format, None).unwrap();
        assert_eq!(packed.layout.format.name(), "q8g32s-b40");
        for row in packed.dequantize().chunks(cols) {
            assert_eq!(row.iter().filter(|v| **v == 0.0).count(), 42);
        }
        let dense = Rtn.compress(&source, rows, cols, &LayerFormat::quantized(8, 32, true), None).unwrap();
        assert!(packed.bytes() < dense.bytes());
        // Asymmetric: what is not stored is zero, and nothing else need be.
        let format = LayerFormat { symmetric: false, ..format };
        let packed = Rtn.compress(&source, rows, cols, &format, None).unwrap();
        for row in packed.dequantize().chunks(cols) {
            assert_eq!(row.iter().filter(|v| **v != 0.0).count(), 28);
        }
    }

    #[test]
    fn dense_formats_are_the_kernels_rounding() {
        let format = LayerFormat::quantized(4, 64, false);
        let source = values(2 * 100);
        let expected =
            PackedHost::quantize(&source, PackedLayout::new(2, 100, format.packed().unwrap()).unwrap()).unwrap();
        assert_eq!(Rtn.compress(&source, 2, 100, &format, None).unwrap(), expected);
    }

    #[test]
    fn asymmetric_pruning_and_bad_values_are_refused() {
        let mut format = LayerFormat::quantized(4, 32, false);
        format.sparsity = 0.5;
        assert!(Rtn.compress(&values(64), 1, 64, &format, None).unwrap_err().to_string().contains("symmetric"));
        let mut bad = values(64);
        bad[3] = f32::NAN;
        let format = LayerFormat::quantized(4, 32, true).with_sparsity(0.5);
        assert!(Rtn.compress(&bad, 1, 64, &format, None).is_err());
        assert!(Rtn.compress(&values(63), 1, 64, &format, None).is_err());
    }

    #[test]
    fn equal_magnitudes_go_in_order() {
        let mut row = [1.0f32, -1.0, 1.0, -1.0];
        prune(&mut row, 2);
        assert_eq!(row, [0.0, 0.0, 1.0, -1.0]);
    }
}
