//! A model on disk: a Hugging Face directory, a compressed directory of ours, or a GGUF file, behind one set of names.
//!
//! Opening reads headers and configuration only. A tensor is mapped, or repacked without loss, when it is asked for;
//! the pages of what was repacked are given back at once, so that loading holds a model about once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;
use edgellm_kernels::{Arrangement, Format, PackedHost, PackedLayout};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::arch::{GGUF_ROPE_FACTORS, hf_name, interleaved_row};
use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result, Shown};
use crate::gguf::{self, Gguf};
use crate::io::read_text;
use crate::safetensors::{Dtype, Safetensors, TensorEntry, TensorPlace};
use crate::tokenizer::Tokenizer;
use crate::values::CompressionPolicy;

/// `quant_method` of our compressed directories.
pub const QUANT_METHOD: &str = "edgellm";
/// The version of their layout that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Format and shape of a packed tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackedTensor {
    /// How it is packed.
    pub format: Format,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// In which order its words lie.
    #[serde(default, skip_serializing_if = "is_rows")]
    pub arrangement: Arrangement,
}

fn is_rows(arrangement: &Arrangement) -> bool {
    *arrangement == Arrangement::Rows
}

impl PackedTensor {
    /// The tensor of a layout.
    pub fn of(layout: PackedLayout) -> Self {
        PackedTensor { format: layout.format, shape: [layout.rows, layout.cols], arrangement: layout.arrangement }
    }
}

/// `quantization_config` of a compressed directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizationConfig {
    /// [`QUANT_METHOD`].
    pub quant_method: String,
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// The packed tensors, by Hugging Face name.
    pub tensors: BTreeMap<String, PackedTensor>,
    /// The policy that they were packed by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<CompressionPolicy>,
}

/// The names under which `model.safetensors` holds the codes and the scales of a packed tensor: for
/// `x.weight`, `x.qweight` and `x.qscales`, both u32 with one row for each row of the matrix.
pub fn packed_names(name: &str) -> (String, String) {
    let stem = name.strip_suffix(".weight").unwrap_or(name);
    (format!("{stem}.qweight"), format!("{stem}.qscales"))
}

/// A model on disk.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    path: PathBuf,
    config: ModelConfig,
    quantization: Option<QuantizationConfig>,
    source: Source,
    /// Hugging Face name to the name in the file.
    names: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
enum Source {
    Directory(Safetensors),
    Gguf(Gguf),
}

impl ModelFiles {
    /// Opens a directory with a `config.json`, or a GGUF file.
    ///
    /// # Errors
    /// There is no model, its files contradict each other, or it has parts that are not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = path.metadata().map_err(|e| ModelError::io_on("open", path, e))?;
        if metadata.is_dir() { Self::open_dir(path) } else { Self::open_gguf(path) }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let config = ModelConfig::from_json(path, gguf::config_json(&gguf)?)?;
        let mut names = BTreeMap::new();
        for name in gguf.tensors().keys().filter(|name| *name != GGUF_ROPE_FACTORS) {
            let Some(hf) = hf_name(name) else {
                let what = format!("tensor '{}' of a {} model", Shown(name), config.architecture.gguf);
                return Err(ModelError::unsupported(
                    path,
                    what,
                    "embedding, attention, gated feed-forward, norms, head",
                ));
            };
            names.insert(hf, name.clone());
        }
        let source = Source::Gguf(gguf);
        Ok(Self { path: path.to_owned(), config, quantization: None, source, names })
    }

    fn open_dir(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let mut config = ModelConfig::parse(&config_path, &read_text(&config_path)?)?;
        let generation = path.join("generation_config.json");
        if generation.is_file() {
            config.add_generation_config(&generation, &read_text(&generation)?)?;
        }
        let quantization = read_quantization(&config_path, &config)?;
        let tensors = Safetensors::open_dir(path)?;
        let mut names: BTreeMap<String, String> = tensors.names().map(|n| (n.to_owned(), n.to_owned())).collect();
        for (name, packed) in quantization.iter().flat_map(|q| &q.tensors) {
            check_packed(&tensors, name, packed)?;
            let (codes, scales) = packed_names(name);
            names.remove(&codes);
            names.remove(&scales);
            if names.insert(name.clone(), name.clone()).is_some() {
                return Err(ModelError::tensor(path, name, "either packed or not", "both"));
            }
        }
        let source = Source::Directory(tensors);
        Ok(Self { path: path.to_owned(), config, quantization, source, names })
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What a compressed directory says of its tensors.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// The GGUF file, if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::Directory(_) => None,
        }
    }

    /// Hugging Face names of all tensors, in order, such as `model.layers.0.self_attn.q_proj.weight`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Bytes of the weight files.
    pub fn file_bytes(&self) -> u64 {
        match &self.source {
            Source::Directory(tensors) => tensors.file_bytes(),
            Source::Gguf(gguf) => gguf.file().len() as u64,
        }
    }

    /// Dimensions of a tensor, outermost first, without reading it.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        if let Some(packed) = self.packed(name) {
            return Ok(packed.shape.to_vec());
        }
        let name = self.file_name(name)?;
        match &self.source {
            Source::Directory(tensors) => Ok(tensors.entry(name)?.shape.clone()),
            Source::Gguf(gguf) => Ok(gguf.tensor(name)?.0.shape.clone()),
        }
    }

    /// Shape and format that [`matrix`](Self::matrix) gives, without reading the tensor.
    ///
    /// # Errors
    /// There is no such tensor, or it is no matrix of a supported type.
    pub fn layout(&self, name: &str) -> Result<PackedLayout> {
        let format = match (self.packed(name), &self.source) {
            (Some(packed), _) => packed.format,
            (None, Source::Directory(tensors)) => self.float_format(name, tensors.entry(self.file_name(name)?)?)?,
            (None, Source::Gguf(gguf)) => gguf::packed_format(gguf.tensor(self.file_name(name)?)?.0.ggml_type),
        };
        let shape = self.shape(name)?;
        let &[rows, cols] = shape.as_slice() else {
            return Err(ModelError::tensor(&self.path, name, "a matrix", format!("shape {shape:?}")));
        };
        let layout = PackedLayout::new(rows, cols, format).map_err(|source| self.packed_error(name, source))?;
        Ok(PackedLayout {
            arrangement: self.packed(name).map_or(Arrangement::Rows, |packed| packed.arrangement),
            ..layout
        })
    }

    /// A matrix, in the format that it has on disk or the one that holds it without loss. Its bytes share the map
    /// where they can be used as they are.
    ///
    /// # Errors
    /// There is no such tensor, it is no matrix of a supported type, or it is sparse and a mask is not what its format
    /// asks for.
    pub fn matrix(&self, name: &str) -> Result<PackedHost> {
        let layout = self.layout(name)?;
        let failed = |source| self.packed_error(name, source);
        match &self.source {
            Source::Directory(tensors) if self.packed(name).is_some() => {
                let (codes, scales) = packed_names(name);
                self.matrix_of(name, tensors.bytes(&codes)?, tensors.bytes(&scales)?)
            }
            Source::Directory(tensors) => {
                PackedHost::from_raw_floats(layout, tensors.bytes(self.file_name(name)?)?).map_err(failed)
            }
            Source::Gguf(gguf) => self.gguf_matrix(gguf, name, layout),
        }
    }

    /// Where the codes and the scales of a packed matrix lie, each in a file of its path. `None` if the matrix is not
    /// stored in a packed format of ours.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn places(&self, name: &str) -> Result<Option<[TensorPlace<'_>; 2]>> {
        let (Some(_), Source::Directory(tensors)) = (self.packed(name), &self.source) else { return Ok(None) };
        let (codes, scales) = packed_names(name);
        Ok(Some([tensors.place(&codes)?, tensors.place(&scales)?]))
    }

    /// The packed matrix of this name from bytes that were read from its [`places`](Self::places).
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix), or the bytes are not as many as the format asks for.
    pub fn matrix_of(&self, name: &str, codes: Bytes, scales: Bytes) -> Result<PackedHost> {
        let failed = |source| self.packed_error(name, source);
        let packed = PackedHost::from_parts(self.layout(name)?, codes, scales).map_err(failed)?;
        packed.check().map_err(failed)?;
        Ok(packed)
    }

    fn gguf_matrix(&self, gguf: &Gguf, name: &str, layout: PackedLayout) -> Result<PackedHost> {
        let file_name = self.file_name(name)?;
        let (tensor, content) = gguf.tensor(file_name)?;
        let failed = |source| self.packed_error(name, source);
        let head_dim = self.interleaved(name, layout.rows)?;
        if head_dim.is_none() && layout.format.quantized().is_none() {
            return PackedHost::from_raw_floats(layout, gguf.file().bytes(tensor.range.clone())?).map_err(failed);
        }
        let source_row = |row| head_dim.map_or(row, |dim| interleaved_row(row, dim));
        let packed = gguf::repack(tensor.ggml_type, layout.rows, layout.cols, content, source_row).map_err(failed);
        gguf.file().release(tensor.range.clone());
        packed
    }

    /// A vector, as f32.
    ///
    /// # Errors
    /// There is no such tensor, or it is no vector of a supported type.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let shape = self.shape(name)?;
        let &[len] = shape.as_slice() else {
            return Err(ModelError::tensor(&self.path, name, "a vector", format!("shape {shape:?}")));
        };
        let file_name = self.file_name(name)?;
        match &self.source {
            Source::Directory(tensors) => {
                let format = self.float_format(name, tensors.entry(file_name)?)?;
                Ok(floats(format, tensors.slice(file_name)?))
            }
            Source::Gguf(gguf) => {
                let (tensor, content) = gguf.tensor(file_name)?;
                let mut values = vec![0.0; len];
                gguf::dequantize(tensor.ggml_type, content, &mut values);
                if let Some(dim) = self.interleaved(name, len)? {
                    values = (0..len).map(|row| values[interleaved_row(row, dim)]).collect();
                }
                Ok(values)
            }
        }
    }

    /// Gives the pages of a tensor back to the system, after its bytes were used or copied. Reading it again works.
    pub fn release(&self, name: &str) {
        match &self.source {
            Source::Directory(tensors) => {
                let (codes, scales) = packed_names(name);
                [name, &codes, &scales].into_iter().for_each(|part| tensors.release(part));
            }
            Source::Gguf(gguf) => {
                if let Some(tensor) = self.names.get(name).and_then(|name| gguf.tensors().get(name)) {
                    gguf.file().release(tensor.range.clone());
                }
            }
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Directory(_) => {
                let path = self.path.join("tokenizer.json");
                if !path.is_file() {
                    return Err(ModelError::tokenizer(&self.path, "file", "a tokenizer.json", "none"));
                }
                Tokenizer::open(&path)
            }
            Source::Gguf(gguf) => {
                let tokenizer = Tokenizer::from_gguf(gguf);
                gguf.release_metadata();
                tokenizer
            }
        }
    }

    /// The chat template, if the model has one.
    ///
    /// # Errors
    /// It cannot be read or parsed.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match &self.source {
            Source::Directory(_) => self.directory_template(),
            Source::Gguf(gguf) => {
                let Some(source) = gguf.str("tokenizer.chat_template")? else { return Ok(None) };
                ChatTemplate::new(&self.path, source, gguf_tokens(gguf)?).map(Some)
            }
        }
    }

    fn directory_template(&self) -> Result<Option<ChatTemplate>> {
        let config_path = self.path.join("tokenizer_config.json");
        let config = read_object(&config_path)?;
        let mut tokens = special_tokens(&read_object(&self.path.join("special_tokens_map.json"))?);
        tokens.extend(special_tokens(&config));
        let file = self.path.join("chat_template.jinja");
        if file.is_file() {
            return ChatTemplate::new(&file, &read_text(&file)?, tokens).map(Some);
        }
        let source = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => Some(source.as_str()),
            // Several templates with names.
            Some(Value::Array(list)) => list
                .iter()
                .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|t| t.get("template")?.as_str()),
            Some(_) => None,
        };
        let Some(source) = source else {
            let expected = "a text, or a list with a template named 'default'";
            return Err(ModelError::config(&config_path, "chat_template", expected, "something else"));
        };
        ChatTemplate::new(&config_path, source, tokens).map(Some)
    }

    fn file_name(&self, name: &str) -> Result<&str> {
        self.names.get(name).map(String::as_str).ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            tensor: Shown(name).to_string(),
            available: self.names.len(),
        })
    }

    fn packed(&self, name: &str) -> Option<&PackedTensor> {
        self.quantization.as_ref()?.tensors.get(name)
    }

    fn packed_error(&self, name: &str, source: edgellm_kernels::KernelError) -> ModelError {
        ModelError::Packed { path: self.path.clone(), tensor: Shown(name).to_string(), source }
    }

    fn float_format(&self, name: &str, entry: &TensorEntry) -> Result<Format> {
        match entry.dtype {
            Dtype::F32 => Ok(Format::F32),
            Dtype::F16 => Ok(Format::F16),
            Dtype::BF16 => Ok(Format::BF16),
            other => {
                let what = format!("tensor '{}' of type {other}", Shown(name));
                Err(ModelError::unsupported(&self.path, what, "F32, F16, BF16"))
            }
        }
    }

    /// The head width by which the rows of a tensor are interleaved, if they are: those of the query and key
    /// projections of some GGUF architectures.
    fn interleaved(&self, name: &str, rows: usize) -> Result<Option<usize>> {
        let heads = if name.contains(".self_attn.q_proj.") {
            self.config.n_heads
        } else if name.contains(".self_attn.k_proj.") {
            self.config.n_kv_heads
        } else {
            return Ok(None);
        };
        if !self.config.architecture.gguf_interleaved {
            return Ok(None);
        }
        let head_dim = self.config.head_dim;
        if rows != heads * head_dim {
            let expected = format!("{heads} heads of {head_dim} rows");
            return Err(ModelError::tensor(&self.path, name, expected, format!("{rows} rows")));
        }
        Ok(Some(head_dim))
    }
}

/// Reads and checks `quantization_config`.
fn read_quantization(path: &Path, config: &ModelConfig) -> Result<Option<QuantizationConfig>> {
    const FIELD: &str = "quantization_config";
    let Some(value) = config.get(FIELD).filter(|v| !v.is_null()) else { return Ok(None) };
    match value.get("quant_method").and_then(Value::as_str) {
        Some(QUANT_METHOD) => {}
        Some(other) => {
            let what = format!("quantization method '{}'", Shown(other));
            return Err(ModelError::unsupported(path, what, "edgellm, GGUF files, plain floats"));
        }
        None => return Err(ModelError::config(path, FIELD, "an object with 'quant_method'", "none")),
    }
    match value.get("format_version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(FORMAT_VERSION) => {}
        Some(version) => {
            return Err(ModelError::unsupported(
                path,
                format!("{FIELD} of version {version}"),
                format!("version {FORMAT_VERSION}"),
            ));
        }
        None => return Err(ModelError::config(path, FIELD, "a 'format_version'", "none")),
    }
    QuantizationConfig::deserialize(value)
        .map(Some)
        .map_err(|e| ModelError::config(path, FIELD, "formats and shapes of the packed tensors", Shown(&e.to_string())))
}

/// Checks that the codes and scales of a packed tensor are what its format asks for.
fn check_packed(tensors: &Safetensors, name: &str, packed: &PackedTensor) -> Result<()> {
    let [rows, cols] = packed.shape;
    let layout = PackedLayout::new(rows, cols, packed.format).map_err(|source| ModelError::Packed {
        path: tensors.path().to_owned(),
        tensor: Shown(name).to_string(),
        source,
    })?;
    if layout.format.quantized().is_none() {
        return Err(ModelError::tensor(tensors.path(), name, "a quantized format", layout.format));
    }
    let layout = PackedLayout { arrangement: packed.arrangement, ..layout };
    if packed.arrangement == Arrangement::Panels && layout.prepared() != layout {
        let expected = "a format that has an arrangement in panels";
        return Err(ModelError::tensor(tensors.path(), name, expected, layout.format));
    }
    let (codes, scales) = packed_names(name);
    for (part, shape) in [(codes, layout.words_shape()), (scales, layout.scales_shape())] {
        let entry = tensors.entry(&part)?;
        if entry.dtype != Dtype::U32 || entry.shape != shape {
            let expected = format!("U32 {shape:?}, as its format {} asks for", layout.format);
            return Err(ModelError::tensor(
                tensors.path(),
                &part,
                expected,
                format!("{} {:?}", entry.dtype, entry.shape),
            ));
        }
    }
    Ok(())
}

fn floats(format: Format, content: &[u8]) -> Vec<f32> {
    let pairs = content.chunks_exact(2).map(|b| [b[0], b[1]]);
    match format {
        Format::F16 => pairs.map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Format::BF16 => pairs.map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => content.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// A JSON object from a file that need not be there.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    serde_json::from_str(&read_text(path)?)
        .map_err(|e| ModelError::format(path, "file", "a JSON object", Shown(&e.to_string())))
}

/// The special tokens in a tokenizer's configuration: texts, or objects with a `content`.
fn special_tokens(config: &Map<String, Value>) -> Map<String, Value> {
    config
        .iter()
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((name.clone(), text.into()))
        })
        .collect()
}

/// The special tokens that a GGUF file names, under Hugging Face's names.
pub(crate) fn gguf_tokens(gguf: &Gguf) -> Result<Map<String, Value>> {
    let mut tokens = Map::new();
    for (name, field) in
        [("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")]
    {
        let Some(id) = gguf.u64(&format!("tokenizer.ggml.{name}_token_id"))? else { continue };
        let list = gguf.strings("tokenizer.ggml.tokens")?;
        if let Some(token) = list.and_then(|mut list| list.nth(usize::try_from(id).unwrap_or(usize::MAX))) {
            tokens.insert(field.into(), token.into());
        }
    }
    Ok(tokens)
}
