//! The programs and data that go to a device, and which of them are there already.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use xshell::cmd;

use super::matrix::{Device, Kind, Part};
use super::process::Failure;
use super::transport::Transport;
use crate::android::ABIS;
use crate::edgellm::Edgellm;
use crate::toolchain::{Build, HOST, Profile};
use crate::{cross, repo};

/// Programs for a device's processor and system.
pub(super) struct Programs {
    command: PathBuf,
    /// The conformance tests, where the device's row has them.
    conformance: Option<PathBuf>,
}

impl Programs {
    /// Builds them, or takes what the matrix or an earlier build names.
    ///
    /// # Errors
    /// [`Failure::NotRun`] where this machine has no toolchain for the device; [`Failure::Failed`] where a build fails.
    pub(super) fn of(device: &Device) -> Result<Self, Failure> {
        let wanted = device.parts.contains(&Part::Conformance);
        let failed = |error: anyhow::Error| Failure::Failed(format!("{error:#}"));
        let root = repo::root().map_err(failed)?;
        let given = |path: &PathBuf| {
            let path = root.join(path);
            if path.is_file() { Ok(path) } else { Err(Failure::NotRun(format!("no {}", path.display()))) }
        };
        if let Some(command) = &device.command {
            let conformance = device.conformance.as_ref().filter(|_| wanted);
            if wanted && conformance.is_none() {
                return Err(Failure::NotRun("the matrix gives a command but no conformance tests".to_owned()));
            }
            return Ok(Self { command: given(command)?, conformance: conformance.map(given).transpose()? });
        }
        let target = device.target.as_deref().unwrap_or(match device.transport {
            Kind::Local => HOST,
            Kind::Ssh | Kind::Qemu => cross::TARGET,
            Kind::Adb => "aarch64-linux-android",
            Kind::Ios => "aarch64-apple-ios-sim",
        });
        if let Some(abi) = ABIS.iter().find(|abi| abi.target == target) {
            let folder = Path::new("dist/android/bin").join(abi.name);
            let hint = |f: Failure| Failure::NotRun(format!("{f}; `cargo xtask build-android --release` makes it"));
            let conformance = wanted.then(|| given(&folder.join("conformance"))).transpose().map_err(hint)?;
            return Ok(Self { command: given(&folder.join("edgellm")).map_err(hint)?, conformance });
        }
        if target == cross::TARGET && HOST != target {
            if let Some(reason) = cross::missing() {
                return Err(Failure::NotRun(format!("cannot build for {target}: {reason}")));
            }
            let conformance = wanted.then(cross::conformance).transpose().map_err(failed)?;
            return Ok(Self { command: cross::binary().map_err(failed)?, conformance });
        }
        if target == HOST || target == "host" {
            return Self::here(wanted).map_err(failed);
        }
        let build = Build::new(target, Profile::Release).map_err(|e| Failure::NotRun(format!("{e:#}")))?;
        let conformance = wanted.then(|| build.test_program("edgellm-kernels", "conformance")).transpose();
        Ok(Self { command: build.binary("edgellm").map_err(failed)?, conformance: conformance.map_err(failed)? })
    }

    /// Any file as the command, and no tests.
    #[cfg(test)]
    pub(super) fn stand_in(command: PathBuf) -> Self {
        Self { command, conformance: None }
    }

    /// This machine's, with the features that its tests have, so that nothing is built twice.
    fn here(wanted: bool) -> Result<Self> {
        let command = Edgellm::build(&[])?.binary()?.to_owned();
        let shell = repo::shell()?;
        if !wanted {
            return Ok(Self { command, conformance: None });
        }
        let format = "--message-format=json-render-diagnostics";
        let built = cmd!(shell, "cargo test --quiet --release --workspace --test conformance --no-run {format}");
        let text = built.quiet().read()?;
        let mut messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let program = messages.find_map(|m| m["executable"].as_str().map(PathBuf::from));
        Ok(Self { command, conformance: Some(program.context("cargo built no conformance tests")?) })
    }
}

/// A file for a device.
struct Item {
    from: PathBuf,
    to: String,
    executable: bool,
}

/// What was pushed.
pub(super) struct Pushed {
    pub(super) files: usize,
    pub(super) bytes: u64,
    /// Files that were there already.
    pub(super) kept: usize,
}

/// The device's list of what it has, by hash.
const LIST: &str = "pushed";

/// Pushes the programs, the fixture model and its texts, except for what is there with the same hash.
pub(super) fn push(transport: &Transport, programs: &Programs, limit: Duration) -> Result<Pushed, Failure> {
    let failed = |error: anyhow::Error| Failure::Failed(format!("{error:#}"));
    let items = items(programs).map_err(failed)?;
    let there = list(transport, limit)?;
    let mut hashes = BTreeMap::new();
    let mut wanted = Vec::new();
    for item in &items {
        let hash = hash(&item.from).map_err(failed)?;
        if there.get(&item.to) != Some(&hash) {
            wanted.push(item);
        }
        hashes.insert(item.to.clone(), hash);
    }
    let size = |item: &Item| fs::metadata(&item.from).map_or(0, |m| m.len());
    let bytes = wanted.iter().map(|item| size(item)).sum();
    let pushed = Pushed { files: wanted.len(), bytes, kept: items.len() - wanted.len() };
    if wanted.is_empty() {
        return Ok(pushed);
    }
    room(transport, bytes, limit)?;
    for item in wanted {
        transport.push(&item.from, &item.to, item.executable, limit)?;
    }
    let text: String = hashes.iter().map(|(name, hash)| format!("{hash} {name}\n")).collect();
    transport.script(&format!("printf %s '{text}' > {LIST}"), limit)?;
    Ok(pushed)
}

fn items(programs: &Programs) -> Result<Vec<Item>> {
    let fixtures = repo::root()?.join("fixtures");
    let mut items = vec![Item { from: programs.command.clone(), to: "edgellm".to_owned(), executable: true }];
    if let Some(program) = &programs.conformance {
        items.push(Item { from: program.clone(), to: "conformance".to_owned(), executable: true });
    }
    let mut data: Vec<_> =
        ["text/heldout.txt", "instruct/train.jsonl", "instruct/heldout.jsonl"].map(str::to_owned).into();
    for entry in fs::read_dir(fixtures.join("model"))? {
        data.push(format!("model/{}", entry?.file_name().to_string_lossy()));
    }
    data.sort();
    items.extend(data.into_iter().map(|to| Item { from: fixtures.join(&to), to, executable: false }));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    ensure!(
        items.iter().all(|item| item.to.chars().all(plain)),
        "a fixture has a name that shells do not take as it is"
    );
    Ok(items)
}

/// Hashes of the files that are there, by name.
fn list(transport: &Transport, limit: Duration) -> Result<BTreeMap<String, String>, Failure> {
    let script = format!(
        "if [ -f {LIST} ]; then while read -r hash name; do if [ -f \"$name\" ]; then echo \"$hash $name\"; fi; done < {LIST}; fi"
    );
    let text = transport.script(&script, limit)?;
    let pairs = text.lines().filter_map(|line| line.trim().split_once(' '));
    Ok(pairs.map(|(hash, name)| (name.to_owned(), hash.to_owned())).collect())
}

fn hash(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect())
}

/// There is room for so many bytes, and as much again for what the suite writes.
fn room(transport: &Transport, bytes: u64, limit: Duration) -> Result<(), Failure> {
    let text = transport.script("df -Pk .", limit)?;
    let Some(free) = free_kib(&text) else { return Ok(()) };
    let (needed, free) = ((2 * bytes) / 1_000_000, free * 1024 / 1_000_000);
    if free < needed {
        return Err(Failure::Lost(format!("no space on the device: {needed} MB are needed, {free} MB are free")));
    }
    Ok(())
}

/// The fourth column of the last line of `df -Pk`.
fn free_kib(text: &str) -> Option<u64> {
    text.lines().last()?.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_read() {
        let text =
            "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/block/dm-41 1000 400 600 40% /data\n";
        assert_eq!(free_kib(text), Some(600));
        assert_eq!(free_kib("df: unknown option"), None);
    }
}
