//! `cargo xtask bindings`: the library for apps and, from its one definition, what Kotlin, Swift, Python and C need to call
//! it. The generator (crates/edgellm-ffi/bindgen) reads the built library.

mod check;
pub(crate) mod kotlinc;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use xshell::cmd;

pub(crate) use self::check::{c, cold_start, kotlin, python, swift};
use crate::repo;

/// The crate.
const FFI: &str = "crates/edgellm-ffi";

/// Builds the library for apps and generates its bindings.
#[derive(Args)]
pub(crate) struct Bindings {
    /// Languages.
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_value = "kotlin,swift,python,c")]
    lang: Vec<Language>,
    /// Where to write them: one language into this folder, several into a folder for each in it.
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
        for &language in &self.lang {
            let folder = if self.lang.len() == 1 { out.clone() } else { out.join(language.name()) };
            let mut files = generate(&library, language, &folder)?;
            // Python and C load the library of this machine; apps bring their own.
            if [Language::Python, Language::C].contains(&language) {
                let file = folder.join(library_name());
                fs::copy(&library, &file).with_context(|| format!("cannot write {}", file.display()))?;
                files.push(file);
            }
            files.iter().for_each(|file| println!("{}", file.display()));
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
    cmd!(shell, "cargo build --quiet --profile {profile} -p edgellm-ffi --lib").quiet().run()?;
    Ok(repo::target()?.join(profile).join(library_name()))
}

/// Writes the bindings of a built library, of any target, into a folder; returns the files.
pub(crate) fn generate(library: &Path, language: Language, folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    if language == Language::C {
        let (header, copy) = (repo::root()?.join(FFI).join("include/edgellm.h"), folder.join("edgellm.h"));
        fs::copy(&header, &copy).with_context(|| format!("cannot write {}", copy.display()))?;
        return Ok(vec![copy]);
    }
    let (shell, generator, name) = (repo::shell()?, generator()?, language.name());
    // It finds the crate's uniffi.toml by itself.
    let arguments = ["generate", "--no-format", "--language", name, "--out-dir"];
    cmd!(shell, "{generator} {arguments...} {folder} {library}").quiet().ignore_stdout().run()?;
    let files = match language {
        Language::Kotlin => &["org/edgellm/edgellm.kt"][..],
        Language::Swift => &["EdgeLLM.swift", "EdgeLLMFFI.h", "EdgeLLMFFI.modulemap"],
        Language::Python | Language::C => &["edgellm.py"],
    };
    let files: Vec<PathBuf> = files.iter().map(|file| folder.join(file)).collect();
    match files.iter().find(|file| !file.is_file()) {
        Some(missing) => bail!("the generator wrote no {}", missing.display()),
        None => Ok(files),
    }
}

/// The generator, built where it is not up to date: a workspace of its own, so that nothing of it goes into the library.
fn generator() -> Result<PathBuf> {
    let (shell, folder) = (repo::shell()?, repo::target()?.join("bindgen"));
    let manifest = Path::new(FFI).join("bindgen/Cargo.toml");
    cmd!(shell, "cargo build --quiet --locked --manifest-path {manifest} --target-dir {folder}").quiet().run()?;
    Ok(folder.join("debug").join(format!("uniffi-bindgen{}", std::env::consts::EXE_SUFFIX)))
}
