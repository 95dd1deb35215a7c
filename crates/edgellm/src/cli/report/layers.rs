//! Layers of models and measurements, joined where a model was compressed by a policy that came from a measurement.

use edgellm::eval::Layer;
use edgellm::model::files::ModelFiles;
use edgellm::model::values::{CompressionPolicy, Measurement, Unit};

use crate::cli::inspect::layers::units;

/// The width, in bits, at which a measurement is shown that no model was made from: one at which layers differ.
const SHOWN_BITS: f64 = 3.0;

/// Models and measurements, by name.
#[derive(Default)]
pub(super) struct Found {
    pub(super) models: Vec<(String, ModelFiles)>,
    pub(super) measurements: Vec<(String, Measurement)>,
}

impl Found {
    /// Bits of every model, with what its formats cost where one of the measurements says it; then the measurements that say
    /// nothing of these models. A model that cannot be read goes to `failed`.
    pub(super) fn layers(&self, failed: &mut dyn FnMut(anyhow::Error)) -> Vec<(String, Vec<Layer>)> {
        let mut used = vec![false; self.measurements.len()];
        let mut out = Vec::new();
        for (name, files) in &self.models {
            let mut layers = match units(files) {
                Ok(layers) => layers,
                Err(error) => {
                    failed(error);
                    continue;
                }
            };
            if let Some(policy) = files.quantization().and_then(|q| q.policy.as_ref()) {
                let of_model = |(_, m): &(String, Measurement)| is_of(m, policy);
                if let Some(at) = self.measurements.iter().position(of_model) {
                    add_costs(&mut layers, &self.measurements[at].1, policy);
                    used[at] = true;
                }
            }
            out.push((name.clone(), layers));
        }
        let unused = self.measurements.iter().zip(used).filter(|(_, used)| !used);
        out.extend(unused.filter_map(|((name, measurement), _)| measured(name, measurement)));
        out
    }
}

/// Whether a policy is of the model that was measured.
fn is_of(measurement: &Measurement, policy: &CompressionPolicy) -> bool {
    let known = policy.model_digest.as_ref().filter(|digest| !digest.is_empty());
    known == Some(&measurement.model_digest) && policy.granularity == measurement.granularity
}

/// The layer of a report that a unit belongs to.
fn layer_of(unit: Unit) -> String {
    match unit {
        Unit::Linear(block, _) => Unit::Block(block).to_string(),
        unit => unit.to_string(),
    }
}

/// What the policy's formats cost; of a block of several units, their sum.
fn add_costs(layers: &mut [Layer], measurement: &Measurement, policy: &CompressionPolicy) {
    for measured in &measurement.units {
        let option = policy.format_of(measured.unit).and_then(|f| measurement.options.iter().position(|o| *o == f));
        let cost = option.and_then(|option| measured.kl.get(option));
        let name = layer_of(measured.unit);
        if let (Some(cost), Some(layer)) = (cost, layers.iter_mut().find(|layer| layer.name == name)) {
            layer.sensitivity = Some(layer.sensitivity.unwrap_or(0.0) + cost);
        }
    }
}

/// What each unit of a measurement costs in the option that is nearest to [`SHOWN_BITS`]; the name says which.
fn measured(name: &str, measurement: &Measurement) -> Option<(String, Vec<Layer>)> {
    let width = |option: usize| (f64::from(measurement.options[option].bit_width) - SHOWN_BITS).abs();
    let shown = (0..measurement.options.len()).min_by(|&a, &b| width(a).total_cmp(&width(b)))?;
    let layers = measurement.units.iter().map(|unit| Layer {
        name: unit.unit.to_string(),
        sensitivity: unit.kl.get(shown).copied(),
        ..Layer::default()
    });
    Some((format!("{name}, at {}", measurement.options[shown]), layers.collect()))
}
