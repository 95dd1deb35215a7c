//! Names, digests and removal of checkpoint folders.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use edgellm_model::ModelError;
use edgellm_model::io::{atomic_write, read_text};
use sha2::{Digest, Sha256};

pub(super) const STATE: &str = "state.safetensors";
pub(super) const MANIFEST: &str = "checkpoint.json";
const DIGESTS: &str = "SHA256SUMS";

const PREFIX: &str = "step-";
/// The end of temporary names, as [`edgellm_model::io::AtomicDir`] makes them: `.step-00000123.PID.N.tmp`.
const TEMPORARY: &str = ".tmp";

/// The folder's name of a step's checkpoint.
pub(super) fn name_of(step: u64) -> String {
    format!("{PREFIX}{step:08}")
}

/// A path's last part, for names and messages.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Creates a folder and what is missing above it, durably: a crash must not lose the folder with its first checkpoint.
pub(super) fn create(dir: &Path) -> Result<(), ModelError> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|a| !a.as_os_str().is_empty() && !a.exists()).collect();
    fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    // Only Unix can open a folder to sync it.
    if cfg!(unix) {
        for folder in missing {
            let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(|e| ModelError::io(parent, e))?;
        }
    }
    Ok(())
}

/// The checkpoints in a folder, damaged ones as well, from new to old.
pub(super) fn checkpoints(dir: &Path) -> Result<Vec<(u64, PathBuf)>, ModelError> {
    let mut found: Vec<(u64, PathBuf)> = entries(dir)?
        .into_iter()
        .filter_map(|path| {
            let name = file_name(&path);
            let step: u64 = name.strip_prefix(PREFIX)?.parse().ok()?;
            // One name a step: `step-7` and `step-+0000007` are not ours.
            (name == name_of(step)).then_some((step, path))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

/// What writes and removals that were killed have left in a folder.
pub(super) fn leftovers(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let ours = |path: &PathBuf| {
        let name = file_name(path);
        name.strip_prefix('.').is_some_and(|rest| rest.starts_with(PREFIX) && rest.ends_with(TEMPORARY))
    };
    Ok(entries(dir)?.into_iter().filter(ours).collect())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    read().map_err(|e| ModelError::io(dir, e))
}

/// Removes a checkpoint: renamed first, so that what a kill leaves is not taken for a checkpoint.
pub(super) fn retire(path: &Path) {
    let aside = path.with_file_name(format!(".{}.old{TEMPORARY}", file_name(path)));
    match fs::rename(path, &aside) {
        Ok(()) => super::remove(&aside),
        Err(error) => tracing::warn!(path = %path.display(), %error, "an old checkpoint cannot be removed"),
    }
}

/// Writes the digests of a checkpoint's other files, as `sha256sum` prints them.
pub(super) fn write_digests(dir: &Path) -> Result<(), ModelError> {
    atomic_write(&dir.join(DIGESTS), digests(dir)?.as_bytes())
}

/// Compares the files of a checkpoint with their digests.
pub(super) fn check_digests(dir: &Path) -> Result<(), ModelError> {
    let path = dir.join(DIGESTS);
    let (stored, actual) = (read_text(&path)?, digests(dir)?);
    if stored == actual {
        return Ok(());
    }
    let damaged: Vec<&str> = [STATE, MANIFEST]
        .into_iter()
        .zip(actual.lines())
        .filter(|(_, line)| !stored.lines().any(|stored| stored == *line))
        .map(|(name, _)| name)
        .collect();
    let expected = "the digests that were stored with them".to_owned();
    let (what, found) = match damaged.as_slice() {
        [] => (DIGESTS.to_owned(), "more than these digests".to_owned()),
        names => (names.join(" and "), "others: the checkpoint is damaged".to_owned()),
    };
    Err(ModelError::Format { path: dir.to_owned(), what, expected, found })
}

fn digests(dir: &Path) -> Result<String, ModelError> {
    let mut text = String::new();
    for name in [STATE, MANIFEST] {
        let path = dir.join(name);
        for byte in sha256(&path).map_err(|e| ModelError::io(&path, e))? {
            let _ = write!(text, "{byte:02x}");
        }
        let _ = writeln!(text, "  {name}");
    }
    Ok(text)
}

fn sha256(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().to_vec()),
            n => hash.update(&chunk[..n]),
        }
    }
}
