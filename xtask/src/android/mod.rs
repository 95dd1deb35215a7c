//! `cargo xtask build-android`: the FFI library and the command for Android, the Kotlin bindings, and an AAR.

mod aar;
mod abi;
mod ndk;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use xshell::cmd;

use crate::binary::{Archive, Elf, Platform};
use crate::bindings::Language;
use crate::toolchain::{Build, Profile};
use crate::{package, repo};
pub(crate) use abi::{ABIS, Abi};
pub(crate) use ndk::Ndk;

/// The package with the interface for phones, its library's file, and how its symbols begin.
pub(crate) const FFI: &str = "edgellm-ffi";
const LIBRARY_FILE: &str = "libedgellm_ffi.so";
pub(crate) const FFI_SYMBOLS: &str = "uniffi_edgellm_ffi";
/// Libraries of the system that ours may need.
const SYSTEM: [&str; 4] = ["libc.so", "libm.so", "libdl.so", "liblog.so"];
/// Oldest Android for which the libraries are linked.
const OLDEST_API: u32 = 26;

/// Builds the library, the Kotlin bindings, an AAR and the command for Android.
#[derive(Args)]
pub(crate) struct BuildAndroid {
    /// ABIs, separated by commas: arm64-v8a, x86_64, armeabi-v7a
    #[arg(long, value_delimiter = ',', default_value = "arm64-v8a")]
    abi: Vec<String>,
    /// Optimize as for shipping (slow to build)
    #[arg(long)]
    release: bool,
    /// Only compile everything for the target: needs no NDK, and gives nothing that runs
    #[arg(long)]
    no_link: bool,
    /// The NDK's folder (default: ANDROID_NDK_HOME, or the newest of ANDROID_HOME/ndk)
    #[arg(long, value_name = "DIR")]
    ndk: Option<PathBuf>,
    /// Oldest Android API level that is supported
    #[arg(long, default_value_t = OLDEST_API)]
    api: u32,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = "dist/android")]
    out: PathBuf,
}

impl BuildAndroid {
    pub(crate) fn run(&self) -> Result<()> {
        let abis = self.abi.iter().map(|name| Abi::find(name.trim())).collect::<Result<Vec<_>>>();
        let abis = abis.unwrap_or_else(|error| crate::usage(&error));
        if self.api < OLDEST_API {
            crate::usage(&anyhow::anyhow!("--api {}: expected {OLDEST_API} or higher", self.api));
        }
        let profile = if self.release { Profile::Dist } else { Profile::Dev };
        if self.no_link {
            for abi in abis {
                println!("{}", compile(abi, profile)?);
            }
            println!("nothing was linked (--no-link): there is no library for a device; for one, install an NDK");
            return Ok(());
        }
        let ndk = Ndk::find(self.ndk.as_deref())?;
        println!("NDK {}", ndk.version);
        let out = repo::root()?.join(&self.out);
        let mut libraries = Vec::new();
        for abi in abis {
            libraries.push((abi, self.link(&ndk, abi, profile, &out)?));
        }
        pack(self.api, libraries, &out).map(drop)
    }

    /// Builds, strips and checks the library and the command for one ABI; returns the library.
    fn link(&self, ndk: &Ndk, abi: &Abi, profile: Profile, out: &Path) -> Result<PathBuf> {
        let build = ndk.configure(Build::new(abi.target, profile)?, abi, self.api)?;
        println!("{}: {}", abi.name, build.toolchain.describe());
        let strip = ndk.tool("llvm-strip")?;
        let library = place(&strip, &build.library(FFI, "cdylib")?, &out.join("jniLibs").join(abi.name), LIBRARY_FILE)?;
        let elf = check(abi, &library)?;
        elf.expect_export(FFI_SYMBOLS)?;
        let mb = elf.bytes as f64 / 1e6;
        println!("  {}: {mb:.1} MB, {} byte pages, needs {}", library.display(), elf.page, elf.needed.join(" "));
        let command = place(&strip, &build.binary("edgellm")?, &out.join("bin").join(abi.name), "edgellm")?;
        println!("  {}: {:.1} MB", command.display(), check(abi, &command)?.bytes as f64 / 1e6);
        // What `cargo xtask bench-device` runs first.
        let suites = build.test_program("edgellm-kernels", "conformance")?;
        place(&strip, &suites, &out.join("bin").join(abi.name), "conformance")?;
        Ok(library)
    }
}

/// Generates the bindings, writes the archive, and reads it back.
fn pack(api: u32, libraries: Vec<(&Abi, PathBuf)>, out: &Path) -> Result<aar::Summary> {
    let sources = out.join("kotlin");
    package::generate(Language::Kotlin, &sources)?;
    let (classes, lack) = match package::kotlin_classes(&sources)? {
        Ok(jar) => (jar, None),
        Err(reason) => (aar::no_classes()?, Some(reason)),
    };
    let archive = out.join("edgellm.aar");
    aar::write(&archive, &aar::Contents { api, classes, libraries })?;
    let summary = aar::read(&archive)?;
    println!("{}: {}, {} classes", archive.display(), summary.abis.join(", "), summary.classes);
    if let Some(reason) = lack {
        println!("its classes.jar is EMPTY ({reason}): add the sources in {} to your app", sources.display());
    } else {
        ensure!(summary.classes > 0, "the Kotlin compiler made no classes");
    }
    println!("apps that use it also need JNA: implementation(\"net.java.dev.jna:jna:5.17.0@aar\")");
    Ok(summary)
}

/// Compiles the whole closure of the FFI library for one ABI without linking; one line that says so.
pub(crate) fn compile(abi: &Abi, profile: Profile) -> Result<String> {
    let build = Build::new(abi.target, profile)?;
    let path = build.library(FFI, "staticlib")?;
    let facts = Archive::read(&path)?;
    facts.expect(abi.architecture, Platform::Elf, FFI_SYMBOLS).with_context(|| path.display().to_string())?;
    let (name, whose, mb) = (abi.name, build.toolchain.describe(), facts.bytes as f64 / 1e6);
    Ok(format!("{name}: compiled, not linked ({whose}; {} objects, {mb:.0} MB before linking)", facts.objects))
}

/// Copies a built file and strips the copy.
fn place(strip: &Path, built: &Path, folder: &Path, name: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(name);
    fs::copy(built, &path).with_context(|| format!("cannot copy {} to {}", built.display(), path.display()))?;
    let shell = repo::shell()?;
    cmd!(shell, "{strip} --strip-unneeded {path}").quiet().run()?;
    Ok(path)
}

/// What every linked file for Android must be.
fn check(abi: &Abi, path: &Path) -> Result<Elf> {
    let elf = Elf::read(path)?;
    let checked = || -> Result<()> {
        elf.expect_machine(abi.machine)?;
        if abi.wide {
            elf.expect_page(ndk::PAGE)?;
        }
        ensure!(!elf.needed.is_empty(), "it is linked to nothing, not even libc.so");
        elf.expect_needed(&SYSTEM)
    };
    checked().with_context(|| format!("{} is not usable on {}", path.display(), abi.name))?;
    Ok(elf)
}

/// CI's check without an NDK: compiles for one ABI, then asks a program that only records its command line to link, and
/// reads off that it was asked for a shared library with pages of 16 KB.
pub(crate) fn check_without_ndk(abi: &str) -> Result<String> {
    let abi = Abi::find(abi)?;
    let compiled = compile(abi, Profile::Compile)?;
    let folder = repo::scratch("fake-ndk")?;
    let calls = ndk::fake(&folder, "28.2.13676358")?;
    let ndk = Ndk::find(Some(&folder))?;
    let build = ndk.configure(Build::new(abi.target, Profile::Compile)?, abi, OLDEST_API)?;
    ensure!(build.library(FFI, "cdylib").is_err(), "a linker that links nothing made a library");
    let calls = fs::read_to_string(&calls).context("the linker was not called")?;
    let call = calls.lines().rfind(|call| call.starts_with(abi.clang)).context("the linker was not called")?;
    for part in ["-shared", "-Wl,-z,max-page-size=16384", "libedgellm_ffi.so"] {
        ensure!(call.contains(part), "the linker's command line has no {part}: {call}");
    }
    Ok(format!("{compiled}; the linker's command line is right (a recorder, no NDK)"))
}

/// CI's check of the archive where there is no NDK: the real bindings, compiled where Kotlin can be, and this machine's own
/// library as a stand-in for Android's.
pub(crate) fn check_archive() -> Result<String> {
    let out = repo::scratch("android-stand-in")?;
    let library = crate::bindings::library("release")?;
    let machine = Elf::read(&library)?.machine;
    let abi = ABIS.iter().find(|abi| abi.machine == machine).with_context(|| format!("no ABI for {machine}"))?;
    let summary = pack(OLDEST_API, vec![(abi, library)], &out)?;
    Ok(format!("{} classes; the library in it is this machine's, a stand-in", summary.classes))
}
