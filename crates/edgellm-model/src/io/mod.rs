//! Files: mapping them for reading, replacing them safely, and reading small ones with a limit.

mod atomic;
#[allow(unsafe_code, reason = "memory maps; see the module")]
mod mmap;
mod storage;

pub use atomic::{AtomicDir, AtomicFile, atomic_write};
pub use mmap::MappedFile;
pub use storage::{ALIGNMENT, StorageBuffer, StorageFile};

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{ModelError, Result, bytes};

/// The largest text file (configuration, tokenizer, template) that is read whole: 256 MiB. The tokenizers of real
/// models are below 40 MB.
pub const MAX_TEXT_BYTES: u64 = 256 << 20;

/// The whole of a text file of at most [`MAX_TEXT_BYTES`].
///
/// # Errors
/// The file cannot be read, is not a regular file, is too large, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
    let metadata = file.metadata().map_err(|e| ModelError::io_on("read", path, e))?;
    if !metadata.is_file() {
        return Err(ModelError::format(path, "file", "a regular file", "a folder or a device"));
    }
    if metadata.len() > MAX_TEXT_BYTES {
        return Err(ModelError::format(path, "file", format!("at most {MAX_TEXT_BYTES} bytes"), bytes(metadata.len())));
    }
    let mut content = Vec::with_capacity(metadata.len() as usize);
    // The file may grow while it is read; `take` keeps the limit.
    file.take(MAX_TEXT_BYTES).read_to_end(&mut content).map_err(|e| ModelError::io_on("read", path, e))?;
    String::from_utf8(content).map_err(|e| {
        ModelError::format(path, "text", "UTF-8", format!("other bytes at offset {}", e.utf8_error().valid_up_to()))
    })
}
