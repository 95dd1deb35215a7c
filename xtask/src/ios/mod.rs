//! `cargo xtask build-ios`: static libraries for iPhones and their simulator, the Swift bindings, an XCFramework and a
//! Swift package. All of it is made on any system; signing and running need a Mac.

#[cfg(test)]
mod tests;
mod xcframework;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::android::{FFI, FFI_SYMBOLS};
use crate::binary::{Archive, Platform};
use crate::bindings::Language;
use crate::toolchain::{Build, Profile};
use crate::{package, repo};

/// The framework's folder.
const FRAMEWORK: &str = "EdgeLLMFFI.xcframework";
/// Oldest iOS that is supported.
const OLDEST_IOS: &str = "15.0";

/// One static library of the framework.
pub(crate) struct Slice {
    pub(crate) target: &'static str,
    /// Its folder's name, as Xcode chooses it.
    identifier: &'static str,
    simulator: bool,
}

pub(crate) const DEVICE: Slice = Slice { target: "aarch64-apple-ios", identifier: "ios-arm64", simulator: false };
pub(crate) const SIMULATOR: Slice =
    Slice { target: "aarch64-apple-ios-sim", identifier: "ios-arm64-simulator", simulator: true };

/// Builds the static library, the Swift bindings, an XCFramework and a Swift package for iOS.
#[derive(Args)]
pub(crate) struct BuildIos {
    /// Also for the simulator of Macs with Apple's processors
    #[arg(long)]
    sim: bool,
    /// Optimize as for shipping (slow to build)
    #[arg(long)]
    release: bool,
    /// Where the results go
    #[arg(long, value_name = "DIR", default_value = "dist/ios")]
    out: PathBuf,
}

impl BuildIos {
    pub(crate) fn run(&self) -> Result<()> {
        let profile = if self.release { Profile::Dist } else { Profile::Dev };
        let out = repo::root()?.join(&self.out);
        let mut built = Vec::new();
        for slice in [&DEVICE, &SIMULATOR].into_iter().take(1 + usize::from(self.sim)) {
            let (library, line) = compile(slice, profile)?;
            println!("{line}");
            built.push((slice, library));
        }
        let swift = out.join("swift");
        package::generate(Language::Swift, &swift)?;
        assemble(&out, &swift, &built)?;
        let slices = xcframework::read(&out.join(FRAMEWORK))?.join(", ");
        println!("{}: an XCFramework ({slices}) and a Swift package", out.display());
        println!("to sign an app, or to run it on a phone or in the simulator, a Mac with Xcode is needed");
        Ok(())
    }
}

/// Builds and checks one static library; also a line about it.
pub(crate) fn compile(slice: &Slice, profile: Profile) -> Result<(PathBuf, String)> {
    let build = Build::new(slice.target, profile)?.env("IPHONEOS_DEPLOYMENT_TARGET", OLDEST_IOS);
    let path = build.library(FFI, "staticlib")?;
    let facts = Archive::read(&path)?;
    let platform = if slice.simulator { Platform::IosSimulator } else { Platform::Ios };
    facts.expect("aarch64", platform, FFI_SYMBOLS).with_context(|| path.display().to_string())?;
    let (mb, n) = (facts.bytes as f64 / 1e6, facts.objects);
    let line = format!("{}: static library ({}; {n} objects, {mb:.0} MB)", slice.target, build.toolchain.describe());
    Ok((path, line))
}

/// Puts the framework, the Swift sources and the package's manifest into `out`.
fn assemble(out: &Path, swift: &Path, built: &[(&Slice, PathBuf)]) -> Result<()> {
    let (mut headers, mut sources) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(swift).with_context(|| format!("no Swift bindings in {}", swift.display()))? {
        let path = entry?.path();
        match path.extension().and_then(|end| end.to_str()) {
            Some("h" | "modulemap") => headers.push(path),
            Some("swift") => sources.push(path),
            _ => {}
        }
    }
    ensure!(headers.len() == 2, "expected one C header and one module map in {}, found {headers:?}", swift.display());
    ensure!(!sources.is_empty(), "no Swift source in {}", swift.display());
    headers.sort();
    xcframework::write(&out.join(FRAMEWORK), built, &headers)?;
    let folder = out.join("Sources/EdgeLLM");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for source in &sources {
        fs::copy(source, folder.join(source.file_name().context("a file name")?))?;
    }
    fs::write(out.join("Package.swift"), MANIFEST.replace("MODULE", xcframework::MODULE))?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        fs::copy(repo::root()?.join(licence), out.join(licence))?;
    }
    Ok(())
}

/// The binary target has the name of the module that the Swift sources import.
const MANIFEST: &str = r#"// swift-tools-version:5.9
import PackageDescription

let package = Package(
    name: "EdgeLLM",
    platforms: [.iOS(.v15)],
    products: [.library(name: "EdgeLLM", targets: ["EdgeLLM"])],
    targets: [
        .binaryTarget(name: "MODULE", path: "EdgeLLMFFI.xcframework"),
        .target(name: "EdgeLLM", dependencies: ["MODULE"]),
    ]
)
"#;

/// CI's check: compiles for the device and assembles the framework and the package around the real library.
pub(crate) fn check() -> Result<String> {
    let out = repo::scratch("ios")?;
    let (library, line) = compile(&DEVICE, Profile::Compile)?;
    let swift = out.join("swift");
    package::generate(Language::Swift, &swift)?;
    assemble(&out, &swift, &[(&DEVICE, library)])?;
    let slices = xcframework::read(&out.join(FRAMEWORK))?.join(", ");
    Ok(format!("{line}; assembled as a framework and read back: {slices}"))
}
