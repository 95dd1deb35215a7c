//! Reading parts of a file straight from storage, past the system's cache of files.
//!
//! A model that is larger than memory is read over and over, in order: what the system keeps of it is always what is not needed
//! next, takes memory from other programs, and makes reading slower than the storage is. On Linux and Android the file is
//! opened with `O_DIRECT`, which asks for positions, lengths and addresses that are multiples of [`ALIGNMENT`]; where
//! the file system refuses that, and on other systems, it is read in the usual way.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{ModelError, Result};

/// What positions, lengths and addresses of reads have to be multiples of.
pub const ALIGNMENT: usize = 4096;

/// A file that is read in parts, from several threads.
#[derive(Debug)]
pub struct StorageFile {
    path: PathBuf,
    file: File,
    direct: bool,
}

impl StorageFile {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || File::open(path).map_err(|e| ModelError::io_on("open", path, e));
        let (file, direct) = match open_direct(path) {
            Some(file) => (file, true),
            None => (open()?, false),
        };
        Ok(Self { path: path.to_owned(), file, direct })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether reads go past the system's cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Fills `buffer` from position `offset`; fewer bytes only where the file ends. Position, length and address have to be
    /// multiples of [`ALIGNMENT`].
    ///
    /// # Errors
    /// The storage fails.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match read_at(&self.file, &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) if self.direct => {
                    // Reading goes on at a multiple; a part below that is the end of the file.
                    let whole = (done + n) / ALIGNMENT * ALIGNMENT;
                    if whole == done {
                        return Ok(done + n);
                    }
                    done = whole;
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

/// The file past the cache, if its file system can do that.
fn open_direct(path: &Path) -> Option<File> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
        // Some file systems take the flag and refuse to read.
        let mut probe = vec![0u8; 2 * ALIGNMENT];
        let start = probe.as_ptr().align_offset(ALIGNMENT);
        read_at(&file, probe.get_mut(start..start + ALIGNMENT)?, 0).is_ok().then_some(file)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let _ = path;
        None
    }
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, buffer, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, buffer, offset);
}

/// A buffer for parts of a [`StorageFile`], at an address that it can be read to.
#[derive(Debug)]
pub struct StorageBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl StorageBuffer {
    /// A buffer of zeros of at least so many bytes: the next multiple of [`ALIGNMENT`].
    pub fn new(len: usize) -> Self {
        let len = len.next_multiple_of(ALIGNMENT);
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, len }
    }
}

impl AsRef<[u8]> for StorageBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl AsMut<[u8]> for StorageBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content: Vec<u8> = (0..3 * ALIGNMENT as u32 + 100).map(|i| (i * 7 / 3) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = StorageFile::open(&path).unwrap();
        let mut buffer = StorageBuffer::new(2 * ALIGNMENT + 1);
        assert_eq!(buffer.as_ref().len(), 3 * ALIGNMENT);
        assert_eq!(file.read_at(buffer.as_mut(), 0).unwrap(), 3 * ALIGNMENT);
        assert_eq!(buffer.as_ref(), &content[..3 * ALIGNMENT]);
        assert_eq!(file.read_at(buffer.as_mut(), 2 * ALIGNMENT as u64).unwrap(), ALIGNMENT + 100);
        assert_eq!(buffer.as_ref()[..ALIGNMENT + 100], content[2 * ALIGNMENT..]);
        assert_eq!(file.read_at(buffer.as_mut(), 8 * ALIGNMENT as u64).unwrap(), 0, "behind the end");
        assert!(StorageFile::open(&folder.path().join("none")).is_err());
    }
}
