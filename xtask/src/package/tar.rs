//! Tar archives in the POSIX ustar format, compressed by gzip: files and their folders, owned by root, with a fixed time.

use std::collections::BTreeSet;
use std::io::Write as _;

use anyhow::{Result, ensure};
use flate2::{Compression, GzBuilder};

/// A file of an archive.
pub(crate) struct Entry {
    /// Path in the archive, relative, with `/`.
    pub(crate) path: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) executable: bool,
}

impl Entry {
    pub(crate) fn file(path: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), bytes: bytes.into(), executable: false }
    }

    pub(crate) fn program(path: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { executable: true, ..Self::file(path, bytes) }
    }
}

/// 1980-01-01, the earliest time that zip files can hold as well.
const TIME: u64 = 315_532_800;
const BLOCK: usize = 512;
/// Longest path of a header without its prefix field.
const LONGEST: usize = 100;

/// The entries in a compressed archive, each folder before what is in it.
///
/// # Errors
/// A path of more than 100 bytes.
pub(crate) fn tar_gz(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut gz = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    let mut folders = BTreeSet::new();
    for entry in entries {
        let above = entry.path.match_indices('/').map(|(at, _)| &entry.path[..=at]);
        for folder in above.filter(|f| *f != "./") {
            if folders.insert(folder.to_owned()) {
                gz.write_all(&header(folder, b'5', 0o755, 0)?)?;
            }
        }
        let mode = if entry.executable { 0o755 } else { 0o644 };
        gz.write_all(&header(&entry.path, b'0', mode, entry.bytes.len())?)?;
        gz.write_all(&entry.bytes)?;
        gz.write_all(&vec![0; entry.bytes.len().next_multiple_of(BLOCK) - entry.bytes.len()])?;
    }
    gz.write_all(&[0; 2 * BLOCK])?;
    Ok(gz.finish()?)
}

fn header(path: &str, kind: u8, mode: u32, size: usize) -> Result<[u8; BLOCK]> {
    ensure!(path.len() <= LONGEST, "{path} is longer than {LONGEST} bytes");
    let mut block = [0; BLOCK];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, &format!("{TIME:011o}"));
    // The checksum counts its own field as blanks.
    put(148, "        ");
    put(257, "ustar\x0000");
    put(265, "root");
    put(297, "root");
    block[156] = kind;
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xshell::{Shell, cmd};

    #[test]
    fn another_tar_unpacks_it() {
        let folder = tempfile::tempdir().unwrap();
        let long = vec![7; 700];
        let entries = [
            Entry::program("./a/bin/x", "#!/bin/sh\necho hi\n"),
            Entry::file("./a/y", long.clone()),
            Entry::file("./z", ""),
        ];
        let bytes = tar_gz(&entries).unwrap();
        assert_eq!(bytes, tar_gz(&entries).unwrap());
        std::fs::write(folder.path().join("t.tar.gz"), bytes).unwrap();
        let shell = Shell::new().unwrap();
        shell.change_dir(folder.path());
        cmd!(shell, "tar -xzf t.tar.gz").quiet().run().unwrap();
        assert_eq!(cmd!(shell, "a/bin/x").quiet().read().unwrap(), "hi");
        assert_eq!(std::fs::read(folder.path().join("a/y")).unwrap(), long);
        assert_eq!(std::fs::read(folder.path().join("z")).unwrap(), b"");
    }

    #[test]
    fn paths_that_do_not_fit_are_errors() {
        assert!(tar_gz(&[Entry::file("x".repeat(101), "")]).is_err());
    }
}
