//! Small files for the tests: a writer for GGUF files that does what it is told, right or wrong.
#![allow(dead_code, reason = "every test uses a part of it")]

use std::collections::BTreeMap;
use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::files::ModelFiles;
use edgellm_model::gguf::GgmlType;

/// Metadata value types by their numbers in a file.
pub(crate) mod kind {
    pub(crate) const U32: u32 = 4;
    pub(crate) const I32: u32 = 5;
    pub(crate) const F32: u32 = 6;
    pub(crate) const BOOL: u32 = 7;
    pub(crate) const STRING: u32 = 8;
    pub(crate) const ARRAY: u32 = 9;
}

/// A text as GGUF has it.
pub(crate) fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

/// An array's element type, count and elements.
pub(crate) fn array(element: u32, items: &[Vec<u8>]) -> Vec<u8> {
    let mut out = element.to_le_bytes().to_vec();
    out.extend((items.len() as u64).to_le_bytes());
    out.extend(items.concat());
    out
}

/// A GGUF file in the making. Entries are raw bytes, so that anything can be wrong.
#[derive(Clone, Default)]
pub(crate) struct GgufFile {
    entries: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufFile {
    pub(crate) fn set(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.entries.retain(|(k, ..)| k != key);
        self.entries.push((key.into(), kind, value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(k, ..)| k != key);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.set(key, kind::U32, value.to_le_bytes().to_vec())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.set(key, kind::F32, value.to_le_bytes().to_vec())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.set(key, kind::BOOL, vec![value.into()])
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.set(key, kind::STRING, text(value))
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let items: Vec<_> = values.iter().map(|v| text(v)).collect();
        self.set(key, kind::ARRAY, array(kind::STRING, &items))
    }

    pub(crate) fn ints(self, key: &str, values: &[i32]) -> Self {
        let items: Vec<_> = values.iter().map(|v| v.to_le_bytes().to_vec()).collect();
        self.set(key, kind::ARRAY, array(kind::I32, &items))
    }

    pub(crate) fn floats(self, key: &str, values: &[f32]) -> Self {
        let items: Vec<_> = values.iter().map(|v| v.to_le_bytes().to_vec()).collect();
        self.set(key, kind::ARRAY, array(kind::F32, &items))
    }

    /// A tensor with dimensions innermost first, as in the file.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, content: Vec<u8>) -> Self {
        self.tensors.retain(|(n, ..)| n != name);
        self.tensors.push((name.into(), dims.to_vec(), type_id, content));
        self
    }

    pub(crate) fn without_tensor(mut self, name: &str) -> Self {
        self.tensors.retain(|(n, ..)| n != name);
        self
    }

    /// The same entry once more.
    pub(crate) fn twice(mut self, key: &str) -> Self {
        let entry = self.entries.iter().find(|(k, ..)| k == key).unwrap().clone();
        self.entries.push(entry);
        self
    }

    /// The file; tensors one after the other at multiples of 32.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.entries {
            out.extend(text(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, dims, type_id, content) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(type_id.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + content.len() as u64).next_multiple_of(32);
        }
        for (.., content) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(content);
        }
        out
    }
}

/// Bytes of a tensor of a type, with small finite scales.
pub(crate) fn blocks(ggml_type: GgmlType, elements: usize) -> Vec<u8> {
    let len = elements / ggml_type.block_len() * ggml_type.block_bytes();
    // Below 0x3c, every pair of bytes is a small finite f16; every f32 of such bytes is finite too.
    (0..len).map(|i| (i * 7 % 59) as u8).collect()
}

/// A llama model of one block, hidden size 256, with a tokenizer of a few tokens.
pub(crate) fn small_gguf() -> GgufFile {
    let tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "Ġa"];
    let mut file = GgufFile::default()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 256)
        .u32("llama.feed_forward_length", 256)
        .u32("llama.attention.head_count", 4)
        .u32("llama.attention.head_count_kv", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "gpt-2")
        .strings("tokenizer.ggml.tokens", &tokens)
        .ints("tokenizer.ggml.token_type", &[3, 3, 3, 1, 1, 1, 1, 1])
        .strings("tokenizer.ggml.merges", &["a b", "Ġ a"])
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .string("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let vector = |file: GgufFile, name: &str| file.tensor(name, &[256], GgmlType::F32.id(), blocks(GgmlType::F32, 256));
    let matrix = |file: GgufFile, name: &str, rows: u64, ggml_type: GgmlType| {
        file.tensor(name, &[256, rows], ggml_type.id(), blocks(ggml_type, 256 * rows as usize))
    };
    file = vector(matrix(file, "token_embd.weight", 8, GgmlType::Q8_0), "output_norm.weight");
    file = vector(vector(file, "blk.0.attn_norm.weight"), "blk.0.ffn_norm.weight");
    for (part, rows, ggml_type) in [
        ("attn_q", 256, GgmlType::Q4_K),
        ("attn_k", 128, GgmlType::Q6_K),
        ("attn_v", 128, GgmlType::F16),
        ("attn_output", 256, GgmlType::Q5_1),
        ("ffn_gate", 256, GgmlType::Q2_K),
        ("ffn_up", 256, GgmlType::Q3_K),
        ("ffn_down", 256, GgmlType::BF16),
    ] {
        file = matrix(file, &format!("blk.0.{part}.weight"), rows, ggml_type);
    }
    file
}

/// A safetensors file with any header.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Opens a model and reads everything in it, as far as it goes.
pub(crate) fn read_everything(path: &Path) -> Result<(), ModelError> {
    let files = ModelFiles::open(path)?;
    for name in files.names() {
        if files.shape(name)?.len() == 1 {
            files.vector(name)?;
        } else {
            files.matrix(name)?;
        }
    }
    let tokenizer = files.tokenizer()?;
    let ids = tokenizer.encode("ab a\u{1f642} <s>", true)?;
    tokenizer.decode(&ids, false)?;
    if let Some(template) = files.chat_template()? {
        template.render(&[edgellm_model::chat::ChatMessage::new("user", "hello")], true)?;
    }
    Ok(())
}

/// The files of a directory.
pub(crate) fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// The most memory that this process ever had, in bytes, where the system says it.
pub(crate) fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
