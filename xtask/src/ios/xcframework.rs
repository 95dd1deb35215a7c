//! An XCFramework: one folder with the same static library for several systems, and a property list that says which is
//! which. Xcode and Swift packages take it as it is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use plist::{Dictionary, Value};

use super::Slice;

/// The static library's name in every slice.
pub(super) const LIBRARY: &str = "libedgellm_ffi.a";
/// The module in which Swift finds the C functions, as crates/edgellm-ffi/uniffi.toml names it.
pub(super) const MODULE: &str = "EdgeLLMFFI";

/// Assembles the framework from the slices' libraries and the headers; replaces an older one.
pub(super) fn write(path: &Path, slices: &[(&Slice, PathBuf)], headers: &[PathBuf]) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("cannot clear {}", path.display()))?;
    }
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
    };
    for (slice, library) in slices {
        let folder = path.join(slice.identifier);
        let include = folder.join("Headers");
        fs::create_dir_all(&include).with_context(|| format!("cannot create {}", include.display()))?;
        copy(library, folder.join(LIBRARY))?;
        for header in headers {
            // A module map is found by this name only.
            let map = header.extension().is_some_and(|end| end == "modulemap");
            let name = if map { "module.modulemap".as_ref() } else { header.file_name().context("a file name")? };
            copy(header, include.join(name))?;
        }
    }
    let described = slices.iter().map(|(slice, _)| describe(slice)).collect();
    let mut info = Dictionary::new();
    info.insert("AvailableLibraries".into(), Value::Array(described));
    info.insert("CFBundlePackageType".into(), "XFWK".into());
    info.insert("XCFrameworkFormatVersion".into(), "1.0".into());
    Value::Dictionary(info).to_file_xml(path.join("Info.plist"))?;
    Ok(())
}

fn describe(slice: &Slice) -> Value {
    let mut library = Dictionary::new();
    library.insert("BinaryPath".into(), LIBRARY.into());
    library.insert("HeadersPath".into(), "Headers".into());
    library.insert("LibraryIdentifier".into(), slice.identifier.into());
    library.insert("LibraryPath".into(), LIBRARY.into());
    library.insert("SupportedArchitectures".into(), Value::Array(vec!["arm64".into()]));
    library.insert("SupportedPlatform".into(), "ios".into());
    if slice.simulator {
        library.insert("SupportedPlatformVariant".into(), "simulator".into());
    }
    Value::Dictionary(library)
}
