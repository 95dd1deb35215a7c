//! Policy solvers: from a [`Measurement`] and a [`Budget`] to one format per unit.
//!
//! Solvers are values without state: the same measurement and budget give the same policy, byte for byte. Units keep
//! the order of the measurement.

mod costs;
mod dual;
mod explain;
mod knapsack;
mod paper;
mod solve;
mod uniform;

pub use costs::{Costs, DecodeDevice, Resource, decoder_shape};
pub use explain::{Choice, Explained, Neighbour, explain};
pub use knapsack::{Item, Selection, select};
pub use paper::{Paper, allocate_sparsity};
pub use solve::{Solution, Solve};
pub use uniform::Uniform;

use edgellm_model::ModelError;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement, UnitMeasurement, UnitPolicy, Value};

use crate::cost::total_weights;
use crate::digest::measurement_digest;

/// The options that a measurement tries: asymmetric formats of every bit width (16 and 32 are the floats f16 and f32)
/// and group size, then for every sparsity an f32 model that is only pruned (what the `paper` policy's pruning needs).
///
/// # Errors
/// A width, group size or sparsity that does not exist.
pub fn option_grid(bit_widths: &[u8], group_sizes: &[u16], sparsities: &[f64]) -> Result<Vec<LayerFormat>, ModelError> {
    let mut options = Vec::new();
    for &bits in bit_widths {
        if bits >= 16 {
            options.push(LayerFormat::float(bits));
        } else {
            options.extend(group_sizes.iter().map(|&group| LayerFormat::quantized(bits, group, false)));
        }
    }
    options.extend(sparsities.iter().map(|&p| LayerFormat::float(32).with_sparsity(p)));
    for option in &options {
        option.packed()?;
    }
    for (i, option) in options.iter().enumerate() {
        let known = matches!(option.bit_width, 2..=6 | 8 | 16 | 32);
        if !known || options[..i].contains(option) {
            return Err(ModelError::Value {
                what: "formats to measure".into(),
                expected: "bit widths 2, 3, 4, 5, 6, 8, 16 or 32, each once".into(),
                found: option.to_string(),
            });
        }
    }
    Ok(options)
}

/// Which of the measured sensitivities a solver looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sensitivity {
    /// End to end: the divergence of the next-token distributions.
    Kl,
    /// Local: the relative error of the unit's output (the paper's).
    Local,
}

impl Sensitivity {
    /// A unit's sensitivities, one for each option.
    pub fn of(self, unit: &UnitMeasurement) -> &[f64] {
        match self {
            Sensitivity::Kl => &unit.kl,
            Sensitivity::Local => &unit.local,
        }
    }
}

/// Checks what a file could get wrong.
fn check(measurement: &Measurement) -> Result<(), ModelError> {
    let bad =
        |what: String, expected: &str, found: String| Err(ModelError::Value { what, expected: expected.into(), found });
    if measurement.options.is_empty() || measurement.units.is_empty() {
        let found = format!("{} options, {} units", measurement.options.len(), measurement.units.len());
        return bad("measurement".into(), "at least one option and one unit", found);
    }
    for option in &measurement.options {
        option.packed()?;
    }
    for unit in &measurement.units {
        let what = format!("sensitivities of {}", unit.unit);
        for sensitivity in [&unit.local, &unit.kl] {
            if sensitivity.len() != measurement.options.len() {
                let found = format!("{} for {} options", sensitivity.len(), measurement.options.len());
                return bad(what, "one per option", found);
            }
            if let Some(s) = sensitivity.iter().find(|s| !s.is_finite() || **s < 0.0) {
                return bad(what, "finite numbers that are not negative", s.to_string());
            }
        }
        if unit.matrices.iter().any(|m| m.rows == 0 || m.cols == 0) || unit.matrices.is_empty() {
            return bad(format!("matrices of {}", unit.unit), "at least one, none of them empty", "otherwise".into());
        }
    }
    total_weights(measurement).map(|_| ())
}

/// The policy that gives unit `i` the format `formats[i]`.
pub(crate) fn policy(
    solver: &str,
    measurement: &Measurement,
    budget: &Budget,
    formats: &[LayerFormat],
) -> CompressionPolicy {
    let units = measurement.units.iter().zip(formats);
    CompressionPolicy {
        format_version: CompressionPolicy::VERSION,
        solver: solver.into(),
        granularity: measurement.granularity,
        seed: 0,
        measurement_digest: Some(measurement_digest(measurement)),
        model_digest: Some(measurement.model_digest.clone()).filter(|digest| !digest.is_empty()),
        compressor: Some(measurement.compressor.clone()).filter(|name| !name.is_empty()),
        budget: *budget,
        units: units.map(|(u, &format)| UnitPolicy { unit: u.unit, format }).collect(),
    }
}

/// A solver that needs a budget was given none.
fn no_budget(solver: &str, instead: &str) -> ModelError {
    ModelError::Value {
        what: format!("budget of the policy '{solver}'"),
        expected: format!("bits per weight, bytes, milliseconds or memory{instead}"),
        found: "none of them".into(),
    }
}
