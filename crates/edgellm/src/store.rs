//! The local store: where pulled models lie, and how a name on the command line becomes a path.
//!
//! `<root>/models/<name>/` holds one model: a Hugging Face directory, or a folder with one GGUF file. Models of the
//! Hugging Face Hub stay in the Hub's own cache (`<HF_HOME>/hub`), which other programs share.

use std::fs;
use std::path::{Path, PathBuf};

use edgellm_model::ModelError;

use crate::EdgeError;
use crate::pull::PINNED;

/// Where pulled models lie.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    hub_cache: Option<PathBuf>,
}

impl Store {
    /// A store under `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), hub_cache: None }
    }

    /// The same store, which also looks for `owner/name` in a Hugging Face cache (the folder `hub` below HF_HOME).
    #[must_use]
    pub fn with_hub_cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.hub_cache = Some(cache.into());
        self
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of model `name`, which need not exist.
    ///
    /// # Errors
    /// The name is empty, hidden, or holds anything but letters, digits, `.`, `_` and `-`.
    pub fn model_dir(&self, name: &str) -> Result<PathBuf, EdgeError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(EdgeError::ModelName {
                expected: "letters, digits, '.', '_' and '-', not starting with '.'".into(),
                found: name.escape_debug().to_string(),
            });
        }
        Ok(self.root.join("models").join(name))
    }

    /// The names of the stored models, sorted.
    ///
    /// # Errors
    /// The store's folder exists and cannot be read.
    pub fn names(&self) -> Result<Vec<String>, EdgeError> {
        let folder = self.root.join("models");
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(ModelError::io(&folder, e).into()),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| ModelError::io(&folder, e))?;
            if let Some(name) = entry.file_name().to_str()
                && self.stored(name).is_some()
            {
                names.push(name.to_string());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The path of a model: `name` itself if it is a path that exists, else the stored model of that name, else the
    /// snapshot of that Hugging Face id in the Hub's cache.
    ///
    /// # Errors
    /// There is no such model; the message says what is stored and what can be pulled.
    pub fn resolve(&self, name: &str) -> Result<PathBuf, EdgeError> {
        let path = Path::new(name);
        if path.exists() {
            return Ok(path.to_path_buf());
        }
        if let Some(found) = self.stored(name).or_else(|| self.cached(name)) {
            return Ok(found);
        }
        let known = PINNED.iter().any(|model| model.name == name) || is_hub_id(name);
        let stored = self.names()?;
        let hint = if known {
            format!("run `edgellm pull {name}` first")
        } else if stored.is_empty() {
            format!("nothing is stored yet, `edgellm pull {}` fetches a small model", PINNED[0].name)
        } else {
            format!("stored: {}", stored.join(", "))
        };
        Err(EdgeError::UnknownModel { name: name.escape_debug().to_string(), hint })
    }

    /// The stored model `name`, if it is there.
    fn stored(&self, name: &str) -> Option<PathBuf> {
        let dir = self.model_dir(name).ok()?;
        if dir.join("config.json").is_file() {
            return Some(dir);
        }
        let mut gguf: Vec<PathBuf> = fs::read_dir(&dir).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        gguf.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
        match gguf.as_slice() {
            [only] => Some(only.clone()),
            _ => None,
        }
    }

    /// The snapshot of a Hub model, by the cache's layout `models--owner--name/{refs,snapshots}`.
    fn cached(&self, id: &str) -> Option<PathBuf> {
        let cache = self.hub_cache.as_ref().filter(|_| is_hub_id(id))?;
        let repo = cache.join(format!("models--{}", id.replace('/', "--")));
        let commit = fs::read_to_string(repo.join("refs").join("main")).ok()?;
        let commit = commit.trim();
        if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
            return None;
        }
        let snapshot = repo.join("snapshots").join(commit);
        snapshot.join("config.json").exists().then_some(snapshot)
    }
}

/// Whether `name` has the form of a Hugging Face id, `owner/name`.
pub fn is_hub_id(name: &str) -> bool {
    let part = |s: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !s.is_empty() && !s.starts_with('.') && !s.contains("..") && s.len() <= 96 && s.chars().all(plain)
    };
    matches!(name.split_once('/'), Some((owner, repo)) if part(owner) && part(repo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path()).with_hub_cache(root.path().join("hub"));
        assert!(store.names().unwrap().is_empty());
        let error = store.resolve("smollm2-135m-instruct").unwrap_err().to_string();
        assert!(error.contains("edgellm pull smollm2-135m-instruct"), "{error}");

        let dir = store.model_dir("tiny").unwrap();
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("tiny.gguf"), b"").unwrap();
        assert_eq!(store.resolve("tiny").unwrap(), dir.join("tiny.gguf"));
        fs::write(dir.join("config.json"), b"{}").unwrap();
        assert_eq!(store.resolve("tiny").unwrap(), dir);
        assert_eq!(store.names().unwrap(), ["tiny"]);
        assert!(store.resolve("other").unwrap_err().to_string().contains("stored: tiny"));

        let here = root.path().join("x");
        fs::write(&here, b"").unwrap();
        assert_eq!(store.resolve(here.to_str().unwrap()).unwrap(), here);
    }

    #[test]
    fn hub_models_are_found_in_the_cache() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path()).with_hub_cache(root.path().join("hub"));
        assert!(store.resolve("me/tiny").unwrap_err().to_string().contains("edgellm pull me/tiny"));
        let repo = root.path().join("hub/models--me--tiny");
        let snapshot = repo.join("snapshots/abc123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::write(repo.join("refs/main"), "abc123").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(store.resolve("me/tiny").unwrap(), snapshot);
        fs::write(repo.join("refs/main"), "../../..").unwrap();
        assert!(store.resolve("me/tiny").is_err());
    }

    #[test]
    fn names_stay_inside_the_store() {
        let store = Store::new("/nowhere");
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "a b", "ä"] {
            assert!(store.model_dir(bad).is_err(), "{bad}");
        }
        assert!(is_hub_id("HuggingFaceTB/SmolLM2-135M"));
        for bad in ["a", "a/b/c", "/b", "a/", "../b", "a/..", "a b/c"] {
            assert!(!is_hub_id(bad), "{bad}");
        }
    }
}
