//! Reading and writing values as TOML (`.toml`) or JSON (anything else), by atomic replacement.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ModelError;
use crate::io::atomic_write;

/// A value with a versioned file format.
pub trait Value: Serialize + DeserializeOwned {
    /// What it is, for messages.
    const KIND: &'static str;
    /// The newest version that this build reads and the one it writes.
    const VERSION: u32;
    /// The version that this value carries.
    fn format_version(&self) -> u32;
}

fn is_toml(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"))
}

/// Reads a value from a TOML or JSON file.
///
/// # Errors
/// The file cannot be read, is no value of this kind, or has a version that this build does not know.
pub fn read_value<V: Value>(path: &Path) -> Result<V, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))?;
    let parsed: Result<V, String> = if is_toml(path) {
        toml::from_str(&text).map_err(|e| e.to_string())
    } else {
        serde_json::from_str(&text).map_err(|e| e.to_string())
    };
    let value = parsed.map_err(|reason| ModelError::Parse {
        path: path.to_path_buf(),
        what: V::KIND.into(),
        reason: reason.trim().replace('\n', " "),
    })?;
    if value.format_version() != V::VERSION {
        return Err(ModelError::Parse {
            path: path.to_path_buf(),
            what: V::KIND.into(),
            reason: format!("format_version: expected {}, found {}", V::VERSION, value.format_version()),
        });
    }
    Ok(value)
}

/// Writes a value as TOML or JSON, by the path's extension; the old file stays whole until the new one is.
///
/// # Errors
/// The file cannot be written.
pub fn write_value<V: Value>(path: &Path, value: &V) -> Result<(), ModelError> {
    let text = if is_toml(path) {
        toml::to_string_pretty(value).map_err(|e| e.to_string())
    } else {
        serde_json::to_string_pretty(value).map(|t| t + "\n").map_err(|e| e.to_string())
    };
    let text = text.map_err(|reason| ModelError::Parse { path: path.to_path_buf(), what: V::KIND.into(), reason })?;
    atomic_write(path, text.as_bytes())
}
