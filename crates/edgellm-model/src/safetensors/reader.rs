//! The reader: headers are parsed and checked when a model is opened, tensors are mapped when they are asked for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::byte_len;
use crate::error::{ModelError, Result, Shown, bytes};
use crate::io::{MappedFile, read_text};

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;
/// The largest header that is parsed, as in the safetensors library.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where a tensor is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub range: Range<usize>,
    /// The file, as an index into the model's files.
    file: usize,
}

/// Where the bytes of a tensor lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlace<'a> {
    /// The file.
    pub path: &'a Path,
    /// From which byte to which.
    pub range: Range<u64>,
}

/// One or more mapped safetensors files, read as one set of tensors.
#[derive(Debug, Clone)]
pub struct Safetensors {
    path: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    /// Opens one file.
    ///
    /// # Errors
    /// The file cannot be mapped, or its header is not that of a safetensors file of this size.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let tensors = parse_header(path, file.as_slice(), 0)?.into_iter().collect();
        Ok(Self { path: path.to_owned(), files: vec![file], tensors })
    }

    /// Opens the model in a directory: `model.safetensors`, or the shards of `model.safetensors.index.json`.
    ///
    /// # Errors
    /// There is neither, a shard is missing, or a shard does not hold what the index says.
    pub fn open_dir(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.is_file() {
            Self::open(&single)
        } else if index.is_file() {
            Self::open_index(&index)
        } else {
            let expected = "model.safetensors or model.safetensors.index.json";
            Err(ModelError::format(dir, "model folder", expected, "neither"))
        }
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index: Index = serde_json::from_str(&read_text(path)?)
            .map_err(|e| ModelError::format(path, "shard index", "a JSON object with a 'weight_map'", e))?;
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut files: Vec<MappedFile> = Vec::new();
        let mut shards: BTreeMap<&str, BTreeMap<String, TensorEntry>> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, shard) in &index.weight_map {
            if !shards.contains_key(shard.as_str()) {
                let file = MappedFile::open(&shard_path(path, dir, shard)?)?;
                let entries = parse_header(file.path(), file.as_slice(), files.len())?;
                shards.insert(shard, entries.into_iter().collect());
                files.push(file);
            }
            let entry = shards.get_mut(shard.as_str()).and_then(|entries| entries.remove(name));
            let Some(entry) = entry else {
                let expected = format!("in {}, as the index says", Shown(shard));
                return Err(ModelError::tensor(path, name, expected, "no such tensor there"));
            };
            tensors.insert(name.clone(), entry);
        }
        Ok(Self { path: path.to_owned(), files, tensors })
    }

    /// The file, or the index of a sharded model.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.len() as u64).sum()
    }

    /// What is known of a tensor without reading it.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// As [`get`](Self::get), with an error that names the tensor.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn entry(&self, name: &str) -> Result<&TensorEntry> {
        self.get(name).ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            tensor: Shown(name).to_string(),
            available: self.tensors.len(),
        })
    }

    /// A tensor's bytes in the map.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn slice(&self, name: &str) -> Result<&[u8]> {
        let entry = self.entry(name)?;
        self.files[entry.file].slice(entry.range.clone())
    }

    /// A tensor's bytes, sharing the map.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<Bytes> {
        let entry = self.entry(name)?;
        self.files[entry.file].bytes(entry.range.clone())
    }

    /// The file that a tensor is in, and where in it.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn place(&self, name: &str) -> Result<TensorPlace<'_>> {
        let entry = self.entry(name)?;
        let range = entry.range.start as u64..entry.range.end as u64;
        Ok(TensorPlace { path: self.files[entry.file].path(), range })
    }

    /// Gives a tensor's pages back to the system, after it was copied.
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.get(name) {
            self.files[entry.file].release(entry.range.clone());
        }
    }
}

/// A shard beside its index. A name that leads elsewhere is refused: an index must not make us read other files.
fn shard_path(index: &Path, dir: &Path, shard: &str) -> Result<PathBuf> {
    let mut parts = Path::new(shard).components();
    let plain = matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None));
    if !plain || shard.contains(['/', '\\']) {
        return Err(ModelError::format(
            index,
            "shard name",
            "a file name without a folder",
            format!("'{}'", Shown(shard)),
        ));
    }
    Ok(dir.join(shard))
}

/// The tensors of one file, with ranges in the whole file.
fn parse_header(path: &Path, content: &[u8], file: usize) -> Result<Vec<(String, TensorEntry)>> {
    let Some(length) = content.first_chunk::<LENGTH_BYTES>() else {
        return Err(ModelError::format(path, "safetensors header", "at least 8 bytes", bytes(content.len())));
    };
    let length = u64::from_le_bytes(*length);
    let rest = (content.len() - LENGTH_BYTES) as u64;
    let limit = rest.min(MAX_HEADER_BYTES);
    if length > limit {
        let expected = format!("a length of at most {limit} bytes");
        return Err(ModelError::format(path, "safetensors header", expected, bytes(length)));
    }
    let (header, metadata) = SafeTensors::read_metadata(content).map_err(|e| header_error(path, content.len(), e))?;
    let start = LENGTH_BYTES + header;
    let infos = metadata.tensors();
    let mut entries = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let (from, to) = info.data_offsets;
        let expected = byte_len(info.dtype, &info.shape);
        // The library has checked this too; a tensor's range is what everything else relies on.
        if expected != to.checked_sub(from) || to > content.len() - start {
            let expected = expected.map_or("a size that can be counted".into(), bytes);
            return Err(ModelError::tensor(path, &name, expected, format!("the range {from} to {to}")));
        }
        let range = start + from..start + to;
        entries.push((name, TensorEntry { dtype: info.dtype, shape: info.shape.clone(), range, file }));
    }
    Ok(entries)
}

fn header_error(path: &Path, file_len: usize, error: SafeTensorError) -> ModelError {
    let (what, expected) = match &error {
        SafeTensorError::InvalidHeader(_) => ("safetensors header", "UTF-8"),
        SafeTensorError::InvalidHeaderDeserialization(_) | SafeTensorError::JsonError(_) => {
            ("safetensors header", "a JSON object of tensors with 'dtype', 'shape' and 'data_offsets'")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            let found = format!("another size, in a file of {file_len} bytes");
            return ModelError::format(path, "safetensors data", "exactly the bytes that the header describes", found);
        }
        SafeTensorError::InvalidOffset(_) => ("safetensors header", "tensors without gaps or overlaps"),
        _ => ("safetensors header", "consistent shapes, types and offsets"),
    };
    ModelError::format(path, what, expected, Shown(&error.to_string()))
}
