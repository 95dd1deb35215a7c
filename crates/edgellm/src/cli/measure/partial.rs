//! What a measurement that was stopped had measured: a file beside the result, `<output>.partial`, rewritten after every
//! unit, so that the next run goes on where the last one was.

use std::path::{Path, PathBuf};

use edgellm::luc::{LucError, Trials, calibration_digest};
use edgellm::model::io::atomic_write;
use edgellm::model::values::{Granularity, UnitMeasurement};
use serde::{Deserialize, Serialize};

use super::super::Context;

/// Everything that must be the same for units to be taken over.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Conditions {
    model_digest: String,
    calibration_digest: String,
    compressor: String,
    granularity: Granularity,
    options: Vec<String>,
    compared: [usize; 2],
    program: String,
}

#[derive(Serialize, Deserialize)]
struct File {
    conditions: Conditions,
    units: Vec<UnitMeasurement>,
}

/// The file, and what it must agree with.
pub(super) struct Partial {
    path: PathBuf,
    conditions: Conditions,
}

impl Partial {
    pub(super) fn new(output: &Path, trials: &Trials<'_>, model_digest: String) -> Self {
        let mut path = output.as_os_str().to_owned();
        path.push(".partial");
        let conditions = Conditions {
            model_digest,
            calibration_digest: calibration_digest(trials.calibration),
            compressor: trials.compressor.name().into(),
            granularity: trials.granularity,
            options: trials.options.iter().map(ToString::to_string).collect(),
            compared: [trials.compared_windows, trials.compared_length],
            program: env!("CARGO_PKG_VERSION").into(),
        };
        Self { path: path.into(), conditions }
    }

    pub(super) fn model_digest(&self) -> &str {
        &self.conditions.model_digest
    }

    /// The units that an earlier run measured under the same conditions.
    pub(super) fn read(&self, ctx: &Context) -> anyhow::Result<Vec<UnitMeasurement>> {
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => anyhow::bail!("{}: cannot be read: {error}", self.path.display()),
        };
        match serde_json::from_slice::<File>(&text) {
            Ok(file) if file.conditions == self.conditions => {
                ctx.say(&format!("going on after {} units of {}", file.units.len(), self.path.display()));
                Ok(file.units)
            }
            _ => {
                ctx.say(&format!("note: {} is of other conditions, and is begun anew", self.path.display()));
                Ok(Vec::new())
            }
        }
    }

    pub(super) fn write(&self, units: &[UnitMeasurement]) -> Result<(), LucError> {
        let file = File { conditions: self.conditions.clone(), units: units.to_vec() };
        // Plain numbers and strings: there is nothing in them that JSON cannot hold.
        let json = serde_json::to_vec(&file).expect("a measurement is JSON");
        Ok(atomic_write(&self.path, &json)?)
    }

    /// The measurement is complete.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
