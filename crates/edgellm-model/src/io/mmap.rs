//! Read-only memory maps, and tensors' bytes that share them.
//!
//! A model file is mapped, never read: a page costs memory only once it is touched, the system may drop it again at
//! any time, and [`MappedFile::bytes`] makes a tensor of it without a copy (`bytes::Bytes::from_owner`). Where the
//! bytes are repacked instead, [`MappedFile::release`] gives the source pages back, so that loading never holds the
//! file twice.
//!
//! This is the only module of the crate with `unsafe`.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{AllocationProperty, Bytes};
use memmap2::Mmap;

use crate::error::{ModelError, Result, bytes};

/// A file mapped for reading. Clones share the map.
#[derive(Debug, Clone)]
pub struct MappedFile {
    path: PathBuf,
    map: Arc<Mmap>,
}

/// Keeps the map alive for as long as a tensor uses a part of it.
struct Part {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// The file must not be changed in place while it is mapped: the program may then see either content, and is
    /// killed by the system if the file was cut short. Files written by this crate are replaced by renaming, which
    /// leaves an existing map whole.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
        let metadata = file.metadata().map_err(|e| ModelError::io_on("read", path, e))?;
        if !metadata.is_file() {
            return Err(ModelError::format(path, "file", "a regular file", "a folder or a device"));
        }
        // SAFETY: the map is read-only and private to this process's view; that nobody changes the file in place
        // while it is mapped is the documented condition of this function, as for every program that maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io_on("map", path, e))?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map) })
    }

    /// Where the file was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file has no bytes.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The whole file.
    pub fn as_slice(&self) -> &[u8] {
        &self.map
    }

    /// A part of the file.
    ///
    /// # Errors
    /// The range is not inside the file.
    pub fn slice(&self, range: Range<usize>) -> Result<&[u8]> {
        self.map.get(range.clone()).ok_or_else(|| {
            let expected = format!("bytes {} to {}", range.start, range.end);
            ModelError::format(&self.path, "file", expected, bytes(self.len()))
        })
    }

    /// A part of the file as a tensor's bytes, without a copy. The map lives as long as they do.
    ///
    /// # Errors
    /// The range is not inside the file.
    pub fn bytes(&self, range: Range<usize>) -> Result<Bytes> {
        self.slice(range.clone())?;
        let part = Part { map: self.map.clone(), range };
        Ok(Bytes::from_shared(bytes::Bytes::from_owner(part), AllocationProperty::File))
    }

    /// Tells the system that the pages wholly inside `range` are not needed any more. Reading them again gives the
    /// same bytes, from the file. Does nothing where the system cannot do it: memory is then given back under
    /// pressure only.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let page = rustix::param::page_size();
            let start = range.start.next_multiple_of(page);
            let end = range.end.min(self.len()) / page * page;
            if start < end {
                // SAFETY: the map is read-only and backed by a file, so dropped pages are read from the file again
                // and no byte changes; the range was cut to the map.
                let dropped =
                    unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
                if let Err(error) = dropped {
                    tracing::debug!(%error, "pages of {} were not given back", self.path.display());
                }
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content: Vec<u8> = (0..100_000u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.as_slice(), content);
        let part = file.bytes(4096..90_001).unwrap();
        file.release(0..usize::MAX);
        drop(file);
        assert_eq!(&part[..], &content[4096..90_001]);
    }

    #[test]
    fn ranges_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, [0; 10]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert!(file.slice(0..10).is_ok());
        assert!(file.slice(0..11).is_err());
        assert!(file.bytes(5..usize::MAX).is_err());
        assert!(MappedFile::open(folder.path()).is_err());
        std::fs::write(&path, []).unwrap();
        assert!(MappedFile::open(&path).unwrap().is_empty());
    }
}
