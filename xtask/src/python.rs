//! Python environments for the checks against other programs, kept in the target folder.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use xshell::cmd;

use crate::repo;

/// What the quick checks need.
pub(crate) const LIGHT: (&str, &[&str]) = ("light", &["numpy==2.4.6", "safetensors==0.8.0", "gguf==0.19.0"]);
/// What the check against peft needs: several gigabytes.
pub(crate) const PEFT: (&str, &[&str]) =
    ("peft", &["numpy==2.4.6", "safetensors==0.8.0", "torch==2.15.0", "transformers==5.23.0", "peft==0.21.2"]);

/// What llama.cpp's converters import: several gigabytes.
pub(crate) const CONVERT: (&str, &[&str]) = (
    "convert",
    &["numpy==2.4.6", "safetensors==0.8.0", "torch==2.15.0", "transformers==5.23.0", "gguf==0.19.0", "sentencepiece"],
);

/// The interpreter of an environment with these packages; made where it is missing or has other packages.
pub(crate) fn interpreter((name, packages): (&str, &[&str])) -> Result<PathBuf> {
    let shell = repo::shell()?;
    let folder = repo::scratch("python")?.join(name);
    let python = folder.join("bin/python");
    let (stamp, wanted) = (folder.join("packages"), packages.join("\n"));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    cmd!(shell, "python3 -m venv --clear {folder}").quiet().run().context("python3 with its venv module is needed")?;
    cmd!(shell, "{python} -m pip install --quiet --disable-pip-version-check {packages...}").quiet().run()?;
    fs::write(&stamp, wanted)?;
    Ok(python)
}

/// A script of ours.
pub(crate) fn script(name: &str) -> Result<PathBuf> {
    Ok(repo::root()?.join("xtask/py").join(name))
}
