//! Writing a model directory in the Hugging Face layout: compressed, or in plain floats.
//!
//! The directory is built beside its place and takes it at the end. Matrices are written one by one, in the format
//! that was announced; vectors, configuration, tokenizer and chat template come from the source model.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use edgellm_kernels::{Format, PackedHost, PackedLayout};
use serde_json::{Value, json};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::files::{
    FORMAT_VERSION, ModelFiles, PackedTensor, QUANT_METHOD, QuantizationConfig, gguf_tokens, packed_names,
};
use crate::io::AtomicDir;
use crate::safetensors::{Dtype, SafetensorsWriter, TensorSpec};
use crate::values::CompressionPolicy;

/// Files beside the weights that are copied as they are.
const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Writes a model directory.
pub struct ModelWriter {
    dir: AtomicDir,
    weights: SafetensorsWriter,
    layouts: BTreeMap<String, PackedLayout>,
}

impl ModelWriter {
    /// Starts a copy of `source` at `target`. `format_of` is asked for the format of every matrix, with its layout in
    /// the source; `policy` is what chose them.
    ///
    /// # Errors
    /// The source cannot be read, a format does not exist, or the directory cannot be written.
    pub fn create(
        target: &Path,
        source: &ModelFiles,
        policy: Option<CompressionPolicy>,
        mut format_of: impl FnMut(&str, PackedLayout) -> Format,
    ) -> Result<Self> {
        Self::create_as(target, source, policy, |name, found| {
            Ok(PackedLayout::new(found.rows, found.cols, format_of(name, found))?)
        })
    }

    /// As [`create`](Self::create), with the whole layout of every matrix, its arrangement included.
    ///
    /// # Errors
    /// As [`create`](Self::create), or the first error of `layout_of`.
    pub fn create_as(
        target: &Path,
        source: &ModelFiles,
        policy: Option<CompressionPolicy>,
        mut layout_of: impl FnMut(&str, PackedLayout) -> Result<PackedLayout>,
    ) -> Result<Self> {
        Self::create_with_vectors(target, source, policy, &mut layout_of, &mut |_, values| values)
    }

    /// As [`create_as`](Self::create_as), with norms and biases as `vector_of` makes them of the source's.
    ///
    /// # Errors
    /// As [`create_as`](Self::create_as).
    pub fn create_with_vectors(
        target: &Path,
        source: &ModelFiles,
        policy: Option<CompressionPolicy>,
        layout_of: &mut dyn FnMut(&str, PackedLayout) -> Result<PackedLayout>,
        vector_of: &mut dyn FnMut(&str, Vec<f32>) -> Vec<f32>,
    ) -> Result<Self> {
        let mut layouts = BTreeMap::new();
        let mut vectors = BTreeMap::new();
        for name in source.names() {
            if source.shape(name)?.len() == 1 {
                vectors.insert(name.to_owned(), vector_of(name, source.vector(name)?));
                continue;
            }
            let found = source.layout(name)?;
            layouts.insert(name.to_owned(), layout_of(name, found)?);
        }
        let writer = Self::start(target, source.config(), policy, layouts, &vectors)?;
        write_side_files(&writer.dir, source)?;
        Ok(writer)
    }

    /// Starts a model that has no source: `layouts` are its matrices, which are to be written, `vectors` its other
    /// tensors. Tokenizer and chat template are copied from the directory `tokenizer`.
    ///
    /// # Errors
    /// A layout does not exist, or the directory cannot be written.
    pub fn create_new(
        target: &Path,
        config: &ModelConfig,
        tokenizer: &Path,
        layouts: BTreeMap<String, PackedLayout>,
        vectors: &BTreeMap<String, Vec<f32>>,
    ) -> Result<Self> {
        let writer = Self::start(target, config, None, layouts, vectors)?;
        copy_side_files(&writer.dir, tokenizer)?;
        Ok(writer)
    }

    fn start(
        target: &Path,
        config: &ModelConfig,
        policy: Option<CompressionPolicy>,
        layouts: BTreeMap<String, PackedLayout>,
        vectors: &BTreeMap<String, Vec<f32>>,
    ) -> Result<Self> {
        let mut specs = BTreeMap::new();
        for (name, layout) in &layouts {
            layout.check()?;
            specs.insert(name, matrix_specs(name, *layout));
        }
        for (name, values) in vectors {
            specs.insert(name, vec![TensorSpec::new(name, Dtype::F32, [values.len()])]);
        }
        let specs: Vec<TensorSpec> = specs.into_values().flatten().collect();
        let dir = AtomicDir::create(target)?;
        write(&dir, "config.json", pretty(&config_json(config, &layouts, policy)).as_bytes())?;
        let mut weights = SafetensorsWriter::create(&dir.path().join("model.safetensors"), &specs)?;
        for (name, values) in vectors {
            weights.write(name, bytemuck::cast_slice(values))?;
        }
        Ok(Self { dir, weights, layouts })
    }

    /// The directory as it is being built, for files of one's own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The matrices that are to be written, with their layouts.
    pub fn layouts(&self) -> &BTreeMap<String, PackedLayout> {
        &self.layouts
    }

    /// Writes a matrix.
    ///
    /// # Errors
    /// It was not announced, has another layout, is written already, or cannot be written.
    pub fn write(&mut self, name: &str, matrix: &PackedHost) -> Result<()> {
        let layout = self.layout(name)?;
        if matrix.layout != layout {
            return Err(ModelError::tensor(self.dir.path(), name, layout.to_string(), matrix.layout));
        }
        for (part, content) in parts(name, matrix) {
            self.weights.write(&part, &content)?;
        }
        Ok(())
    }

    /// Writes the next rows of a matrix, for matrices that are not held whole.
    ///
    /// # Errors
    /// The matrix was not announced, has another layout or fewer rows left, or cannot be written.
    pub fn append(&mut self, name: &str, rows: &PackedHost) -> Result<()> {
        let expected = self.layout(name)?.with_rows(rows.layout.rows);
        if rows.layout != expected {
            return Err(ModelError::tensor(self.dir.path(), name, expected.to_string(), rows.layout));
        }
        for (part, content) in parts(name, rows) {
            self.weights.append(&part, &content)?;
        }
        Ok(())
    }

    fn layout(&self, name: &str) -> Result<PackedLayout> {
        self.layouts
            .get(name)
            .copied()
            .ok_or_else(|| ModelError::tensor(self.dir.path(), name, "one of the model's matrices", "another name"))
    }

    /// Puts the directory in its place, over an existing one only with `replace`.
    ///
    /// # Errors
    /// A matrix is missing, or the directory cannot be put there; an existing one is then as it was.
    pub fn finish(self, replace: bool) -> Result<()> {
        self.weights.finish()?;
        self.dir.commit(replace)
    }
}

/// The tensors of a file that hold a matrix, with their bytes.
fn parts<'m>(name: &str, matrix: &'m PackedHost) -> Vec<(String, Cow<'m, [u8]>)> {
    let layout = matrix.layout;
    let words = Cow::Borrowed(&matrix.words[..]);
    if layout.format.quantized().is_some() {
        let (codes, scales) = packed_names(name);
        return vec![(codes, words), (scales, Cow::Borrowed(&matrix.scales[..]))];
    }
    let (padded, row) = (layout.row_words() * 4, layout.cols * element_bytes(layout.format));
    if padded == row {
        return vec![(name.to_owned(), words)];
    }
    let content: Vec<u8> = matrix.words.chunks_exact(padded).flat_map(|r| &r[..row]).copied().collect();
    vec![(name.to_owned(), content.into())]
}

fn element_bytes(format: Format) -> usize {
    if format == Format::F32 { 4 } else { 2 }
}

fn matrix_specs(name: &str, layout: PackedLayout) -> Vec<TensorSpec> {
    let dense = |dtype| vec![TensorSpec::new(name, dtype, [layout.rows, layout.cols])];
    match layout.format {
        Format::F32 => dense(Dtype::F32),
        Format::F16 => dense(Dtype::F16),
        Format::BF16 => dense(Dtype::BF16),
        Format::Quantized(_) => {
            let (codes, scales) = packed_names(name);
            vec![
                TensorSpec::new(codes, Dtype::U32, layout.words_shape()),
                TensorSpec::new(scales, Dtype::U32, layout.scales_shape()),
            ]
        }
    }
}

fn config_json(
    config: &ModelConfig,
    layouts: &BTreeMap<String, PackedLayout>,
    policy: Option<CompressionPolicy>,
) -> Value {
    let mut config = config.clone();
    let tensors: BTreeMap<String, PackedTensor> = layouts
        .iter()
        .filter(|(_, layout)| layout.format.quantized().is_some())
        .map(|(name, l)| (name.clone(), PackedTensor::of(*l)))
        .collect();
    config.remove("quantization_config");
    if !tensors.is_empty() {
        let quantization =
            QuantizationConfig { quant_method: QUANT_METHOD.into(), format_version: FORMAT_VERSION, tensors, policy };
        config.set("quantization_config", json!(quantization));
    }
    // Of the floats that are left; f32 if they differ, which loses nothing.
    let mut floats = layouts.values().map(|l| l.format).filter(|f| f.quantized().is_none());
    let first = floats.next().unwrap_or(Format::F32);
    let dtype = match first {
        Format::F16 if floats.all(|f| f == first) => "float16",
        Format::BF16 if floats.all(|f| f == first) => "bfloat16",
        _ => "float32",
    };
    config.set("torch_dtype", dtype.into());
    config.remove("dtype");
    config.to_json()
}

/// Tokenizer, chat template and generation settings: copied from a directory, made from a GGUF file.
fn write_side_files(dir: &AtomicDir, source: &ModelFiles) -> Result<()> {
    let Some(gguf) = source.gguf() else { return copy_side_files(dir, source.path()) };
    write(dir, "tokenizer.json", source.tokenizer()?.to_json()?.as_bytes())?;
    let mut config = gguf_tokens(gguf)?;
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("model_max_length".into(), source.config().max_position_embeddings.into());
    if let Some(template) = gguf.str("tokenizer.chat_template")? {
        config.insert("chat_template".into(), template.into());
    }
    write(dir, "tokenizer_config.json", pretty(&Value::Object(config)).as_bytes())
}

fn copy_side_files(dir: &AtomicDir, from: &Path) -> Result<()> {
    for name in SIDE_FILES {
        let from = from.join(name);
        if from.is_file() {
            fs::copy(&from, dir.path().join(name)).map_err(|e| ModelError::io_on("copy", &from, e))?;
        }
    }
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn write(dir: &AtomicDir, name: &str, content: &[u8]) -> Result<()> {
    let path = dir.path().join(name);
    fs::write(&path, content).map_err(|e| ModelError::io_on("write", &path, e))
}
