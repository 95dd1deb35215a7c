//! `checkpoint.json`.
//!
//! Floats are stored by their bits, as `{"$f64": "3fb999999999999a"}`: a JSON library may read the digits of a float as its
//! neighbour, and then a resumed run would not be the same.

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::io::{atomic_write, read_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Identity, TrainState};
use crate::TuneError;

const FORMAT: &str = "edgellm-checkpoint";
const VERSION: u32 = 1;
const FLOAT: &str = "$f64";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: String,
    version: u32,
    pub(super) step: u64,
    pub(super) identity: Identity,
    pub(super) scalars: Map<String, Value>,
}

impl Manifest {
    pub(super) fn new(state: &TrainState, identity: &Identity) -> Result<Self, TuneError> {
        let encoded = state.scalars.iter().map(|(key, value)| Ok((key.clone(), encode(value)?)));
        Ok(Self {
            format: FORMAT.into(),
            version: VERSION,
            step: state.step,
            identity: identity.clone(),
            scalars: encoded.collect::<Result<_, TuneError>>()?,
        })
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), ModelError> {
        let text = serde_json::to_string_pretty(self).map_err(|e| ModelError::Parse {
            path: path.to_owned(),
            what: "scalars".into(),
            reason: e.to_string(),
        })?;
        atomic_write(path, (text + "\n").as_bytes())
    }

    /// The manifest in a file, with its floats.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let parse = |reason: String| ModelError::Parse { path: path.to_owned(), what: "checkpoint".into(), reason };
        let mut manifest: Self = serde_json::from_str(&read_text(path)?).map_err(|e| parse(e.to_string()))?;
        if manifest.format != FORMAT || manifest.version != VERSION {
            let found = format!("{} version {}", manifest.format.escape_debug(), manifest.version);
            return Err(ModelError::Unsupported {
                path: path.to_owned(),
                what: found,
                supported: format!("{FORMAT} version {VERSION}"),
            });
        }
        for value in manifest.scalars.values_mut() {
            decode(value).map_err(parse)?;
        }
        Ok(manifest)
    }
}

/// A value with its floats by their bits.
fn encode(value: &Value) -> Result<Value, TuneError> {
    Ok(match value {
        Value::Number(number) if number.is_f64() => {
            let bits = number.as_f64().map(f64::to_bits).unwrap_or_default();
            Value::Object(Map::from_iter([(FLOAT.to_owned(), Value::String(format!("{bits:016x}")))]))
        }
        Value::Array(values) => Value::Array(values.iter().map(encode).collect::<Result<_, _>>()?),
        Value::Object(map) if map.contains_key(FLOAT) => {
            let (expected, found) = (format!("names other than '{FLOAT}'"), "that name".into());
            return Err(TuneError::Setting { what: "scalars of a checkpoint", expected, found });
        }
        Value::Object(map) => {
            let encoded = map.iter().map(|(key, value)| Ok((key.clone(), encode(value)?)));
            Value::Object(encoded.collect::<Result<_, TuneError>>()?)
        }
        other => other.clone(),
    })
}

/// Puts floats in the place of their bits.
fn decode(value: &mut Value) -> Result<(), String> {
    match value {
        Value::Array(values) => values.iter_mut().try_for_each(decode),
        Value::Object(map) => {
            let Some(bits) = map.get(FLOAT) else { return map.values_mut().try_for_each(decode) };
            let number = bits
                .as_str()
                .and_then(|text| u64::from_str_radix(text, 16).ok())
                .and_then(|bits| serde_json::Number::from_f64(f64::from_bits(bits)));
            *value = Value::Number(number.ok_or_else(|| format!("expected the bits of a float, found {bits}"))?);
            Ok(())
        }
        _ => Ok(()),
    }
}
