//! The Android NDK: where it is, which version, and the settings with which cargo links by it, as cargo-ndk makes them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::abi::{ABIS, Abi};
use crate::toolchain::Build;

/// Rust's standard library needs this release or a later one.
const OLDEST: u32 = 25;
/// Bytes of a page on new 64-bit devices.
pub(super) const PAGE: u64 = 16384;
const HOW: &str = "install one with `sdkmanager \"ndk;28.2.13676358\"` or from \
                   https://developer.android.com/ndk/downloads and set ANDROID_NDK_HOME, or use --no-link";

/// An NDK with its tools for this machine.
#[derive(Debug)]
pub(crate) struct Ndk {
    root: PathBuf,
    /// "28.2.13676358".
    pub(crate) version: String,
    bin: PathBuf,
}

impl Ndk {
    /// The one at `given`, or else of the environment.
    ///
    /// # Errors
    /// None there, one without tools for this machine, or one that is too old.
    pub(crate) fn find(given: Option<&Path>) -> Result<Self> {
        if let Some(root) = given {
            return Self::at(root);
        }
        for name in ["ANDROID_NDK_HOME", "ANDROID_NDK_ROOT"] {
            if let Some(root) = env::var_os(name).filter(|v| !v.is_empty()) {
                return Self::at(Path::new(&root)).with_context(|| format!("{name} is set"));
            }
        }
        for name in ["ANDROID_HOME", "ANDROID_SDK_ROOT"] {
            let Some(sdk) = env::var_os(name).filter(|v| !v.is_empty()) else { continue };
            if let Some(root) = newest(&Path::new(&sdk).join("ndk")) {
                return Self::at(&root).with_context(|| format!("found below {name}"));
            }
        }
        bail!("no Android NDK (looked at --ndk, ANDROID_NDK_HOME and ANDROID_HOME/ndk); {HOW}")
    }

    fn at(root: &Path) -> Result<Self> {
        let properties = root.join("source.properties");
        let text = fs::read_to_string(&properties).map_err(|e| {
            anyhow!("{} is no NDK: it has no source.properties that can be read ({e}); {HOW}", root.display())
        })?;
        let version =
            text.lines().find_map(|line| line.split_once('=').filter(|(key, _)| key.trim() == "Pkg.Revision"));
        let version = version.map(|(_, value)| value.trim().to_owned());
        let version = version.with_context(|| format!("{} names no Pkg.Revision", properties.display()))?;
        let major: u32 = version.split('.').next().and_then(|n| n.parse().ok()).unwrap_or_default();
        let place = root.display();
        ensure!(major >= OLDEST, "the NDK at {place} is {version}, expected {OLDEST} or later; {HOW}");
        let host = host()?;
        let bin = root.join("toolchains/llvm/prebuilt").join(host).join("bin");
        ensure!(bin.is_dir(), "the NDK at {place} has no tools for this machine ({})", bin.display());
        Ok(Self { root: root.to_owned(), version, bin })
    }

    /// One of its programs.
    pub(super) fn tool(&self, name: &str) -> Result<PathBuf> {
        // On Windows the compilers are scripts and the others programs.
        let mut paths = ["", ".cmd", ".exe"].into_iter().map(|end| self.bin.join(format!("{name}{end}")));
        paths.find(|p| p.is_file()).with_context(|| format!("the NDK at {} has no {name}", self.root.display()))
    }

    /// A build that compiles C and links with this NDK for Android `api` and later.
    ///
    /// # Errors
    /// A tool is missing, as where the NDK does not know the API level.
    pub(super) fn configure<'a>(&self, build: Build<'a>, abi: &Abi, api: u32) -> Result<Build<'a>> {
        let clang = self.tool(&format!("{}{api}-clang", abi.clang))?;
        let (cpp, ar) = (self.tool(&format!("{}{api}-clang++", abi.clang))?, self.tool("llvm-ar")?);
        let (ranlib, page) = (self.tool("llvm-ranlib")?, format!("-Clink-arg=-Wl,-z,max-page-size={PAGE}"));
        Ok(build
            .env("ANDROID_NDK_HOME", &self.root)
            .env(format!("CC_{}", abi.target), &clang)
            .env(format!("CXX_{}", abi.target), cpp)
            .env(format!("AR_{}", abi.target), &ar)
            .env(format!("RANLIB_{}", abi.target), ranlib)
            .target_env("AR", &ar)
            .option(join("-Clinker=", &clang))
            .option(page))
    }
}

fn join(option: &str, path: &Path) -> OsString {
    let mut joined = OsString::from(option);
    joined.push(path);
    joined
}

/// The NDK's name of this machine.
fn host() -> Result<&'static str> {
    match env::consts::OS {
        "linux" => Ok("linux-x86_64"),
        // The same folder for both kinds of Mac.
        "macos" => Ok("darwin-x86_64"),
        "windows" => Ok("windows-x86_64"),
        other => bail!("there is no Android NDK for {other}"),
    }
}

/// The NDK of the highest version below a folder.
fn newest(folder: &Path) -> Option<PathBuf> {
    let version = |path: &Path| -> Vec<u32> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        name.split('.').map(|part| part.parse().unwrap_or_default()).collect()
    };
    let roots = fs::read_dir(folder).ok()?.filter_map(|e| Some(e.ok()?.path()));
    roots.filter(|path| path.join("source.properties").is_file()).max_by_key(|path| version(path))
}

/// Makes a folder that looks like an NDK; its compilers and tools write their command lines into the file that is returned,
/// and fail.
pub(super) fn fake(root: &Path, version: &str) -> Result<PathBuf> {
    let bin = root.join("toolchains/llvm/prebuilt").join(host()?).join("bin");
    fs::create_dir_all(&bin)?;
    fs::write(root.join("source.properties"), format!("Pkg.Desc = Android NDK\nPkg.Revision = {version}\n"))?;
    let calls = root.join("calls");
    fs::write(&calls, "")?;
    let record = format!("#!/bin/sh\necho \"$(basename \"$0\") $*\" >> '{}'\nexit 1\n", calls.display());
    let compilers = ABIS.iter().flat_map(|abi| ["", "++"].map(|end| format!("{}26-clang{end}", abi.clang)));
    for name in compilers.chain(["llvm-ar", "llvm-ranlib", "llvm-strip"].map(str::to_owned)) {
        let path = bin.join(name);
        fs::write(&path, &record)?;
        #[cfg(unix)]
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    Ok(calls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toolchain::{Profile, Toolchain};

    #[test]
    fn an_ndk_is_found_with_its_tools() {
        let folder = tempfile::tempdir().unwrap();
        fake(folder.path(), "28.2.13676358").unwrap();
        let bin = folder.path().join("toolchains/llvm/prebuilt").join(host().unwrap()).join("bin");
        let ndk = Ndk::find(Some(folder.path())).unwrap();
        assert_eq!(ndk.version, "28.2.13676358");
        let abi = Abi::find("arm64-v8a").unwrap();
        let build = || Build::with(Toolchain::find(crate::toolchain::HOST).unwrap(), abi.target, Profile::Dist);
        let configured = ndk.configure(build(), abi, 26).unwrap();
        let (options, variables) = configured.settings();
        let of = |name: &str| variables.iter().find(|(k, _)| k == name).unwrap().1.clone();
        assert_eq!(options[0], join("-Clinker=", &bin.join("aarch64-linux-android26-clang")));
        assert_eq!(options[1], "-Clink-arg=-Wl,-z,max-page-size=16384");
        assert_eq!(of("CXX_aarch64-linux-android"), bin.join("aarch64-linux-android26-clang++"));
        assert_eq!(of("AR_aarch64-linux-android"), bin.join("llvm-ar"));
        let error = ndk.configure(build(), abi, 99).map(drop).unwrap_err().to_string();
        assert!(error.contains("has no aarch64-linux-android99-clang"), "{error}");
    }

    #[test]
    fn an_old_or_missing_ndk_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", Ndk::find(Some(folder.path())).unwrap_err());
        assert!(error.contains("is no NDK: it has no source.properties") && error.contains("--no-link"), "{error}");
        fake(folder.path(), "21.4.7075529").unwrap();
        let error = Ndk::find(Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("is 21.4.7075529, expected 25 or later"), "{error}");
    }

    #[test]
    fn the_newest_of_several_is_taken_by_number() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["9.0.1", "27.1.2", "27.0.12077973"] {
            fake(&folder.path().join(version), version).unwrap();
        }
        assert_eq!(newest(folder.path()).unwrap(), folder.path().join("27.1.2"));
        assert_eq!(newest(&folder.path().join("none")), None);
    }
}
