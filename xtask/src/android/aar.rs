//! An Android archive (AAR), as Gradle takes it: a zip with a manifest, classes, native libraries by ABI, rules for
//! shrinkers and licences. <https://developer.android.com/studio/projects/android-library#aar-contents>

use std::fs::{self, File};
use std::io::{Cursor, Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::LIBRARY_FILE;
use super::abi::{ABIS, Abi};
use crate::binary::Elf;
use crate::repo;

/// Android's name of the package; the Kotlin bindings lie in it.
pub(super) const PACKAGE: &str = "org.edgellm";

/// What goes into an archive.
pub(super) struct Contents<'a> {
    pub(super) api: u32,
    /// `classes.jar`: the compiled bindings, or no classes.
    pub(super) classes: Vec<u8>,
    /// A stripped shared library for each ABI.
    pub(super) libraries: Vec<(&'a Abi, PathBuf)>,
}

/// The bindings call the library through JNA, by the names of their classes and fields.
const PROGUARD: &str = "\
-keep class com.sun.jna.** { *; }
-keep class * extends com.sun.jna.** { *; }
-keep class uniffi.** { *; }
-keep class org.edgellm.** { *; }
-dontwarn java.awt.**
";
const METADATA: &str = "aarFormatVersion=1.0\naarMetadataVersion=1.0\nminCompileSdk=1\n";

fn manifest(api: u32) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n\
         <manifest xmlns:android=\"http://schemas.android.com/apk/res/android\" package=\"{PACKAGE}\">\n\
         \x20   <uses-sdk android:minSdkVersion=\"{api}\" />\n\
         </manifest>\n"
    )
}

/// Writes the archive; the same contents give the same bytes.
pub(super) fn write(path: &Path, contents: &Contents<'_>) -> Result<()> {
    let beside = path.with_extension("aar.tmp");
    let file = File::create(&beside).with_context(|| format!("cannot create {}", beside.display()))?;
    let mut zip = ZipWriter::new(file);
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated).unix_permissions(0o644);
    let mut add = |name: &str, bytes: &[u8]| -> Result<()> {
        zip.start_file(name, options)?;
        zip.write_all(bytes).with_context(|| format!("cannot write {name} into {}", beside.display()))
    };
    add("AndroidManifest.xml", manifest(contents.api).as_bytes())?;
    add("classes.jar", &contents.classes)?;
    // No resources, but readers of AARs expect the file.
    add("R.txt", b"")?;
    add("proguard.txt", PROGUARD.as_bytes())?;
    add("META-INF/com/android/build/gradle/aar-metadata.properties", METADATA.as_bytes())?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        add(&format!("META-INF/{licence}"), &fs::read(repo::root()?.join(licence))?)?;
    }
    for (abi, library) in &contents.libraries {
        let bytes = fs::read(library).with_context(|| format!("cannot read {}", library.display()))?;
        add(&format!("jni/{}/{LIBRARY_FILE}", abi.name), &bytes)?;
    }
    zip.finish()?.sync_all()?;
    fs::rename(&beside, path).with_context(|| format!("cannot write {}", path.display()))
}

/// A jar without classes.
pub(super) fn no_classes() -> Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file("META-INF/MANIFEST.MF", SimpleFileOptions::default())?;
    zip.write_all(b"Manifest-Version: 1.0\n\n")?;
    Ok(zip.finish()?.into_inner())
}

/// What is in an archive, read as Gradle reads it.
pub(super) struct Summary {
    /// Files of `classes.jar` that are classes.
    pub(super) classes: usize,
    pub(super) abis: Vec<String>,
}

/// Reads an archive back.
///
/// # Errors
/// A part that Gradle needs is missing, or a library is for another processor than its folder says.
pub(super) fn read(path: &Path) -> Result<Summary> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut zip = ZipArchive::new(file)?;
    let mut content = |name: &str| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        zip.by_name(name).with_context(|| format!("the archive has no {name}"))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let manifest = String::from_utf8(content("AndroidManifest.xml")?)?;
    ensure!(manifest.contains(&format!("package=\"{PACKAGE}\"")), "the manifest does not name {PACKAGE}");
    for name in ["R.txt", "proguard.txt", "META-INF/LICENSE-APACHE", "META-INF/LICENSE-MIT"] {
        content(name)?;
    }
    let jar = ZipArchive::new(Cursor::new(content("classes.jar")?))?;
    let names = jar.file_names().collect::<Result<Vec<_>, _>>()?;
    let classes = names.iter().filter(|name| name.ends_with(".class")).count();
    let mut abis = Vec::new();
    for abi in &ABIS {
        if let Ok(library) = content(&format!("jni/{}/{LIBRARY_FILE}", abi.name)) {
            Elf::parse(&library)?.expect_machine(abi.machine)?;
            abis.push(abi.name.to_owned());
        }
    }
    ensure!(!abis.is_empty(), "the archive has no library");
    Ok(Summary { classes, abis })
}
