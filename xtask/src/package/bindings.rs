//! The bindings of the FFI library, as `cargo xtask bindings` makes them, for packages.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bindings::{self, Language, kotlinc};
use crate::repo;

/// Writes the bindings for a language into a folder, which is made anew. They are read from this machine's library: the
/// definitions do not depend on the target.
pub(crate) fn generate(language: Language, folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    bindings::generate(&bindings::library("release")?, language, folder)
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
    if let Some(reason) = kotlinc::missing() {
        return Ok(Err(reason));
    }
    let jar = repo::scratch("android")?.join("classes.jar");
    kotlinc::compile(&[sources], &jar)?;
    Ok(Ok(fs::read(&jar).with_context(|| format!("the Kotlin compiler wrote no {}", jar.display()))?))
}
