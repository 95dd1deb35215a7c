//! Sensitivities of a model's units, measured once and reused for every budget.

use serde::{Deserialize, Serialize};

use super::{Granularity, LayerFormat, MatrixShape, Unit, Value};

/// The measured sensitivities of one unit, a number for each option of [`Measurement::options`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnitMeasurement {
    /// The unit.
    pub unit: Unit,
    /// Its weight matrices.
    pub matrices: Vec<MatrixShape>,
    /// Local: `MSE(f_o(x), f(x)) / Var(f(x))` of the unit's output on the uncompressed model's input.
    pub local: Vec<f64>,
    /// End to end: the mean over tokens of `KL(p || p_o)`, in nats, between the next-token distributions of the model and
    /// of the same model with only this unit compressed.
    pub kl: Vec<f64>,
}

/// Sensitivities of every unit for every option, on one calibration text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Version of this file format.
    pub format_version: u32,
    /// The model's name, as its files give it.
    pub model: String,
    /// SHA-256 of the model's weights; empty if they came from no file.
    pub model_digest: String,
    /// The compressor that the options were tried with, such as `gptq`.
    pub compressor: String,
    /// Blocks or single projections.
    pub granularity: Granularity,
    /// Calibration tokens, which compressors learn the inputs' moments from.
    pub calibration_tokens: usize,
    /// Those of them that outputs were compared on.
    pub compared_tokens: usize,
    /// SHA-256 of the calibration token ids.
    pub calibration_digest: String,
    /// The formats that were tried.
    pub options: Vec<LayerFormat>,
    /// Every unit of the model once, in order.
    pub units: Vec<UnitMeasurement>,
}

impl Value for Measurement {
    const KIND: &'static str = "measurement";
    const VERSION: u32 = 2;

    fn format_version(&self) -> u32 {
        self.format_version
    }
}
