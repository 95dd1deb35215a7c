//! An Android archive (AAR), as Gradle takes it: a zip with a manifest, classes, native libraries by ABI, rules for
//! shrinkers and licences. <https://developer.android.com/studio/projects/android-library#aar-contents>

use std::fs::{self, File};
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{LIBRARY_FILE, abi::Abi};
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
