//! The writer: tensors are announced first, then written one by one in any order, so that a model larger than memory
//! can be written. The file takes its name only when all of them are there.
//!
//! The format has no gaps between tensors, so alignment is made by the header's padding and the order of the data:
//! tensors whose sizes are multiples of 64 bytes come first, then those of 32, and so on. The data starts at a
//! multiple of 64.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::byte_len;
use crate::error::{ModelError, Result, bytes};
use crate::io::AtomicFile;

const ALIGNMENT: usize = 64;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A specification.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }
}

struct Slot {
    start: u64,
    len: usize,
    /// Bytes written so far; `None` before the first.
    filled: Option<usize>,
}

/// Writes a safetensors file tensor by tensor. Dropped before [`finish`](Self::finish), it leaves nothing, and a
/// file that was there before is as it was.
pub struct SafetensorsWriter {
    file: AtomicFile,
    position: u64,
    slots: BTreeMap<String, Slot>,
}

impl SafetensorsWriter {
    /// Starts a file with the given tensors. The file's metadata is `{"format": "pt"}`, which Hugging Face's
    /// libraries ask for.
    ///
    /// # Errors
    /// A name comes twice, a size cannot be counted, or the file cannot be created or written.
    pub fn create(path: &Path, specs: &[TensorSpec]) -> Result<Self> {
        let layout = arrange(path, specs)?;
        let header = header(&layout);
        let data_start = header.len() as u64;
        let mut file = AtomicFile::create(path)?;
        file.write_all(&header).map_err(|e| ModelError::io_on("write", path, e))?;
        let slots = layout.into_iter().map(|(spec, start, len)| {
            (spec.name.clone(), Slot { start: data_start + start as u64, len, filled: None })
        });
        Ok(Self { file, position: data_start, slots: slots.collect() })
    }

    /// Writes a tensor's little-endian, row-major bytes.
    ///
    /// # Errors
    /// The tensor was not announced or is already written, its size is another, or the file cannot be written.
    pub fn write(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let len = self.slot(name)?.len;
        if len != content.len() {
            return Err(ModelError::tensor(self.file.target(), name, bytes(len), bytes(content.len())));
        }
        if self.slot(name)?.filled.is_some() {
            return Err(ModelError::tensor(self.file.target(), name, "every tensor once", "the tensor twice"));
        }
        self.append(name, content)
    }

    /// Writes the next bytes of a tensor, for tensors that are not held whole. Several tensors may be appended to in turn.
    ///
    /// # Errors
    /// The tensor was not announced, these are more bytes than it has left, or the file cannot be written.
    pub fn append(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let position = self.position;
        let slot = self.slot(name)?;
        let filled = slot.filled.unwrap_or(0);
        let (len, start) = (slot.len, slot.start + filled as u64);
        if len - filled < content.len() {
            let found = format!("{} after {}", bytes(content.len()), bytes(filled));
            return Err(ModelError::tensor(self.file.target(), name, bytes(len), found));
        }
        slot.filled = Some(filled + content.len());
        let path = self.file.target().to_owned();
        let failed = |e| ModelError::io_on("write", &path, e);
        if position != start {
            self.file.seek(SeekFrom::Start(start)).map_err(failed)?;
        }
        self.file.write_all(content).map_err(failed)?;
        self.position = start + content.len() as u64;
        Ok(())
    }

    fn slot(&mut self, name: &str) -> Result<&mut Slot> {
        let path = self.file.target();
        match self.slots.get_mut(name) {
            Some(slot) => Ok(slot),
            None => Err(ModelError::tensor(path, name, "one of the tensors announced", "another name")),
        }
    }

    /// Syncs the file and puts it in its place.
    ///
    /// # Errors
    /// A tensor is missing or not whole, or the file cannot be synced or renamed.
    pub fn finish(self) -> Result<()> {
        if let Some((name, slot)) = self.slots.iter().find(|(_, slot)| slot.filled != Some(slot.len)) {
            let found = slot.filled.map_or_else(|| "none".to_owned(), |filled| format!("{filled} of {}", slot.len));
            return Err(ModelError::tensor(self.file.target(), name, "its bytes before the end", found));
        }
        self.file.commit()
    }
}

/// The tensors in file order, with their offsets and sizes in the data.
fn arrange<'a>(path: &Path, specs: &'a [TensorSpec]) -> Result<Vec<(&'a TensorSpec, usize, usize)>> {
    let mut order = Vec::with_capacity(specs.len());
    let mut names = std::collections::BTreeSet::new();
    for spec in specs {
        if !names.insert(&spec.name) {
            return Err(ModelError::tensor(path, &spec.name, "every tensor once", "the tensor twice"));
        }
        let Some(len) = byte_len(spec.dtype, &spec.shape) else {
            let found = format!("shape {:?} of {}", spec.shape, spec.dtype);
            return Err(ModelError::tensor(path, &spec.name, "a whole number of bytes that can be counted", found));
        };
        order.push((spec, len));
    }
    // A stable sort: within an alignment, the caller's order.
    order.sort_by_key(|(_, len)| std::cmp::Reverse((len | ALIGNMENT).trailing_zeros()));
    let mut start = 0usize;
    let mut layout = Vec::with_capacity(order.len());
    for (spec, len) in order {
        layout.push((spec, start, len));
        start = start.checked_add(len).ok_or_else(|| {
            ModelError::tensor(path, &spec.name, "a file size that can be counted", "one that cannot")
        })?;
    }
    Ok(layout)
}

/// Length and JSON, padded with spaces so that the data is aligned.
fn header(layout: &[(&TensorSpec, usize, usize)]) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("__metadata__".into(), json!({"format": "pt"}));
    for (spec, start, len) in layout {
        let info = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, start + len]});
        object.insert(spec.name.clone(), info);
    }
    let mut text = Value::Object(object).to_string().into_bytes();
    let whole = (text.len() + 8).next_multiple_of(ALIGNMENT);
    text.resize(whole - 8, b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}
