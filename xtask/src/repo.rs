//! Where things are: the repository, the build's target folder, and what lies beside the clone.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

/// The root of the repository.
pub(crate) fn root() -> Result<PathBuf> {
    // The variable is right at run time also when the build was cached for another clone.
    let xtask = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Ok(Path::new(&xtask).parent().context("xtask lies in the repository")?.to_owned())
}

/// A shell in the root of the repository.
pub(crate) fn shell() -> Result<Shell> {
    let shell = Shell::new()?;
    shell.change_dir(root()?);
    Ok(shell)
}

/// The target folder: `CARGO_TARGET_DIR` where it is set, otherwise `target` in the repository.
pub(crate) fn target() -> Result<PathBuf> {
    let root = root()?;
    Ok(env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir)))
}

/// A folder in the target folder for what tasks write.
pub(crate) fn scratch(name: &str) -> Result<PathBuf> {
    let folder = target()?.join("xtask").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

/// Whether a program is on the path.
pub(crate) fn has_program(name: &str) -> bool {
    shell().is_ok_and(|shell| cmd!(shell, "which {name}").quiet().ignore_stdout().ignore_stderr().run().is_ok())
}

/// A file or folder of the shared material beside the clone, which tasks use where it is there.
pub(crate) fn shared(path: &str) -> Result<Option<PathBuf>> {
    let path = root()?.join("../shared").join(path);
    Ok(path.exists().then_some(path))
}
