//! The file as a whole: opening, metadata look-ups, the tensor table.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::GgmlType;
use super::cursor::Cursor;
use super::value::{GgufArray, GgufValue};
use crate::error::{ModelError, Result, Shown, bytes};
use crate::io::MappedFile;

/// Bytes of the shortest metadata entry: key length, a one-letter key, type, one byte of value.
const SMALLEST_ENTRY: u64 = 8 + 1 + 4 + 1;
/// Bytes of the shortest tensor entry: name length, a one-letter name, dimensions, type, offset.
const SMALLEST_TENSOR: u64 = 8 + 1 + 4 + 4 + 8;
/// GGML's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// An entry of the tensor table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Element type.
    pub ggml_type: GgmlType,
    /// Dimensions, outermost first (the file has them the other way round).
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub range: Range<usize>,
}

/// A mapped GGUF file.
#[derive(Debug, Clone)]
pub struct Gguf {
    file: MappedFile,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl Gguf {
    /// Opens and checks a file: header, metadata, tensor table, and that every tensor lies in the file.
    ///
    /// # Errors
    /// The file cannot be mapped, is no GGUF file of version 2 or 3, is cut short, or contradicts itself; a tensor
    /// has a type that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let mut cursor = Cursor::new(path, file.as_slice());
        let (n_tensors, n_entries) = read_header(&mut cursor, path)?;
        let metadata = read_metadata(&mut cursor, path, n_entries)?;
        let alignment = read_alignment(&metadata, path)?;
        let mut table = Vec::with_capacity(n_tensors as usize);
        for _ in 0..n_tensors {
            table.push(read_tensor(&mut cursor, path)?);
        }
        let start = (cursor.position() as u64).next_multiple_of(alignment);
        let tensors = place_tensors(table, path, start, file.len() as u64, alignment)?;
        Ok(Self { file, metadata, tensors })
    }

    /// The file.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, GgufValue> {
        &self.metadata
    }

    /// The tensor table, by GGUF name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// A tensor's bytes.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<(&GgufTensor, &[u8])> {
        let tensor = self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor {
            path: self.path().to_owned(),
            tensor: Shown(name).to_string(),
            available: self.tensors.len(),
        })?;
        Ok((tensor, self.file.slice(tensor.range.clone())?))
    }

    fn get<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a GgufValue) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wrong = || ModelError::config(self.path(), key, expected, value.kind());
        read(value).map(Some).ok_or_else(wrong)
    }

    /// A count; `None` if the key is not there.
    ///
    /// # Errors
    /// The value is no integer from 0.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "an integer from 0", GgufValue::as_u64)
    }

    /// A float; `None` if the key is not there.
    ///
    /// # Errors
    /// The value is no number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a number", GgufValue::as_f64)
    }

    /// A truth value; `None` if the key is not there.
    ///
    /// # Errors
    /// The value is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a truth value", GgufValue::as_bool)
    }

    /// A text; `None` if the key is not there.
    ///
    /// # Errors
    /// The value is something else.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", GgufValue::as_str)
    }

    fn array(&self, key: &str) -> Result<Option<&GgufArray>> {
        self.get(key, "an array", |value| match value {
            GgufValue::Array(array) => Some(array),
            _ => None,
        })
    }

    /// The texts of an array; `None` if the key is not there.
    ///
    /// # Errors
    /// The value is no array of texts.
    pub fn strings(&self, key: &str) -> Result<Option<impl Iterator<Item = &str>>> {
        let Some(array) = self.array(key)? else { return Ok(None) };
        if array.element != super::ValueType::String {
            return Err(ModelError::config(self.path(), key, "an array of texts", "an array of something else"));
        }
        Ok(Some(array.strings(self.path(), self.file.as_slice())))
    }

    /// The integers of an array; `None` if the key is not there, empty if its elements are no integers.
    ///
    /// # Errors
    /// The value is no array.
    pub fn integers(&self, key: &str) -> Result<Option<impl Iterator<Item = i64>>> {
        Ok(self.array(key)?.map(|array| array.integers(self.file.as_slice())))
    }

    /// The floats of an array; `None` if the key is not there, empty if its elements are no floats.
    ///
    /// # Errors
    /// The value is no array.
    pub fn floats(&self, key: &str) -> Result<Option<impl Iterator<Item = f32>>> {
        Ok(self.array(key)?.map(|array| array.floats(self.file.as_slice())))
    }

    /// Gives the pages of the metadata back to the system, after the tokenizer was built.
    pub fn release_metadata(&self) {
        let first = self.tensors.values().map(|t| t.range.start).min();
        self.file.release(0..first.unwrap_or(self.file.len()));
    }
}

/// Checks magic, version and counts; returns the numbers of tensors and of metadata entries.
fn read_header(cursor: &mut Cursor<'_>, path: &Path) -> Result<(u64, u64)> {
    let magic = cursor.take(4, "magic")?;
    if magic != b"GGUF" {
        return Err(ModelError::format(path, "GGUF magic", "the letters GGUF", format!("bytes {magic:02x?}")));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        if (2..=3).contains(&version.swap_bytes()) {
            return Err(ModelError::unsupported(path, "a big-endian GGUF file", "little-endian"));
        }
        return Err(ModelError::unsupported(path, format!("GGUF version {version}"), "versions 2 and 3"));
    }
    let n_tensors = cursor.u64("tensor count")?;
    let n_entries = cursor.u64("metadata count")?;
    let room = |count: u64, smallest: u64, what: &str| {
        let fits = count.checked_mul(smallest).is_some_and(|n| n <= cursor.remaining() as u64);
        let expected = format!("at most what {} hold", bytes(cursor.remaining()));
        if fits { Ok(()) } else { Err(ModelError::format(path, format!("GGUF {what} count"), expected, count)) }
    };
    room(n_tensors, SMALLEST_TENSOR, "tensor")?;
    room(n_entries, SMALLEST_ENTRY, "metadata")?;
    Ok((n_tensors, n_entries))
}

fn read_metadata(cursor: &mut Cursor<'_>, path: &Path, count: u64) -> Result<BTreeMap<String, GgufValue>> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.text("metadata key")?;
        let value = GgufValue::read(cursor, key, path)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            let what = format!("GGUF metadata '{}'", Shown(key));
            return Err(ModelError::format(path, what, "every key once", "the key twice"));
        }
    }
    Ok(metadata)
}

fn read_alignment(metadata: &BTreeMap<String, GgufValue>, path: &Path) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        // 1 GiB is far above any page size.
        Some(alignment) if alignment.is_power_of_two() && (8..=1 << 30).contains(&alignment) => Ok(alignment),
        Some(alignment) => Err(ModelError::config(path, KEY, "a power of two from 8", alignment)),
        None => Err(ModelError::config(path, KEY, "a power of two from 8", value.kind())),
    }
}

/// A tensor of the table, before its place in the file is known.
struct Unplaced {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<usize>,
    offset: u64,
    len: u64,
}

fn read_tensor(cursor: &mut Cursor<'_>, path: &Path) -> Result<Unplaced> {
    let name = cursor.text("tensor name")?.to_owned();
    let n_dims = cursor.u32("tensor dimensions")?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(ModelError::tensor(path, &name, "1 to 4 dimensions", n_dims));
    }
    let mut dims = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        dims.push(cursor.u64("tensor dimensions")?);
    }
    let id = cursor.u32("tensor type")?;
    let offset = cursor.u64("tensor offset")?;
    let Some(ggml_type) = GgmlType::from_id(id) else {
        let what = format!("tensor '{}' of GGML type {id}", Shown(&name));
        return Err(ModelError::unsupported(path, what, GgmlType::names()));
    };
    let len = (ggml_type.block_len() as u64, ggml_type.block_bytes() as u64);
    let len = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).and_then(|n| {
        let whole = n > 0 && dims[0] % len.0 == 0;
        if whole { (n / len.0).checked_mul(len.1) } else { None }
    });
    let shape: Option<Vec<usize>> = dims.iter().rev().map(|&dim| usize::try_from(dim).ok()).collect();
    match (len, shape) {
        (Some(len), Some(shape)) => Ok(Unplaced { name, ggml_type, shape, offset, len }),
        _ => {
            let expected = format!("rows of whole blocks of {} elements of {ggml_type}", ggml_type.block_len());
            Err(ModelError::tensor(path, &name, expected, format!("dimensions {dims:?}")))
        }
    }
}

/// Checks that every tensor lies in the file, aligned, and that none lies over another.
fn place_tensors(
    mut table: Vec<Unplaced>,
    path: &Path,
    start: u64,
    file_len: u64,
    alignment: u64,
) -> Result<BTreeMap<String, GgufTensor>> {
    table.sort_by_key(|t| t.offset);
    let mut tensors = BTreeMap::new();
    let mut previous_end = 0;
    for tensor in table {
        let Unplaced { name, ggml_type, shape, offset, len } = tensor;
        if offset % alignment != 0 {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(ModelError::tensor(path, &name, expected, offset));
        }
        let end = start.checked_add(offset).and_then(|from| from.checked_add(len));
        let Some(end) = end.filter(|&end| end <= file_len) else {
            let expected = format!("{} from offset {offset} of the data", bytes(len));
            let found = format!("a file of {file_len} bytes with its data from {start}");
            return Err(ModelError::tensor(path, &name, expected, found));
        };
        if offset < previous_end {
            return Err(ModelError::tensor(path, &name, "a place of its own", "one that overlaps another tensor"));
        }
        previous_end = offset + len;
        let range = (end - len) as usize..end as usize;
        if tensors.insert(name.clone(), GgufTensor { ggml_type, shape, range }).is_some() {
            return Err(ModelError::tensor(path, &name, "every tensor once", "the tensor twice"));
        }
    }
    Ok(tensors)
}
