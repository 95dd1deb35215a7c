//! How fast storage is read, past the system's cache.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use edgellm_model::ModelError;
use edgellm_model::io::{StorageBuffer, StorageFile};
use edgellm_model::values::StorageRate;

use crate::error::Result;
use crate::measure::rate;

/// Bytes of the file.
const FILE: u64 = 256 << 20;
/// Bytes of a request.
const PART: usize = 4 << 20;
/// Requests at once.
const REQUESTS: [usize; 4] = [1, 2, 4, 8];

/// A file that is removed when it is dropped.
struct Scratch<'a>(&'a Path);

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // A file that cannot be removed is litter of a name that says what it is.
        let _ = std::fs::remove_file(self.0);
    }
}

/// Writes a file into `folder` and reads it with several requests at once; empty where reads do not go past the cache.
///
/// # Errors
/// The file cannot be written or read.
pub(crate) fn measure(folder: &Path) -> Result<Vec<StorageRate>> {
    let path = folder.join(format!(".edgellm-profile-{}.tmp", std::process::id()));
    let scratch = Scratch(&path);
    let failed = |action: &'static str| move |source| ModelError::Io { action, path: folder.to_owned(), source };
    let mut file = File::create(&path).map_err(failed("create a file in"))?;
    // Not zeros, which a file system may not store.
    let mut part: Vec<u8> = (0..PART).map(|i| ((i * 31) >> 3) as u8).collect();
    for i in 0..FILE / PART as u64 {
        part[..8].copy_from_slice(&i.to_le_bytes());
        file.write_all(&part).map_err(failed("write a file of 256 MB in"))?;
    }
    file.sync_all().map_err(failed("write a file of 256 MB in"))?;
    drop(file);
    let file = StorageFile::open(&path)?;
    let mut rates = Vec::new();
    for requests in REQUESTS.into_iter().filter(|_| file.is_direct()) {
        let start = Instant::now();
        let read = |first: usize| -> std::io::Result<()> {
            let mut buffer = StorageBuffer::new(PART);
            let parts = (FILE / PART as u64) as usize;
            (first..parts)
                .step_by(requests)
                .try_for_each(|i| file.read_at(buffer.as_mut(), (i * PART) as u64).map(drop))
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..requests).map(|first| scope.spawn(move || read(first))).collect();
            let own = read(0);
            let rest = others.into_iter().map(|other| other.join().expect("a read does not panic"));
            rest.fold(own, |result, next| result.and(next))
        })
        .map_err(failed("read a file in"))?;
        let gbps = rate("reading from storage", FILE as f64 / start.elapsed().as_secs_f64() / 1e9)?;
        rates.push(StorageRate { requests, gbps });
    }
    drop(scratch);
    Ok(rates)
}
