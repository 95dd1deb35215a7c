//! The archive, read as Gradle reads it. Where there is no NDK, the library in it is a stand-in that the tests link
//! themselves: it has pages and symbols like the real one, and does nothing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use xshell::{Shell, cmd};
use zip::ZipArchive;

use super::*;
use crate::repo::has_program;

/// A shared library that is no EdgeLLM, for an ABI that this machine can link for.
fn stand_in(folder: &Path) -> (&'static Abi, PathBuf) {
    let (compiler, abi) = match has_program("aarch64-linux-gnu-gcc") {
        true => ("aarch64-linux-gnu-gcc", "arm64-v8a"),
        false => ("cc", if cfg!(target_arch = "x86_64") { "x86_64" } else { "arm64-v8a" }),
    };
    let (source, library) = (folder.join("stand-in.c"), folder.join(LIBRARY_FILE));
    fs::write(&source, format!("int {FFI_SYMBOLS}_stand_in(void) {{ return 1; }}\n")).unwrap();
    let (page, shell) = (format!("-Wl,-z,max-page-size={}", ndk::PAGE), Shell::new().unwrap());
    cmd!(shell, "{compiler} -shared -fPIC -nostdlib {page} {source} -o {library}").quiet().run().unwrap();
    (Abi::find(abi).unwrap(), library)
}

fn unpack(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut zip = ZipArchive::new(File::open(path).unwrap()).unwrap();
    (0..zip.len())
        .map(|i| {
            let mut file = zip.by_index(i).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            (file.name().unwrap().into_owned(), bytes)
        })
        .collect()
}

#[test]
fn an_archive_has_what_gradle_looks_for() {
    let folder = tempfile::tempdir().unwrap();
    let (abi, library) = stand_in(folder.path());
    let path = folder.path().join("edgellm.aar");
    let write = || {
        let libraries = vec![(abi, library.clone())];
        aar::write(&path, &aar::Contents { api: 26, classes: aar::no_classes().unwrap(), libraries }).unwrap();
        fs::read(&path).unwrap()
    };
    assert_eq!(write(), write(), "the same contents are the same bytes");

    let summary = aar::read(&path).unwrap();
    assert_eq!((summary.classes, summary.abis), (0, vec![abi.name.to_owned()]));
    let files = unpack(&path);
    let text = |name: &str| String::from_utf8(files[name].clone()).unwrap();
    let manifest = text("AndroidManifest.xml");
    for part in ["package=\"org.edgellm\"", "android:minSdkVersion=\"26\"", "</manifest>"] {
        assert!(manifest.contains(part), "{manifest}");
    }
    assert!(text("proguard.txt").contains("-keep class com.sun.jna.** { *; }"));
    assert!(text("META-INF/com/android/build/gradle/aar-metadata.properties").contains("aarMetadataVersion=1.0"));
    assert!(files["R.txt"].is_empty());
    assert!(text("META-INF/LICENSE-APACHE").contains("Apache License") && text("META-INF/LICENSE-MIT").contains("MIT"));

    let jar = ZipArchive::new(std::io::Cursor::new(&files["classes.jar"])).unwrap();
    assert_eq!(jar.file_names().map(|n| n.unwrap()).collect::<Vec<_>>(), ["META-INF/MANIFEST.MF"]);

    let elf = Elf::parse(&files[&format!("jni/{}/{LIBRARY_FILE}", abi.name)]).unwrap();
    elf.expect_machine(abi.machine).unwrap();
    elf.expect_page(16384).unwrap();
    elf.expect_export(FFI_SYMBOLS).unwrap();
}

#[test]
fn libraries_that_would_not_load_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (abi, library) = stand_in(folder.path());
    let error = format!("{:#}", check(abi, &library).unwrap_err());
    assert!(error.contains("linked to nothing"), "{error}");
    let other = ABIS.iter().find(|other| other.machine != abi.machine).unwrap();
    let error = format!("{:#}", check(other, &library).unwrap_err());
    assert!(error.contains(&format!("built for {}, expected {}", abi.machine, other.machine)), "{error}");
    let elf = Elf::read(&library).unwrap();
    assert!(elf.expect_page(65536).unwrap_err().to_string().contains("aligned to 16384 bytes, expected 65536"));
    assert!(elf.expect_export("JNI_OnLoad").is_err());
}
