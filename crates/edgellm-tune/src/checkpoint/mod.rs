//! Checkpoints of a training run that survive a kill, a crash of the system and a full disk at any moment.
//!
//! A checkpoint is a folder `step-00000123` with three files: `state.safetensors` (all buffers, each a list),
//! `checkpoint.json` (format, step, identity of the run, scalars) and `SHA256SUMS` (digests of both; `sha256sum -c` checks
//! them). It is written under a hidden temporary name, synced file by file, and renamed; then the folder above is synced
//! and older checkpoints are removed. So under a name `step-...` there is a complete checkpoint or, after a fault of the
//! disk, one whose digests do not fit, which [`CheckpointStore::latest`] passes over.

mod buffer;
mod folder;
mod identity;
mod manifest;
mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use edgellm_model::ModelError;
use edgellm_model::io::AtomicDir;
use serde_json::{Map, Value};

pub use buffer::{Buffer, NamedBuffer};
pub use identity::Identity;

use crate::TuneError;
use manifest::Manifest;

/// All that a run needs to go on as if it had never been interrupted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Parameters, optimizer state and whatever else is large, by name.
    pub tensors: BTreeMap<String, Buffer>,
    /// Small values: place in the data, state of schedules, counters. Floats come back bit for bit.
    pub scalars: Map<String, Value>,
}

/// A checkpoint that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it, in one sentence.
    pub reason: String,
}

/// The folder in which one run keeps its checkpoints. One process at a time may use it.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep: usize,
}

impl CheckpointStore {
    /// Checkpoints kept where nothing else is asked for.
    pub const KEEP: usize = 2;

    /// The store in `dir`, which need not exist, that keeps the last `keep` checkpoints. Reads and writes nothing yet.
    ///
    /// # Errors
    /// `keep` is 0.
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Result<Self, TuneError> {
        if keep == 0 {
            let (expected, found) = ("at least 1".into(), "0".into());
            return Err(TuneError::Setting { what: "number of checkpoints to keep", expected, found });
        }
        Ok(Self { dir: dir.into(), keep })
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a checkpoint and, when it is in its place, removes those that are no longer kept; returns its folder.
    ///
    /// A checkpoint of the same step is replaced. Of later steps there may only be damaged ones (the run went back behind
    /// them); they are removed.
    ///
    /// # Errors
    /// There is a complete checkpoint of a later step, which a resumed run would have gone on from; a scalar cannot be
    /// stored; or something cannot be written. All older checkpoints are then as they were.
    pub fn save(&self, state: &TrainState, identity: &Identity) -> Result<PathBuf, TuneError> {
        folder::create(&self.dir)?;
        // What killed writes left is worth nothing, and the new checkpoint may need the room.
        for leftover in folder::leftovers(&self.dir)? {
            remove(&leftover);
        }
        let (later, _) = self.split(state.step)?;
        for path in &later {
            if verify(path).is_ok() {
                return Err(TuneError::Model(ModelError::Format {
                    path: self.dir.clone(),
                    what: "checkpoints".into(),
                    expected: format!("none after step {}; resume from it or choose another folder", state.step),
                    found: folder::file_name(path),
                }));
            }
        }
        let target = self.dir.join(folder::name_of(state.step));
        let dir = AtomicDir::create(&target)?;
        tensors::write(&dir.path().join(folder::STATE), &state.tensors)?;
        Manifest::new(state, identity)?.write(&dir.path().join(folder::MANIFEST))?;
        folder::write_digests(dir.path())?;
        dir.commit(true)?;
        let (_, earlier) = self.split(state.step)?;
        // The new one is one of those that are kept.
        for path in later.iter().chain(earlier.iter().skip(self.keep - 1)) {
            folder::retire(path);
        }
        Ok(target)
    }

    /// The newest complete checkpoint, and the newer ones that were passed over because they are damaged; `None` where there
    /// is no checkpoint at all.
    ///
    /// # Errors
    /// There are checkpoints and all are damaged (a run must not start from the beginning unasked); the checkpoint is of
    /// another run, and the message says what differs; or the folder cannot be read.
    pub fn latest(&self, identity: &Identity) -> Result<Option<(TrainState, Vec<Skipped>)>, TuneError> {
        if !self.dir.try_exists().map_err(|e| ModelError::io(&self.dir, e))? {
            return Ok(None);
        }
        let mut skipped: Vec<Skipped> = Vec::new();
        for (_, path) in folder::checkpoints(&self.dir)? {
            let read = verify(&path).and_then(|manifest| Ok((manifest, tensors::read(&path.join(folder::STATE))?)));
            match read {
                Ok((manifest, tensors)) => {
                    manifest.identity.check(&path, identity)?;
                    let state = TrainState { step: manifest.step, tensors, scalars: manifest.scalars };
                    return Ok(Some((state, skipped)));
                }
                Err(error) => skipped.push(Skipped { path, reason: error.to_string() }),
            }
        }
        match skipped.first() {
            None => Ok(None),
            Some(newest) => Err(TuneError::Model(ModelError::Parse {
                path: self.dir.clone(),
                what: format!("none of {} checkpoints is complete", skipped.len()),
                reason: format!("{}; remove them to start from the beginning", newest.reason),
            })),
        }
    }

    /// Removes all checkpoints, and their folder if it holds nothing else.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn remove_all(&self) -> Result<(), TuneError> {
        if !self.dir.try_exists().map_err(|e| ModelError::io(&self.dir, e))? {
            return Ok(());
        }
        for (_, path) in folder::checkpoints(&self.dir)? {
            folder::retire(&path);
        }
        for leftover in folder::leftovers(&self.dir)? {
            remove(&leftover);
        }
        if let Err(error) = fs::remove_dir(&self.dir) {
            tracing::debug!(path = %self.dir.display(), %error, "the folder of the checkpoints stays");
        }
        Ok(())
    }

    /// The checkpoints after and before `step`, each from new to old.
    fn split(&self, step: u64) -> Result<(Vec<PathBuf>, Vec<PathBuf>), TuneError> {
        let (mut later, mut earlier) = (Vec::new(), Vec::new());
        for (other, path) in folder::checkpoints(&self.dir)? {
            match other.cmp(&step) {
                std::cmp::Ordering::Greater => later.push(path),
                std::cmp::Ordering::Less => earlier.push(path),
                std::cmp::Ordering::Equal => {}
            }
        }
        Ok((later, earlier))
    }
}

/// The manifest of a checkpoint whose files have their digests.
fn verify(path: &Path) -> Result<Manifest, ModelError> {
    folder::check_digests(path)?;
    let manifest = Manifest::read(&path.join(folder::MANIFEST))?;
    let (expected, found) = (folder::file_name(path), folder::name_of(manifest.step));
    if expected != found {
        return Err(ModelError::Format {
            path: path.to_owned(),
            what: "name".into(),
            expected: found,
            found: expected,
        });
    }
    Ok(manifest)
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path) {
        tracing::warn!(path = %path.display(), %error, "what is no longer needed cannot be removed");
    }
}
