//! Downloading a model from the Hugging Face Hub, or a server with the same interface.
//!
//! What is fetched: configuration, tokenizer, chat template, and the safetensors weights, into the Hub's own cache
//! layout (`models--owner--name/{blobs,refs,snapshots}`), which other programs share. Nothing is read from the
//! environment: the caller gives endpoint, cache and token.

use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use crate::error::{ModelError, Result, Shown};
use crate::io::read_text;

/// Files that a model cannot do without, weights aside.
const REQUIRED: &[&str] = &["config.json", "tokenizer.json"];
/// Files that are fetched if they are there.
const OPTIONAL: &[&str] =
    &["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where and how to download.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// The server, such as `https://huggingface.co`.
    pub endpoint: String,
    /// The Hub's cache.
    pub cache_dir: PathBuf,
    /// An access token, for private and gated models.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubOptions {
    /// The public server's main branch, with a cache at `cache_dir`.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: "https://huggingface.co".into(),
            cache_dir: cache_dir.into(),
            token: None,
            offline: false,
            revision: "main".into(),
        }
    }
}

/// How far a file's download is.
#[derive(Debug, Clone, Copy)]
pub struct HubProgress<'a> {
    /// The file.
    pub file: &'a str,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes of the file.
    pub total: u64,
}

/// Downloads a model, or finds it in the cache; returns its directory, which
/// [`ModelFiles::open`](crate::files::ModelFiles::open) opens. An interrupted download is continued by the next one.
///
/// # Errors
/// The id is none, the server does not answer or has no such model, the model has no safetensors weights or no
/// `tokenizer.json`, or the cache cannot be written; offline, a file is not in the cache.
pub fn download(repo_id: &str, options: &HubOptions, on_progress: &mut dyn FnMut(HubProgress<'_>)) -> Result<PathBuf> {
    check_id(repo_id)?;
    let repo = Repo::with_revision(repo_id.to_owned(), RepoType::Model, options.revision.clone());
    let mut fetch =
        Fetch { repo_id, cached: Cache::new(options.cache_dir.clone()).repo(repo.clone()), server: None, on_progress };
    let listed = if options.offline {
        None
    } else {
        let builder = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()));
        let builder = builder.with_endpoint(options.endpoint.trim_end_matches('/').to_owned());
        let api = builder.with_token(options.token.clone()).with_progress(false).with_retries(3).build();
        let server = api.map_err(|e| fetch.error("connection", e))?.repo(repo);
        let info = server.info().map_err(|e| fetch.error("list of files", e))?;
        fetch.server = Some(server);
        Some(info.siblings.into_iter().map(|file| file.rfilename).collect::<Vec<_>>())
    };
    let is_there = |fetch: &Fetch<'_>, name: &str| match &listed {
        Some(names) => names.iter().any(|n| n == name),
        None => fetch.cached.get(name).is_some(),
    };
    let config = fetch.file(REQUIRED[0])?;
    for name in &REQUIRED[1..] {
        fetch.file(name)?;
    }
    for name in OPTIONAL {
        if is_there(&fetch, name) {
            fetch.file(name)?;
        }
    }
    if is_there(&fetch, SINGLE) {
        fetch.file(SINGLE)?;
    } else if is_there(&fetch, INDEX) {
        let index = fetch.file(INDEX)?;
        for shard in shards(&index)? {
            fetch.file(&shard)?;
        }
    } else {
        return Err(fetch.reason("weights", format!("neither {SINGLE} nor {INDEX} is there")));
    }
    let dir = config.parent().unwrap_or(Path::new("."));
    Ok(dir.to_owned())
}

struct Fetch<'a> {
    repo_id: &'a str,
    cached: hf_hub::CacheRepo,
    /// None when offline.
    server: Option<ApiRepo>,
    on_progress: &'a mut dyn FnMut(HubProgress<'_>),
}

impl Fetch<'_> {
    /// A file from the cache, or else from the server.
    fn file(&mut self, name: &str) -> Result<PathBuf> {
        if let Some(path) = self.cached.get(name) {
            return Ok(path);
        }
        let Some(server) = &self.server else {
            return Err(self.reason(name, "not in the cache, and downloads are switched off".into()));
        };
        let report = Report { name, done: 0, total: 0, on_progress: &mut *self.on_progress };
        let downloaded = server.download_with_progress(name, report);
        downloaded.map_err(|e| self.error(name, e))
    }

    fn error(&self, what: &str, error: ApiError) -> ModelError {
        self.reason(what, error.to_string())
    }

    fn reason(&self, what: &str, reason: String) -> ModelError {
        let (what, reason) = (Shown(what).to_string(), Shown(&reason).to_string());
        ModelError::Hub { repo: self.repo_id.to_owned(), what, reason }
    }
}

struct Report<'a> {
    name: &'a str,
    done: u64,
    total: u64,
    on_progress: &'a mut dyn FnMut(HubProgress<'_>),
}

impl Report<'_> {
    fn report(&mut self) {
        (self.on_progress)(HubProgress { file: self.name, done: self.done, total: self.total });
    }
}

impl Progress for Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size as u64);
        self.report();
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.report();
    }

    fn finish(&mut self) {
        self.done = self.total;
        self.report();
    }
}

/// `name` or `owner/name`, of the characters that the Hub allows; it becomes a folder's name.
fn check_id(repo_id: &str) -> Result<()> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    if repo_id.len() <= 96 && repo_id.split('/').count() <= 2 && repo_id.split('/').all(part) {
        return Ok(());
    }
    Err(ModelError::Value {
        what: "Hugging Face id".into(),
        expected: "owner/name".into(),
        found: format!("'{}'", Shown(repo_id)),
    })
}

/// The files that an index names, each once. A name is a plain file's: it becomes a path in the cache.
fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let parsed: Index = serde_json::from_str(&read_text(index)?).map_err(|e| {
        ModelError::format(index, "shard index", "a JSON object with a 'weight_map'", Shown(&e.to_string()))
    })?;
    let names: std::collections::BTreeSet<String> = parsed.weight_map.into_values().collect();
    for name in &names {
        if !name.ends_with(".safetensors") || name.starts_with('.') || name.contains(['/', '\\']) {
            let found = format!("'{}'", Shown(name));
            return Err(ModelError::format(index, "shard name", "a safetensors file's name without a folder", found));
        }
    }
    Ok(names.into_iter().collect())
}

#[cfg(test)]
mod tests;
