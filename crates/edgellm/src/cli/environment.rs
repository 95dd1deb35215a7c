//! The environment, read here and nowhere else: where the store is, and how the Hub is reached.

use std::env;
use std::path::PathBuf;

use edgellm::store::Store;

use super::failure::Usage;

/// The store: `EDGELLM_HOME`, or `edgellm` in the platform's folder for data; with the Hub's cache.
pub(crate) fn store() -> anyhow::Result<Store> {
    let root = match folder("EDGELLM_HOME") {
        Some(root) => root,
        None => data_folder().ok_or_else(|| {
            Usage("there is no home folder to keep models in; set EDGELLM_HOME to a folder".to_string())
        })?,
    };
    let store = Store::new(root);
    Ok(match hub_cache() {
        Some(cache) => store.with_hub_cache(cache),
        None => store,
    })
}

/// The Hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `huggingface` in the user's cache folder.
pub(crate) fn hub_cache() -> Option<PathBuf> {
    if let Some(cache) = folder("HF_HUB_CACHE") {
        return Some(cache);
    }
    let home = folder("HF_HOME").or_else(|| {
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))?;
        Some(cache.join("huggingface"))
    })?;
    Some(home.join("hub"))
}

/// A variable that is set and not empty, as text.
#[cfg(feature = "hub")]
pub(crate) fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a variable says yes, as huggingface_hub reads it.
#[cfg(feature = "hub")]
pub(crate) fn flag(name: &str) -> bool {
    text(name).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}

fn folder(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn data_folder() -> Option<PathBuf> {
    if cfg!(target_os = "windows") {
        return Some(folder("LOCALAPPDATA")?.join("edgellm"));
    }
    if cfg!(target_vendor = "apple") {
        return Some(env::home_dir()?.join("Library/Application Support/edgellm"));
    }
    let data = folder("XDG_DATA_HOME").or_else(|| Some(env::home_dir()?.join(".local/share")))?;
    Some(data.join("edgellm"))
}

/// The program that is running.
pub(crate) fn this_command() -> anyhow::Result<PathBuf> {
    env::current_exe().map_err(|e| anyhow::anyhow!("the system does not tell where this program is: {e}"))
}
