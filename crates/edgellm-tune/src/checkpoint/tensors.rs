//! `state.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::safetensors::{Dtype, Safetensors, SafetensorsWriter, TensorSpec};

use super::Buffer;

/// Values that are turned into bytes at a time, so that the state is not held twice.
const CHUNK: usize = 1 << 14;

pub(super) fn write(path: &Path, tensors: &BTreeMap<String, Buffer>) -> Result<(), ModelError> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, buffer)| {
            let dtype = match buffer {
                Buffer::F32(_) => Dtype::F32,
                Buffer::U8(_) => Dtype::U8,
                Buffer::U64(_) => Dtype::U64,
            };
            TensorSpec::new(name, dtype, [buffer.len()])
        })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs)?;
    for (name, buffer) in tensors {
        match buffer {
            Buffer::U8(values) => writer.write(name, values)?,
            Buffer::F32(values) => append(&mut writer, name, values, |v| v.to_le_bytes())?,
            Buffer::U64(values) => append(&mut writer, name, values, |v| v.to_le_bytes())?,
        }
    }
    writer.finish()
}

fn append<T: Copy, const N: usize>(
    writer: &mut SafetensorsWriter,
    name: &str,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> Result<(), ModelError> {
    // Also an empty tensor is written once.
    let mut content = Vec::with_capacity(N * CHUNK.min(values.len()));
    let mut chunks = values.chunks(CHUNK);
    let mut chunk = chunks.next().unwrap_or_default();
    loop {
        content.clear();
        content.extend(chunk.iter().flat_map(|&value| bytes(value)));
        writer.append(name, &content)?;
        match chunks.next() {
            Some(next) => chunk = next,
            None => return Ok(()),
        }
    }
}

pub(super) fn read(path: &Path) -> Result<BTreeMap<String, Buffer>, ModelError> {
    let file = Safetensors::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let (dtype, content) = (file.entry(name)?.dtype, file.slice(name)?);
        let buffer = match dtype {
            Dtype::U8 => Buffer::U8(content.to_vec()),
            Dtype::F32 => Buffer::F32(values(content, f32::from_le_bytes)),
            Dtype::U64 => Buffer::U64(values(content, u64::from_le_bytes)),
            other => {
                return Err(ModelError::Tensor {
                    path: path.to_owned(),
                    tensor: name.escape_debug().to_string(),
                    expected: "F32, U8 or U64".into(),
                    found: other.to_string(),
                });
            }
        };
        tensors.insert(name.to_owned(), buffer);
    }
    Ok(tensors)
}

/// The length of `content` is a multiple of the value's size, which the reader checks.
fn values<T, const N: usize>(content: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (values, _) = content.as_chunks::<N>();
    values.iter().map(|bytes| value(*bytes)).collect()
}
