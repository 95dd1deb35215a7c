//! Reading little-endian fields with every length checked against what is left of the file.

use std::path::Path;

use crate::error::{ModelError, Result, bytes};

/// A position in a file's bytes.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    path: &'a Path,
    content: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, content: &'a [u8]) -> Self {
        Self { path, content, position: 0 }
    }

    /// Bytes from the start of the file.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.content.len() - self.position
    }

    /// The next `n` bytes; `what` names them in the error.
    pub(super) fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let rest = &self.content[self.position..];
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n));
        let Some(taken) = taken else {
            let found = format!("{} left at offset {}", bytes(rest.len()), self.position);
            return Err(ModelError::format(self.path, format!("GGUF {what}"), bytes(n), found));
        };
        self.position += taken.len();
        Ok(taken)
    }

    pub(super) fn u8(&mut self, what: &str) -> Result<u8> {
        Ok(self.take(1, what)?[0])
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(N as u64, what)?;
        Ok(taken.try_into().expect("`take` gives as many bytes as asked for"))
    }

    /// A string: length, then UTF-8.
    pub(super) fn text(&mut self, what: &str) -> Result<&'a str> {
        let len = self.u64(what)?;
        let start = self.position;
        let taken = self.take(len, what)?;
        std::str::from_utf8(taken).map_err(|e| {
            let found = format!("other bytes at offset {}", start + e.valid_up_to());
            ModelError::format(self.path, format!("GGUF {what}"), "UTF-8", found)
        })
    }
}
