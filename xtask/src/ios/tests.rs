//! The framework and the package, read as Xcode and Swift read them. The libraries in them are stand-ins.

use std::fs;

use plist::Value;

use super::*;

#[test]
fn the_framework_names_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (swift, out) = (folder.path().join("swift"), folder.path().join("out"));
    fs::create_dir_all(&swift).unwrap();
    fs::create_dir_all(&out).unwrap();
    fs::write(swift.join("EdgeLLMFFI.h"), "#pragma once\n").unwrap();
    fs::write(swift.join("EdgeLLMFFI.modulemap"), "module EdgeLLMFFI { header \"EdgeLLMFFI.h\" }\n").unwrap();
    fs::write(swift.join("EdgeLLM.swift"), "import EdgeLLMFFI\n").unwrap();
    let library = folder.path().join("stand-in.a");
    fs::write(&library, "stand-in").unwrap();
    let built = [(&DEVICE, library.clone()), (&SIMULATOR, library)];
    assemble(&out, &swift, &built).unwrap();
    // A second time over the first.
    assemble(&out, &swift, &built).unwrap();

    let framework = out.join("EdgeLLMFFI.xcframework");
    let info = Value::from_file(framework.join("Info.plist")).unwrap().into_dictionary().unwrap();
    assert_eq!(info["CFBundlePackageType"].as_string(), Some("XFWK"));
    assert_eq!(info["XCFrameworkFormatVersion"].as_string(), Some("1.0"));
    let libraries = info["AvailableLibraries"].as_array().unwrap();
    assert_eq!(libraries.len(), 2);
    for (library, variant) in libraries.iter().zip([None, Some("simulator")]) {
        let library = library.as_dictionary().unwrap();
        let text = |key: &str| library[key].as_string().unwrap();
        let slice = framework.join(text("LibraryIdentifier"));
        assert_eq!(fs::read(slice.join(text("LibraryPath"))).unwrap(), b"stand-in");
        let headers = slice.join(text("HeadersPath"));
        assert!(headers.join("EdgeLLMFFI.h").is_file());
        assert!(fs::read_to_string(headers.join("module.modulemap")).unwrap().contains("module EdgeLLMFFI"));
        assert_eq!(text("SupportedPlatform"), "ios");
        assert_eq!(library["SupportedArchitectures"].as_array().unwrap()[0].as_string(), Some("arm64"));
        assert_eq!(library.get("SupportedPlatformVariant").map(|v| v.as_string().unwrap()), variant);
    }
    let manifest = fs::read_to_string(out.join("Package.swift")).unwrap();
    assert!(manifest.starts_with("// swift-tools-version:"), "Swift reads the first line");
    assert!(manifest.contains(".binaryTarget(name: \"EdgeLLMFFI\", path: \"EdgeLLMFFI.xcframework\")"), "{manifest}");
    assert!(out.join("Sources/EdgeLLM/EdgeLLM.swift").is_file());

    // What the task itself reads back refuses a library that is none.
    let error = format!("{:#}", xcframework::read(&framework).unwrap_err());
    assert!(error.contains("libedgellm_ffi.a is no static library"), "{error}");
    fs::remove_file(framework.join("Info.plist")).unwrap();
    assert!(xcframework::read(&framework).unwrap_err().to_string().contains("Info.plist cannot be read"));
}

#[test]
fn missing_bindings_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let error = assemble(folder.path(), folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("expected one C header and one module map"), "{error}");
}
