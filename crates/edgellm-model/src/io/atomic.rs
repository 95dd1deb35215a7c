//! Replacing files and directories so that a crash, a kill or a full disk at any moment leaves the old or the new.
//!
//! A file: write beside it, sync, rename over it, sync the folder (rename within a file system is atomic by POSIX).
//! A directory: build it beside, sync every file, then exchange the two names in one step (`renameat2` with
//! `RENAME_EXCHANGE` on Linux and Android, `renamex_np` with `RENAME_SWAP` on Apple systems). Where the system or the
//! file system has no exchange, the old one is renamed aside first: a crash between the two renames leaves no
//! directory under the name, but both whole ones beside it.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{ModelError, Result};

/// Replaces the content of `path` by `content`, or creates it.
///
/// # Errors
/// Something cannot be written, synced or renamed; the file is then as it was, and nothing is left beside it.
pub fn atomic_write(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(content).map_err(|e| ModelError::io_on("write", path, e))?;
    file.commit()
}

/// A file that takes its name only when it is complete. Dropped before [`commit`](Self::commit), it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
}

impl AtomicFile {
    /// Opens a temporary file beside `target`.
    ///
    /// # Errors
    /// The folder does not exist or cannot be written.
    pub fn create(target: &Path) -> Result<Self> {
        let temporary = beside(target)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(|e| ModelError::io_on("create a file beside", target, e))?;
        Ok(Self { target: target.to_owned(), temporary, file, committed: false })
    }

    /// The path that the file will have.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// It cannot be synced or renamed; the old file is then as it was.
    pub fn commit(mut self) -> Result<()> {
        self.file.sync_all().map_err(|e| ModelError::io_on("write", &self.target, e))?;
        fs::rename(&self.temporary, &self.target).map_err(|e| ModelError::io_on("replace", &self.target, e))?;
        self.committed = true;
        sync_folder(parent(&self.target))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, content: &[u8]) -> io::Result<usize> {
        self.file.write(content)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // What failed before is the error to report; a file that cannot be removed is only litter.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A directory that takes its name only when it is complete. Dropped before [`commit`](Self::commit), it leaves
/// nothing.
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    temporary: PathBuf,
    committed: bool,
}

impl AtomicDir {
    /// Creates an empty directory beside `target`, to be filled through [`path`](Self::path).
    ///
    /// # Errors
    /// The folder that `target` is in does not exist or cannot be written.
    pub fn create(target: &Path) -> Result<Self> {
        let temporary = beside(target)?;
        fs::create_dir(&temporary).map_err(|e| ModelError::io_on("create a folder beside", target, e))?;
        Ok(Self { target: target.to_owned(), temporary, committed: false })
    }

    /// Where to write the directory's files.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Syncs the files and gives the directory its name. With `replace`, a directory of that name is removed after
    /// the new one has taken its place; without, it is an error.
    ///
    /// # Errors
    /// The name is taken, or something cannot be synced or renamed; the old directory is then as it was.
    pub fn commit(mut self, replace: bool) -> Result<()> {
        sync_tree(&self.temporary)?;
        let taken = self.target.symlink_metadata().is_ok();
        if taken && !replace {
            let source = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(ModelError::io_on("create", &self.target, source));
        }
        if taken && !self.target.is_dir() {
            return Err(ModelError::format(&self.target, "path", "a folder that can be replaced", "a file"));
        }
        if taken {
            let old = swap(&self.temporary, &self.target)?;
            self.committed = true;
            sync_folder(parent(&self.target))?;
            fs::remove_dir_all(&old).map_err(|e| ModelError::io_on("remove", &old, e))
        } else {
            fs::rename(&self.temporary, &self.target).map_err(|e| ModelError::io_on("create", &self.target, e))?;
            self.committed = true;
            sync_folder(parent(&self.target))
        }
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Puts `new` in the place of `target`; returns where the old one is now.
fn swap(new: &Path, target: &Path) -> Result<PathBuf> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
            Ok(()) => return Ok(new.to_owned()),
            // An old system, or a file system without it.
            Err(Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(ModelError::io_on("replace", target, error.into())),
        }
    }
    let aside = beside(target)?;
    fs::rename(target, &aside).map_err(|e| ModelError::io_on("replace", target, e))?;
    if let Err(error) = fs::rename(new, target) {
        // Back to how it was; the first error is the one to report.
        let _ = fs::rename(&aside, target);
        return Err(ModelError::io_on("replace", target, error));
    }
    Ok(aside)
}

/// An unused name beside `target`: hidden, and ending in `.tmp`.
fn beside(target: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let Some(name) = target.file_name() else {
        return Err(ModelError::format(target, "path", "a file name", "none"));
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.{}.tmp", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    Ok(parent(target).join(hidden))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes renames in the folder durable. Only Unix can open a folder to sync it.
fn sync_folder(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let folder = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
        folder.sync_all().map_err(|e| ModelError::io_on("sync", path, e))?;
    }
    Ok(())
}

fn sync_tree(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).map_err(|e| ModelError::io_on("read", path, e))? {
        let entry = entry.map_err(|e| ModelError::io_on("read", path, e))?;
        let kind = entry.file_type().map_err(|e| ModelError::io_on("read", &entry.path(), e))?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            // Windows syncs only through a handle that may write.
            let file = OpenOptions::new().read(true).write(cfg!(windows)).open(entry.path());
            let file = file.map_err(|e| ModelError::io_on("open", &entry.path(), e))?;
            file.sync_all().map_err(|e| ModelError::io_on("sync", &entry.path(), e))?;
        }
    }
    sync_folder(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_and_nothing_is_left_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        atomic_write(&path, b"old").unwrap();
        atomic_write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["f"]);
    }

    #[test]
    fn an_abandoned_file_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        atomic_write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["f"]);
    }

    #[test]
    fn a_directory_is_exchanged_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        for (round, content) in ["old", "new"].into_iter().enumerate() {
            let dir = AtomicDir::create(&target).unwrap();
            fs::create_dir(dir.path().join("sub")).unwrap();
            fs::write(dir.path().join("sub/f"), content).unwrap();
            dir.commit(round > 0).unwrap();
            assert_eq!(fs::read_to_string(target.join("sub/f")).unwrap(), content);
            assert_eq!(names(folder.path()), ["model"]);
        }
    }

    #[test]
    fn a_taken_name_is_an_error_without_replace() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        fs::create_dir(&target).unwrap();
        let dir = AtomicDir::create(&target).unwrap();
        fs::write(dir.path().join("f"), "new").unwrap();
        assert!(dir.commit(false).is_err());
        assert_eq!(names(folder.path()), ["model"]);
        assert_eq!(names(&target), Vec::<String>::new());
    }

    #[test]
    fn a_file_in_the_way_of_a_directory_stays() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        fs::write(&target, "a file").unwrap();
        let error = AtomicDir::create(&target).unwrap().commit(true).unwrap_err().to_string();
        assert!(error.contains("found a file"), "{error}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "a file");
        assert_eq!(names(folder.path()), ["model"]);
    }
}
