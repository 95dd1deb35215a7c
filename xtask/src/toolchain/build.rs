//! One cargo build for a target: its command line and environment as a value, so that tests can read it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xshell::{Cmd, cmd};

use super::Toolchain;
use crate::repo;

/// How far the compiler goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Quick to build, slow to run.
    Dev,
    /// Quickest to build, not to be run.
    Compile,
    /// What tests use.
    Release,
    /// What is shipped.
    Dist,
}

impl Profile {
    fn flag(self) -> &'static str {
        match self {
            Self::Dev => "--profile=dev",
            Self::Compile => "--profile=compile",
            Self::Release => "--profile=release",
            Self::Dist => "--profile=dist",
        }
    }
}

/// How a shared library for apps is linked: as one module, in which equal functions of different crates are one. That
/// takes longer and saves a twelfth of the size.
const SMALL: [&str; 1] = ["-Clto=fat"];

/// A build for one target.
pub(crate) struct Build<'a> {
    pub(crate) toolchain: Toolchain,
    pub(crate) target: &'a str,
    pub(crate) profile: Profile,
    env: Vec<(OsString, OsString)>,
    /// The compiler's options for the library or binary that is asked for, not for what it depends on: another linker
    /// then compiles nothing again.
    last: Vec<OsString>,
    features: Option<String>,
}

impl<'a> Build<'a> {
    pub(crate) fn new(target: &'a str, profile: Profile) -> Result<Self> {
        Ok(Self::with(Toolchain::find(target)?, target, profile))
    }

    pub(crate) fn with(toolchain: Toolchain, target: &'a str, profile: Profile) -> Self {
        Self { toolchain, target, profile, env: Vec::new(), last: Vec::new(), features: None }
    }

    /// Adds a variable.
    pub(crate) fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Adds `CARGO_TARGET_<TRIPLE>_<KEY>`.
    pub(crate) fn target_env(self, key: &str, value: impl AsRef<OsStr>) -> Self {
        let triple = self.target.to_uppercase().replace('-', "_");
        self.env(format!("CARGO_TARGET_{triple}_{key}"), value)
    }

    /// Features of the package that is asked for, instead of none.
    pub(crate) fn features(mut self, features: &[&str]) -> Self {
        self.features = Some(format!("--features={}", features.join(",")));
        self
    }

    /// Adds an option of the compiler for what is asked for.
    pub(crate) fn option(mut self, option: impl AsRef<OsStr>) -> Self {
        self.last.push(option.as_ref().to_owned());
        self
    }

    /// Options and variables, for tests.
    #[cfg(test)]
    pub(crate) fn settings(&self) -> (&[OsString], &[(OsString, OsString)]) {
        (&self.last, &self.env)
    }

    /// Compiles one library as `kind` ("staticlib", "cdylib") and returns the file.
    pub(crate) fn library(&self, package: &str, kind: &str) -> Result<PathBuf> {
        let args = ["rustc", "-p", package, "--lib", "--no-default-features", "--crate-type", kind];
        let (end, small) = if kind == "staticlib" { (".a", false) } else { (".so", self.profile == Profile::Dist) };
        self.file(&args, if small { &SMALL } else { &[] }, |path| path.to_string_lossy().ends_with(end))
    }

    /// Builds a package's binaries and returns the one of the same name.
    pub(crate) fn binary(&self, package: &str) -> Result<PathBuf> {
        let messages = self.messages(&["rustc", "-p", package, "--bin", package, "--no-default-features"], &[])?;
        let path = messages.iter().rev().find_map(|m| m["executable"].as_str());
        path.map(PathBuf::from).with_context(|| format!("cargo built no binary {package} for {}", self.target))
    }

    /// Builds one test program of a package without running it.
    pub(crate) fn test_program(&self, package: &str, test: &str) -> Result<PathBuf> {
        let messages = self.messages(&["rustc", "-p", package, "--test", test], &[])?;
        let path = messages.iter().rev().find_map(|m| m["executable"].as_str());
        path.map(PathBuf::from).with_context(|| format!("cargo built no test {test} for {}", self.target))
    }

    /// The file of a compiled library that `wanted` takes.
    fn file(&self, args: &[&str], options: &[&str], wanted: impl Fn(&Path) -> bool) -> Result<PathBuf> {
        let messages = self.messages(args, options)?;
        let files = messages.iter().rev().filter_map(|m| m["filenames"].as_array()).flatten();
        let mut paths = files.filter_map(|f| f.as_str()).map(PathBuf::from);
        paths
            .find(|p| wanted(p))
            .with_context(|| format!("cargo {} made no such file for {}", args.join(" "), self.target))
    }

    /// Runs cargo with further options of the compiler; returns the artifacts that it names.
    fn messages(&self, args: &[&str], options: &[&str]) -> Result<Vec<Value>> {
        let shell = repo::shell()?;
        let output = self.command(&shell, args, options)?.ignore_status().output()?;
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "cargo could not build for {} ({})", self.target, output.status);
        let text = String::from_utf8(output.stdout)?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|m| m["reason"] == "compiler-artifact").collect())
    }

    /// The command line.
    fn command<'s>(&self, shell: &'s xshell::Shell, args: &[&str], options: &[&str]) -> Result<Cmd<'s>> {
        let (cargo, target, profile) = (&self.toolchain.cargo, self.target, self.profile.flag());
        let folder = self.toolchain.target_folder()?;
        let std = self.toolchain.build_std.then_some("-Zbuild-std=std,panic_unwind");
        let format = "--message-format=json-render-diagnostics";
        let features = self.features.as_ref();
        let last: Vec<_> = self.last.iter().map(OsString::as_os_str).chain(options.iter().map(OsStr::new)).collect();
        let options = (!last.is_empty()).then_some(OsStr::new("--")).into_iter().chain(last);
        let mut command = cmd!(
            shell,
            "{cargo} {args...} --quiet {profile} --target {target} --target-dir {folder} {std...} {features...} {format}
                {options...}"
        );
        if let Some(rustc) = &self.toolchain.rustc {
            command = command.env("RUSTC", rustc);
        }
        if self.toolchain.build_std {
            command = command.env("RUSTC_BOOTSTRAP", "1");
        }
        Ok(command.envs(self.env.iter().map(|(k, v)| (k, v))).quiet())
    }
}
