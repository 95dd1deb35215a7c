//! A compression policy: one format for every unit of a model.

use serde::{Deserialize, Serialize};

use super::{Granularity, LayerFormat, Unit, Value};
use crate::ModelError;

/// What a policy may spend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Mean bits per weight over all units, scales included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// Bytes of all packed units, scales included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Milliseconds to decode a token, all of the model included, as a cost model predicts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milliseconds: Option<f64>,
    /// Bytes of memory while tokens are decoded: weights as they are run, cache and buffers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

impl Budget {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it has a limit that only a cost model can tell the cost for.
    pub fn needs_device(&self) -> bool {
        self.milliseconds.is_some() || self.peak_bytes.is_some()
    }
}

/// The format chosen for one unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitPolicy {
    /// The unit.
    pub unit: Unit,
    /// Its format.
    #[serde(flatten)]
    pub format: LayerFormat,
}

/// One format for every unit of a model, with where it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompressionPolicy {
    /// Version of this file format.
    pub format_version: u32,
    /// The solver that made it: `uniform`, `paper`, `solve`, or `manual`.
    pub solver: String,
    /// Blocks or single projections.
    pub granularity: Granularity,
    /// The seed that the solver used.
    pub seed: u64,
    /// SHA-256 of the measurement that it was computed from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurement_digest: Option<String>,
    /// SHA-256 of the weights of the model that was measured, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// The compressor that was measured, such as `gptq`, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressor: Option<String>,
    /// What it was allowed to spend.
    #[serde(default)]
    pub budget: Budget,
    /// Every unit once.
    pub units: Vec<UnitPolicy>,
}

impl Value for CompressionPolicy {
    const KIND: &'static str = "compression policy";
    const VERSION: u32 = 1;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}

impl CompressionPolicy {
    /// The format of the unit that holds projection or embedding `unit`: its own entry, or its block's.
    pub fn format_of(&self, unit: Unit) -> Option<LayerFormat> {
        let find = |wanted: Unit| self.units.iter().find(|u| u.unit == wanted).map(|u| u.format);
        find(unit).or(match unit {
            Unit::Linear(block, _) => find(Unit::Block(block)),
            Unit::Head => find(Unit::Embedding),
            Unit::Embedding | Unit::Block(_) => None,
        })
    }

    /// Checks that no unit is named twice and that every format exists.
    ///
    /// # Errors
    /// The first unit that is wrong.
    pub fn validate(&self) -> Result<(), ModelError> {
        let mut seen = std::collections::BTreeSet::new();
        for unit in &self.units {
            if !seen.insert(unit.unit) {
                return Err(ModelError::Value {
                    what: format!("policy unit {}", unit.unit),
                    expected: "every unit once".into(),
                    found: "the unit twice".into(),
                });
            }
            unit.format.packed()?;
        }
        Ok(())
    }
}
