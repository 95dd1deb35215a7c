//! An XCFramework: one folder with the same static library for several systems, and a property list that says which is
//! which. Xcode and Swift packages take it as it is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use plist::{Dictionary, Value};

use super::Slice;
use crate::android::FFI_SYMBOLS;
use crate::binary::{Archive, Platform};

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

/// Reads a framework back as Xcode does: what the property list names must be there, a library for that system and a
/// module map whose headers exist. Returns the slices' identifiers.
///
/// # Errors
/// Something that the property list names is missing or is for another processor or system.
pub(super) fn read(path: &Path) -> Result<Vec<String>> {
    let info = Value::from_file(path.join("Info.plist")).context("Info.plist cannot be read")?;
    let info = info.as_dictionary().context("Info.plist is no dictionary")?;
    let kind = info.get("CFBundlePackageType").and_then(Value::as_string);
    ensure!(kind == Some("XFWK"), "Info.plist says {kind:?}, expected XFWK");
    let libraries = info.get("AvailableLibraries").and_then(Value::as_array).context("no AvailableLibraries")?;
    ensure!(!libraries.is_empty(), "AvailableLibraries is empty");
    libraries.iter().map(|library| read_slice(path, library)).collect()
}

fn read_slice(path: &Path, library: &Value) -> Result<String> {
    let library = library.as_dictionary().context("a library is no dictionary")?;
    let text =
        |key: &str| library.get(key).and_then(Value::as_string).with_context(|| format!("a library has no {key}"));
    let identifier = text("LibraryIdentifier")?;
    ensure!(text("SupportedPlatform")? == "ios", "{identifier}: expected the platform ios");
    let folder = path.join(identifier);
    let platform = match library.get("SupportedPlatformVariant").and_then(Value::as_string) {
        Some("simulator") => Platform::IosSimulator,
        None => Platform::Ios,
        Some(other) => anyhow::bail!("{identifier}: expected the variant simulator or none, found {other}"),
    };
    let archive = folder.join(text("LibraryPath")?);
    Archive::read(&archive)?.expect("aarch64", platform, FFI_SYMBOLS).context(archive.display().to_string())?;
    let headers = folder.join(text("HeadersPath")?);
    let map = fs::read_to_string(headers.join("module.modulemap")).context("no module.modulemap")?;
    ensure!(map.contains(&format!("module {MODULE} ")), "the module map has no module {MODULE}: {map}");
    let named: Vec<_> = map.lines().filter_map(|line| line.trim().strip_prefix("header ")).collect();
    ensure!(!named.is_empty(), "the module map names no header: {map}");
    for header in named {
        let header = headers.join(header.trim_matches('"'));
        ensure!(header.is_file(), "the module map names {}, which is not there", header.display());
    }
    Ok(identifier.to_owned())
}
