//! `cargo xtask bindings`: the library for apps and, from its one definition, what Kotlin, Swift, Python and C need to call
//! it. The generator (crates/edgellm-ffi/bindgen) reads the built library.

mod check;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use xshell::cmd;

pub(crate) use self::check::{c, cold_start, kotlin, python, size, swift};
use crate::repo;

/// The crate.
const FFI: &str = "crates/edgellm-ffi";

/// Builds the library for apps and generates its bindings.
#[derive(Args)]
pub(crate) struct Bindings {
    /// Languages.
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "kotlin,swift,python,c")]
    lang: Vec<Language>,
    /// Where to write them: a folder for each language.
    #[arg(long, value_name = "DIR", default_value = "dist/bindings")]
    out: PathBuf,
}

/// A language that bindings are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Language {
    Kotlin,
    Swift,
    Python,
    C,
}

impl Language {
    /// Its name, also of its folder.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Language::Kotlin => "kotlin",
            Language::Swift => "swift",
            Language::Python => "python",
            Language::C => "c",
        }
    }
}

impl Bindings {
    pub(crate) fn run(&self) -> Result<()> {
        let library = library("release")?;
        let out = repo::root()?.join(&self.out);
        for file in generate(&library, &self.lang, &out)? {
            println!("{}", file.display());
        }
        // Python and C load the library of this machine; apps bring their own.
        for language in self.lang.iter().filter(|l| [Language::Python, Language::C].contains(l)) {
            let file = out.join(language.name()).join(library_name());
            fs::copy(&library, &file).with_context(|| format!("cannot write {}", file.display()))?;
            println!("{}", file.display());
        }
        Ok(())
    }
}

/// The name of the shared library on this system.
pub(crate) fn library_name() -> String {
    format!("{}edgellm_ffi{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// The shared library for this machine, built with a profile: `release` or `dist`.
pub(crate) fn library(profile: &str) -> Result<PathBuf> {
    let shell = repo::shell()?;
    cmd!(shell, "cargo build --quiet --profile {profile} -p edgellm-ffi").quiet().run()?;
    Ok(repo::target()?.join(profile).join(library_name()))
}

/// Writes the bindings of a built library (of any target whose symbols are there), a folder for each language; returns the
/// files.
pub(crate) fn generate(library: &Path, languages: &[Language], out: &Path) -> Result<Vec<PathBuf>> {
    let root = repo::root()?.join(FFI);
    let mut files = Vec::new();
    for &language in languages {
        let folder = out.join(language.name());
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot replace {}", folder.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        if language == Language::C {
            fs::copy(root.join("include/edgellm.h"), folder.join("edgellm.h"))?;
        } else {
            let (shell, generator, name) = (repo::shell()?, generator()?, language.name());
            let config = root.join("uniffi.toml");
            cmd!(
                shell,
                "{generator} generate --no-format --language {name} --config {config} --out-dir {folder} {library}"
            )
            .quiet()
            .run()?;
        }
        let found = files_below(&folder)?;
        if found.is_empty() {
            bail!("the generator wrote nothing for {}", language.name());
        }
        files.extend(found);
    }
    Ok(files)
}

/// The generator, built where it is not up to date: a workspace of its own, so that nothing of it goes into the library.
fn generator() -> Result<PathBuf> {
    let (shell, folder) = (repo::shell()?, repo::target()?.join("bindgen"));
    let manifest = Path::new(FFI).join("bindgen/Cargo.toml");
    cmd!(shell, "cargo build --quiet --locked --manifest-path {manifest} --target-dir {folder}").quiet().run()?;
    Ok(folder.join("debug").join(format!("uniffi-bindgen{}", std::env::consts::EXE_SUFFIX)))
}

/// The files in a folder and the folders in it, in order.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    files.sort();
    Ok(files)
}
