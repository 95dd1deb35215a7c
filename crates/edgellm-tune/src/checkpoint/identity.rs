//! Which run a checkpoint belongs to.

use std::path::Path;

use edgellm_model::ModelError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::TuneError;

/// What must be the same for a run to go on: each a digest or a JSON object of the caller. Of JSON objects, the message of a
/// refusal names the fields that differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Settings that change what is computed.
    pub settings: String,
    /// Training data.
    pub data: String,
    /// Base model.
    pub model: String,
}

impl Identity {
    /// Compares the identity in a checkpoint (`self`) with that of the run that wants to go on.
    pub(super) fn check(&self, checkpoint: &Path, run: &Identity) -> Result<(), TuneError> {
        let parts = [
            ("settings", &self.settings, &run.settings),
            ("data", &self.data, &run.data),
            ("model", &self.model, &run.model),
        ];
        let differing: Vec<_> = parts.into_iter().filter(|(_, theirs, mine)| theirs != mine).collect();
        if differing.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = differing.iter().map(|(name, ..)| *name).collect();
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        for (name, theirs, mine) in differing {
            for (field, theirs, mine) in differences(name, theirs, mine) {
                expected.push(format!("{field} {mine}"));
                found.push(format!("{field} {theirs}"));
            }
        }
        Err(TuneError::Model(ModelError::Format {
            path: checkpoint.to_owned(),
            what: format!("this checkpoint is of a run with other {}", names.join(" and ")),
            expected: expected.join(", "),
            found: format!("{}; use the same or choose another folder", found.join(", ")),
        }))
    }
}

/// What differs between two texts: fields, if both are JSON objects. Name, theirs, mine.
fn differences(name: &str, theirs: &str, mine: &str) -> Vec<(String, String, String)> {
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    let whole = || vec![(name.to_owned(), shown(theirs), shown(mine))];
    let (Some(a), Some(b)) = (object(theirs), object(mine)) else { return whole() };
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    let text = |value: Option<&Value>| value.map_or_else(|| "none".into(), |value| shown(&value.to_string()));
    let fields: Vec<_> = keys
        .into_iter()
        .filter(|key| a.get(*key) != b.get(*key))
        .map(|key| (shown(key), text(a.get(key)), text(b.get(key))))
        .collect();
    // The same fields in another order or spacing.
    if fields.is_empty() { whole() } else { fields }
}

/// A text from a file, short and without control characters.
fn shown(text: &str) -> String {
    const MOST: usize = 64;
    let short: String = text.chars().take(MOST).collect();
    let dots = if text.chars().nth(MOST).is_some() { "..." } else { "" };
    format!("{}{dots}", short.escape_debug().to_string().replace("\\\"", "\""))
}
