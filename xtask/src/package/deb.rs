//! Debian packages: an `ar` archive of a format version, control files and the installed files (deb(5)).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::ar::ar;
use super::tar::{Entry, tar_gz};

/// What a package says about itself.
pub(crate) struct Control<'a> {
    pub(crate) package: &'a str,
    pub(crate) version: &'a str,
    pub(crate) architecture: &'a str,
    pub(crate) depends: String,
    /// One line, then further lines of a longer text.
    pub(crate) description: &'a str,
}

impl Control<'_> {
    fn text(&self, entries: &[Entry]) -> String {
        let size = entries.iter().map(|e| e.bytes.len()).sum::<usize>().div_ceil(1024);
        format!(
            "Package: {}\nVersion: {}\nArchitecture: {}\nMaintainer: The EdgeLLM authors <authors@edgellm.invalid>\n\
             Installed-Size: {size}\nDepends: {}\nSection: science\nPriority: optional\nDescription: {}\n",
            self.package,
            self.version,
            self.architecture,
            self.depends,
            self.description.replace('\n', "\n ")
        )
    }
}

/// Writes a package whose entries are installed below `/`; their paths begin with `./`.
pub(crate) fn write_deb(path: &Path, control: &Control<'_>, entries: &[Entry]) -> Result<()> {
    let text = control.text(entries);
    let members = [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar.gz", tar_gz(&[Entry::file("./control", text)])?),
        ("data.tar.gz", tar_gz(entries)?),
    ];
    fs::write(path, ar(&members)?).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::has_program;
    use xshell::{Shell, cmd};

    #[test]
    fn a_package_is_read_as_its_users_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.deb");
        let control = Control {
            package: "edgellm",
            version: "1.2",
            architecture: "arm64",
            depends: "libc6 (>= 2.34)".to_owned(),
            description: "a thing\nthat runs",
        };
        write_deb(&path, &control, &[Entry::program("./usr/bin/edgellm", "x".repeat(3000))]).unwrap();
        let bytes = fs::read(&path).unwrap();
        let archive = object::read::archive::ArchiveFile::parse(&*bytes).unwrap();
        let names: Vec<_> = archive.members().map(|m| m.unwrap().name().to_owned()).collect();
        assert_eq!(names, [&b"debian-binary"[..], b"control.tar.gz", b"data.tar.gz"]);
        if !has_program("dpkg-deb") {
            return;
        }
        let shell = Shell::new().unwrap();
        let field = |name: &str| cmd!(shell, "dpkg-deb -f {path} {name}").quiet().read().unwrap();
        assert_eq!(field("Architecture"), "arm64");
        assert_eq!(field("Depends"), "libc6 (>= 2.34)");
        assert_eq!(field("Description"), "a thing\n that runs");
        let files = cmd!(shell, "dpkg-deb -c {path}").quiet().read().unwrap();
        let line = files.lines().find(|l| l.ends_with("./usr/bin/edgellm")).unwrap();
        assert!(line.starts_with("-rwxr-xr-x root/root") && line.contains("3000"), "{line}");
    }
}
