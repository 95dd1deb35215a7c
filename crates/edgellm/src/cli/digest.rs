//! Digests of files and folders, which tell whether they are still the same.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The SHA-256 of a file, or of the names and contents of a folder's files, by name.
///
/// # Errors
/// What cannot be read, and why.
pub(crate) fn contents(path: &Path) -> Result<String, (PathBuf, io::Error)> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    let mut hash = Sha256::new();
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = std::fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
            .map_err(failed(path))?;
        files.retain(|file| file.is_file());
        files.sort();
    }
    for file in files {
        if path.is_dir() {
            hash.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        }
        let mut reader = File::open(&file).map_err(failed(&file))?;
        io::copy(&mut reader, &mut HashWriter(&mut hash)).map_err(failed(&file))?;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
