//! Which cargo builds for a target that is not this machine, in order of preference: rustup's with the target's standard
//! library, Debian's with it, then either with the standard library built from source.

mod build;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::cmd;

use crate::repo;
pub(crate) use build::{Build, Profile};

/// The triple of this machine, as far as it decides whether a build is a cross build.
pub(crate) const HOST: &str = env!("XTASK_HOST");

/// A cargo with its compiler, and what it needs for one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    cargo: PathBuf,
    /// Set where cargo would otherwise take rustup's.
    rustc: Option<PathBuf>,
    /// The standard library is compiled too.
    pub(crate) build_std: bool,
    /// Folder in the target folder: toolchains must not share one.
    folder: &'static str,
}

const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

impl Toolchain {
    /// The one that builds this target here.
    pub(crate) fn find(target: &str) -> Result<Self> {
        let ours = Self { cargo: "cargo".into(), rustc: None, build_std: false, folder: "" };
        if target == HOST || has_std(Path::new("rustc"), target) {
            return Ok(ours);
        }
        let debian = Path::new(DEBIAN_RUSTC);
        let theirs = Self::debian();
        let usable = debian.is_file() && Path::new(DEBIAN_CARGO).is_file();
        if usable && has_std(debian, target) {
            return Ok(theirs);
        }
        if usable && has_source(debian) {
            return Ok(Self { build_std: true, folder: "cross-std", ..theirs });
        }
        if has_source(Path::new("rustc")) {
            return Ok(Self { build_std: true, folder: "rustup-std", ..ours });
        }
        bail!("no standard library for {target}; {}", Self::advice(target))
    }

    /// Debian's, with the target's own standard library.
    fn debian() -> Self {
        Self { cargo: DEBIAN_CARGO.into(), rustc: Some(DEBIAN_RUSTC.into()), build_std: false, folder: "cross" }
    }

    /// What installs a toolchain for the target.
    pub(crate) fn advice(target: &str) -> String {
        format!(
            "`rustup target add {target}` installs it (on Debian, `apt-get install rustc-web cargo-web rust-web-src` works too)"
        )
    }

    /// "rustup's", "Debian's, std from source".
    pub(crate) fn describe(&self) -> String {
        let whose = if self.rustc.is_some() { "Debian's" } else { "rustup's" };
        let std = if self.build_std { ", std from source" } else { "" };
        format!("{whose} toolchain{std}")
    }

    /// Where it builds.
    pub(crate) fn target_folder(&self) -> Result<PathBuf> {
        Ok(repo::target()?.join(self.folder))
    }
}

/// The compiler's folder for the target holds a standard library.
fn has_std(rustc: &Path, target: &str) -> bool {
    let Ok(folder) = ask(rustc, &["--print", "target-libdir", "--target", target]) else { return false };
    let Ok(mut entries) = std::fs::read_dir(folder) else { return false };
    entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("libstd-")))
}

/// The compiler has the standard library's source beside it.
fn has_source(rustc: &Path) -> bool {
    ask(rustc, &["--print", "sysroot"])
        .is_ok_and(|root| Path::new(&root).join("lib/rustlib/src/rust/library/Cargo.toml").is_file())
}

fn ask(rustc: &Path, args: &[&str]) -> Result<String> {
    let shell = repo::shell()?;
    cmd!(shell, "{rustc} {args...}").quiet().ignore_stderr().read().context("rustc did not answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_needs_no_other_toolchain() {
        let found = Toolchain::find(HOST).unwrap();
        assert_eq!(found.describe(), "rustup's toolchain");
        assert_eq!(found.target_folder().unwrap(), repo::target().unwrap().join(""));
    }
}
