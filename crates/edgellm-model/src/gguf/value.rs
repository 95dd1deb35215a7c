//! Metadata values. Scalars and strings are read at once; an array is checked, and stays in the file.

use std::ops::Range;

use super::cursor::Cursor;
use crate::error::{ModelError, Result};

/// Arrays of arrays deeper than this are refused; no known key has even two levels.
const MAX_DEPTH: usize = 4;

/// Types of metadata values, with their numbers in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&t| t as u32 == id)
    }

    /// Bytes of a value, if they are always the same.
    fn fixed_len(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// An array in the file, checked when the file was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufArray {
    /// Type of the elements.
    pub element: ValueType,
    /// Number of elements.
    pub len: usize,
    /// Bytes of the elements in the file.
    pub range: Range<usize>,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    String(String),
    /// An array, still in the file.
    Array(GgufArray),
}

impl GgufValue {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a truth value",
            Self::String(_) => "a text",
            Self::Array(_) => "an array",
        }
    }

    /// The value as a number of things, if it is one.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(v) => Some(*v),
            Self::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a float, if it is a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Unsigned(v) => Some(*v as f64),
            Self::Signed(v) => Some(*v as f64),
            Self::Float(v) => Some(*v),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(v) => Some(v),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// Reads the type and the value of the entry `key`.
    pub(super) fn read(cursor: &mut Cursor<'_>, key: &str, path: &std::path::Path) -> Result<Self> {
        let what = || format!("metadata '{}'", crate::error::Shown(key));
        let kind = value_type(cursor.u32(&what())?, key, path)?;
        scalar(cursor, kind, &what()).and_then(|value| match value {
            Some(value) => Ok(value),
            None if kind == ValueType::String => Ok(Self::String(cursor.text(&what())?.to_owned())),
            None => Ok(Self::Array(read_array(cursor, key, path, 1)?)),
        })
    }
}

fn value_type(id: u32, key: &str, path: &std::path::Path) -> Result<ValueType> {
    ValueType::from_id(id).ok_or_else(|| {
        let what = format!("GGUF metadata '{}'", crate::error::Shown(key));
        ModelError::format(path, what, "a value type from 0 to 12", id)
    })
}

/// A value of fixed size; `None` for strings and arrays.
fn scalar(cursor: &mut Cursor<'_>, kind: ValueType, what: &str) -> Result<Option<GgufValue>> {
    Ok(Some(match kind {
        ValueType::U8 => GgufValue::Unsigned(cursor.u8(what)?.into()),
        ValueType::I8 => GgufValue::Signed((cursor.u8(what)? as i8).into()),
        ValueType::U16 => GgufValue::Unsigned(u16::from_le_bytes(cursor.array(what)?).into()),
        ValueType::I16 => GgufValue::Signed(i16::from_le_bytes(cursor.array(what)?).into()),
        ValueType::U32 => GgufValue::Unsigned(cursor.u32(what)?.into()),
        ValueType::I32 => GgufValue::Signed((cursor.u32(what)? as i32).into()),
        ValueType::U64 => GgufValue::Unsigned(cursor.u64(what)?),
        ValueType::I64 => GgufValue::Signed(cursor.u64(what)? as i64),
        ValueType::F32 => GgufValue::Float(f32::from_le_bytes(cursor.array(what)?).into()),
        ValueType::F64 => GgufValue::Float(f64::from_le_bytes(cursor.array(what)?)),
        ValueType::Bool => GgufValue::Bool(cursor.u8(what)? != 0),
        ValueType::String | ValueType::Array => return Ok(None),
    }))
}

/// Walks over an array without keeping it. The number of elements is only trusted as far as there are bytes.
fn read_array(cursor: &mut Cursor<'_>, key: &str, path: &std::path::Path, depth: usize) -> Result<GgufArray> {
    let what = format!("array '{}'", crate::error::Shown(key));
    if depth > MAX_DEPTH {
        return Err(ModelError::format(path, format!("GGUF {what}"), "arrays at most 4 deep", "deeper ones"));
    }
    let element = value_type(cursor.u32(&what)?, key, path)?;
    let count = cursor.u64(&what)?;
    let smallest = match element {
        ValueType::Array => 12,
        ValueType::String => 8,
        _ => element.fixed_len().expect("neither a string nor an array"),
    };
    let needed = count.checked_mul(smallest).filter(|&n| n <= cursor.remaining() as u64);
    if needed.is_none() {
        let found = format!("a count of {count} with {} bytes left in the file", cursor.remaining());
        return Err(ModelError::format(path, format!("GGUF {what}"), "as many elements as there is room for", found));
    }
    let start = cursor.position();
    match element {
        ValueType::String => (0..count).try_for_each(|_| cursor.text(&what).map(drop))?,
        ValueType::Array => (0..count).try_for_each(|_| read_array(cursor, key, path, depth + 1).map(drop))?,
        _ => drop(cursor.take(count * smallest, &what)?),
    }
    Ok(GgufArray { element, len: count as usize, range: start..cursor.position() })
}

impl GgufArray {
    /// The texts of an array of strings.
    pub(super) fn strings<'a>(&self, path: &'a std::path::Path, content: &'a [u8]) -> impl Iterator<Item = &'a str> {
        let count = if self.element == ValueType::String { self.len } else { 0 };
        let mut cursor = Cursor::new(path, &content[..self.range.end]);
        let skipped = cursor.take(self.range.start as u64, "array");
        // The array was walked over when the file was opened; if the file changed since, the texts end early.
        (0..if skipped.is_ok() { count } else { 0 }).map_while(move |_| cursor.text("array").ok())
    }

    /// The elements of an array of integers, as far as they fit.
    pub(super) fn integers<'a>(&self, content: &'a [u8]) -> impl Iterator<Item = i64> + 'a {
        let size = self.element.fixed_len().unwrap_or(1) as usize;
        let kind = self.element;
        let is_integer = !matches!(kind, ValueType::F32 | ValueType::F64 | ValueType::String | ValueType::Array);
        let range = if is_integer { self.range.clone() } else { 0..0 };
        content[range].chunks_exact(size).map(move |chunk| {
            let mut word = [0u8; 8];
            word[..size].copy_from_slice(chunk);
            let value = i64::from_le_bytes(word);
            match kind {
                ValueType::I8 => i64::from(value as i8),
                ValueType::I16 => i64::from(value as i16),
                ValueType::I32 => i64::from(value as i32),
                _ => value,
            }
        })
    }

    /// The elements of an array of floats.
    pub(super) fn floats<'a>(&self, content: &'a [u8]) -> impl Iterator<Item = f32> + 'a {
        let range = if self.element == ValueType::F32 { self.range.clone() } else { 0..0 };
        content[range].chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))
    }
}
