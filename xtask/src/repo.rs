//! Where things are: the repository, the build's target folder, and what lies beside the clone.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the repository.
pub(crate) fn root() -> Result<PathBuf> {
    // The variable is right at run time also when the build was cached for another clone.
    let xtask =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Ok(Path::new(&xtask)
        .parent()
        .context("xtask lies in the repository")?
        .to_owned())
}

/// The target folder: `CARGO_TARGET_DIR` where it is set, otherwise `target` in the repository.
pub(crate) fn target() -> Result<PathBuf> {
    let root = root()?;
    Ok(env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir)))
}

/// A file or folder of the shared material beside the clone, which tests may use where it is there.
pub(crate) fn beside(path: &str) -> Result<Option<PathBuf>> {
    let path = root()?.join("../shared").join(path);
    Ok(path.exists().then_some(path))
}
