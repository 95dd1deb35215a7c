//! Why a policy gives a unit its format: what it costs, and what the next better and the next worse would have done.

use edgellm_model::ModelError;
use edgellm_model::traits::UnitCost;
use edgellm_model::values::{CompressionPolicy, LayerFormat, Measurement, Unit};

use super::costs::{Costs, Resource, amounts};
use super::{Sensitivity, check};

/// Another format for a unit, beside the one that it has.
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbour {
    /// The format.
    pub format: LayerFormat,
    /// Its cost.
    pub cost: UnitCost,
    /// How many more bytes it takes.
    pub bytes: i64,
    /// How many more milliseconds it takes; 0 without a device.
    pub milliseconds: f64,
    /// How much larger the sensitivity is; `None` where that of the chosen format is unknown.
    pub sensitivity: Option<f64>,
}

/// A unit's format, and those beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The unit.
    pub unit: Unit,
    /// Its format.
    pub format: LayerFormat,
    /// What it costs.
    pub cost: UnitCost,
    /// Its sensitivity; `None` if it was not measured.
    pub sensitivity: Option<f64>,
    /// Of the options of less sensitivity, the cheapest; of an unmeasured format, the cheapest that is dearer.
    pub better: Option<Neighbour>,
    /// Of the cheaper options, the one of least sensitivity.
    pub worse: Option<Neighbour>,
}

/// A policy, unit by unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Explained {
    /// What "cheaper" means: the resource that was scarce.
    pub scarce: Resource,
    /// The units, in the measurement's order.
    pub choices: Vec<Choice>,
}

/// Explains a policy; `scarce` says by which resource options are compared.
///
/// # Errors
/// The measurement is broken, or the policy has no format for a unit of it.
pub fn explain(
    measurement: &Measurement,
    policy: &CompressionPolicy,
    costs: &Costs<'_>,
    scarce: Resource,
    sensitivity: Sensitivity,
) -> Result<Explained, ModelError> {
    check(measurement)?;
    let mut choices = Vec::with_capacity(measurement.units.len());
    for (index, measured) in measurement.units.iter().enumerate() {
        let format = policy.format_of(measured.unit).ok_or_else(|| ModelError::Value {
            what: "policy".into(),
            expected: format!("a format for {}", measured.unit),
            found: "none".into(),
        })?;
        let damages = sensitivity.of(measured);
        let cost = costs.unit(index, &format)?;
        let now = measurement.options.iter().position(|o| *o == format).map(|o| damages[o]);
        let spent = |cost: &UnitCost| amounts(cost)[scarce as usize];
        let mut options = Vec::with_capacity(damages.len());
        for (option, &damage) in measurement.options.iter().zip(damages) {
            options.push((*option, costs.unit(index, option)?, damage));
        }
        let neighbour = |&(format, other, damage): &(LayerFormat, UnitCost, f64)| Neighbour {
            format,
            cost: other,
            bytes: other.bytes as i64 - cost.bytes as i64,
            milliseconds: other.milliseconds - cost.milliseconds,
            sensitivity: now.map(|now| damage - now),
        };
        let is_better = |(_, other, damage): &&(LayerFormat, UnitCost, f64)| match now {
            Some(now) => *damage < now,
            None => spent(other) > spent(&cost),
        };
        let better = options
            .iter()
            .filter(is_better)
            .min_by(|a, b| spent(&a.1).cmp(&spent(&b.1)).then(a.2.total_cmp(&b.2)))
            .map(neighbour);
        let worse = options
            .iter()
            .filter(|(_, other, _)| spent(other) < spent(&cost))
            .min_by(|a, b| a.2.total_cmp(&b.2).then(spent(&a.1).cmp(&spent(&b.1))))
            .map(neighbour);
        choices.push(Choice { unit: measured.unit, format, cost, sensitivity: now, better, worse });
    }
    Ok(Explained { scarce, choices })
}
