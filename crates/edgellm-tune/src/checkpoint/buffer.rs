//! Flat, typed data: what a checkpoint is made of.

/// A flat list of numbers of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum Buffer {
    /// Parameters, moments and scales.
    F32(Vec<f32>),
    /// Codes of 8-bit moments, or bytes of any meaning.
    U8(Vec<u8>),
    /// Counters.
    U64(Vec<u64>),
}

impl Buffer {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Buffer::F32(values) => values.len(),
            Buffer::U8(values) => values.len(),
            Buffer::U64(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it is, for messages: `3 values of f32`.
    pub(crate) fn describe(&self) -> String {
        let kind = match self {
            Buffer::F32(_) => "f32",
            Buffer::U8(_) => "u8",
            Buffer::U64(_) => "u64",
        };
        format!("{} values of {kind}", self.len())
    }
}

/// A buffer and the name under which it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedBuffer {
    /// Name in the checkpoint.
    pub name: String,
    /// Content.
    pub data: Buffer,
}

impl NamedBuffer {
    /// A buffer with a name.
    pub fn new(name: impl Into<String>, data: Buffer) -> Self {
        Self { name: name.into(), data }
    }
}
