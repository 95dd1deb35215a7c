//! Drives the `edgellm` command as a user would: builds it in release, runs it with `--json` and reads what it prints.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use xshell::{Shell, cmd};

use crate::repo;

/// The small model that `edgellm pull` knows by name.
pub(crate) const SMOLLM2: &str = "smollm2-135m-instruct";

/// A built `edgellm` command with what goes before and after its arguments.
pub(crate) struct Edgellm {
    shell: Shell,
    /// The binary, or an emulator with its options and the binary.
    program: Vec<PathBuf>,
    device: Option<String>,
    quiet: bool,
    in_f32: bool,
}

impl Edgellm {
    /// Builds the command in release with the workspace's default features plus `features`.
    pub(crate) fn build(features: &[&str]) -> Result<Self> {
        let shell = repo::shell()?;
        let built = repo::target()?.join("release").join(format!("edgellm{}", std::env::consts::EXE_SUFFIX));
        if features.is_empty() {
            cmd!(shell, "cargo build --quiet --release -p edgellm").quiet().run()?;
            return Ok(Self::at(shell, built));
        }
        let list = features.join(",");
        cmd!(shell, "cargo build --quiet --release -p edgellm --features {list}").quiet().run()?;
        // A later build with other features replaces the binary, so this one is kept under its own name.
        let kept = repo::scratch("bin")?.join(format!("edgellm-{}", features.join("-")));
        fs::copy(&built, &kept).with_context(|| format!("cannot copy {}", built.display()))?;
        Ok(Self::at(shell, kept))
    }

    /// A binary that is there already.
    pub(crate) fn at(shell: Shell, binary: PathBuf) -> Self {
        Self { shell, program: vec![binary], device: None, quiet: false, in_f32: false }
    }

    /// The built file.
    pub(crate) fn binary(&self) -> Result<&Path> {
        self.program.last().map(PathBuf::as_path).context("a program")
    }

    /// The same command under an emulator.
    pub(crate) fn under(mut self, emulator: &[&str]) -> Self {
        self.program.splice(0..0, emulator.iter().map(PathBuf::from));
        self
    }

    /// The same command with an environment variable.
    pub(crate) fn with_env(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.shell.set_var(name, value);
        self
    }

    /// The same command on a device that is not the default one.
    pub(crate) fn on(mut self, device: &str) -> Self {
        self.device = Some(device.to_owned());
        self
    }

    /// The same command with activations in f32: the reference.
    pub(crate) fn in_f32(mut self) -> Self {
        self.in_f32 = true;
        self
    }

    /// The same command without progress and messages.
    pub(crate) fn quietly(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Runs the command with `--json` and parses its standard output; progress and messages go to the terminal.
    pub(crate) fn json<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Value> {
        let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let shown = args.clone();
        let (program, rest) = self.program.split_first().context("a program")?;
        let device = self.device.iter().flat_map(|d| ["--device", d]);
        let precision = self.in_f32.then_some("--activations=f32");
        let options: Vec<&str> = device.chain(self.quiet.then_some("--quiet")).chain(precision).collect();
        let text = cmd!(self.shell, "{program} {rest...} {args...} {options...} --json").quiet().read()?;
        serde_json::from_str(&text).with_context(|| format!("edgellm {shown:?} did not print JSON: {text:.200}"))
    }

    /// Fetches a model into the store and returns its path.
    pub(crate) fn pull(&self, name: &str) -> Result<PathBuf> {
        let pulled = self.json(["pull", name])?;
        Ok(PathBuf::from(text(&pulled, "path")?))
    }
}

/// A number of the JSON output.
pub(crate) fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("no number {key:?} in {value}"))
}

/// A list of token ids of the JSON output.
pub(crate) fn ids(value: &Value, key: &str) -> Result<Vec<i64>> {
    let list = value[key].as_array().with_context(|| format!("no list {key:?} in {value}"))?;
    list.iter().map(|v| v.as_i64().with_context(|| format!("{v} in {key:?} is no id"))).collect()
}

/// A text of the JSON output.
pub(crate) fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no text {key:?} in {value}"))
}

/// Path as an argument.
pub(crate) fn arg(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
