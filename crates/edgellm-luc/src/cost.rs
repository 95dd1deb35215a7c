//! What formats cost in bytes, and what a policy costs in all.
//!
//! `bits per weight = 8 * bytes / weights`, over all units, scales, masks and padding included. Pruned weights save
//! what their format saves: see [`LayerFormat::packed`].

use edgellm_model::ModelError;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, MatrixShape, Measurement};

/// What a policy costs and does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyCost {
    /// Weights of all units.
    pub weights: u64,
    /// Bytes of all units.
    pub bytes: u64,
    /// Mean bits per weight.
    pub bits_per_weight: f64,
    /// Sum of the units' measured end-to-end sensitivities; `None` if a unit has a format that was not measured.
    pub sensitivity: Option<f64>,
}

/// Bytes of matrices in a format.
///
/// # Errors
/// The format does not exist, or the bytes cannot be counted.
pub fn matrices_bytes(matrices: &[MatrixShape], format: &LayerFormat) -> Result<u64, ModelError> {
    let packed = format.packed()?;
    let sum = matrices.iter().try_fold(0u64, |sum, m| sum.checked_add(packed.matrix_bytes(m.rows, m.cols)));
    sum.filter(|&bytes| bytes < u64::MAX / 8).ok_or_else(|| ModelError::Value {
        what: "size of a unit's matrices".into(),
        expected: "a number of bytes that can be counted".into(),
        found: format!("{:?}", matrices.first().map(|m| (&m.name, m.rows, m.cols))),
    })
}

/// Weights of all units of a measurement.
///
/// # Errors
/// They cannot be counted.
pub fn total_weights(measurement: &Measurement) -> Result<u64, ModelError> {
    let matrices = measurement.units.iter().flat_map(|u| &u.matrices);
    let count = |m: &MatrixShape| (m.rows as u64).checked_mul(m.cols as u64);
    matrices
        .map(count)
        .try_fold(0u64, |sum, weights| sum.checked_add(weights?))
        .filter(|&weights| weights > 0)
        .ok_or_else(|| ModelError::Value {
            what: "weights of the measured units".into(),
            expected: "at least one, and a number that can be counted".into(),
            found: "none, or too many".into(),
        })
}

/// What `policy` costs on the model that was measured.
///
/// # Errors
/// The policy has no format for a measured unit, or a format that does not exist.
pub fn policy_cost(measurement: &Measurement, policy: &CompressionPolicy) -> Result<PolicyCost, ModelError> {
    let mut bytes = 0u64;
    let mut sensitivity = Some(0.0);
    for unit in &measurement.units {
        let format = policy.format_of(unit.unit).ok_or_else(|| ModelError::Value {
            what: "policy".into(),
            expected: format!("a format for {}", unit.unit),
            found: "none".into(),
        })?;
        bytes = bytes.saturating_add(matrices_bytes(&unit.matrices, &format)?);
        let measured = measurement.options.iter().position(|o| *o == format).and_then(|o| unit.kl.get(o));
        sensitivity = sensitivity.zip(measured).map(|(sum, s)| sum + s);
    }
    let weights = total_weights(measurement)?;
    Ok(PolicyCost { weights, bytes, bits_per_weight: bits_per_weight(bytes, weights), sensitivity })
}

/// `8 * bytes / weights`.
pub fn bits_per_weight(bytes: u64, weights: u64) -> f64 {
    8.0 * bytes as f64 / weights as f64
}

/// The most bytes that a budget allows, or `None` if it says nothing. Of two limits, the tighter holds.
///
/// # Errors
/// Bits per weight that are not above zero.
pub(crate) fn byte_limit(measurement: &Measurement, budget: &Budget) -> Result<Option<u64>, ModelError> {
    let from_bits = match budget.bits_per_weight {
        None => None,
        Some(bits) if bits.is_finite() && bits > 0.0 => {
            // A hair of tolerance: 4.5 bits of a whole model must admit 4.5 bits in every unit.
            let exact = bits * total_weights(measurement)? as f64 / 8.0;
            Some((exact * (1.0 + 1e-12)) as u64)
        }
        Some(bits) => {
            return Err(ModelError::Value {
                what: "bits per weight of the budget".into(),
                expected: "a number above 0".into(),
                found: bits.to_string(),
            });
        }
    };
    Ok(match (from_bits, budget.bytes) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    })
}
