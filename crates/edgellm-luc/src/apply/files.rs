//! Applying a policy to a model's files: tensor by tensor, into a new directory.

use std::path::Path;

use burn::tensor::Device;
use edgellm_kernels::{Arrangement, Format, PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::decoder::{Activations, Decoder, LoadOptions};
use edgellm_model::files::{FORMAT_VERSION, ModelFiles, PackedTensor, QUANT_METHOD, QuantizationConfig, packed_names};
use edgellm_model::io::{AtomicDir, atomic_write};
use edgellm_model::safetensors::{Dtype, SafetensorsWriter, TensorSpec};
use edgellm_model::traits::Compressor;
use edgellm_model::values::CompressionPolicy;
use serde_json::{Map, Value, json};

use super::sequence::Sequence;
use super::{EMBEDDING, HEAD, check_policy, format_of, unit_of};
use crate::cost::bits_per_weight;
use crate::error::Result;
use crate::progress::Progress;

/// Files beside the weights that are taken over as they are.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// What [`compress_model`] did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Applied {
    /// Bytes of the source's weight files.
    pub bytes_before: u64,
    /// Bytes of the new `model.safetensors`.
    pub bytes_after: u64,
    /// Mean bits per weight of the compressed matrices, scales included.
    pub bits_per_weight: f64,
}

/// How a tensor is written.
enum Plan {
    /// Compressed to the format of this layout.
    Compress(PackedLayout),
    /// A vector, as f32.
    Vector(usize),
}

/// How a model's files are compressed.
#[derive(Clone, Copy)]
pub struct Compression<'a> {
    /// The format of every unit.
    pub policy: &'a CompressionPolicy,
    /// What brings a matrix into its format.
    pub compressor: &'a dyn Compressor,
    /// Windows of token ids, for compressors that look at the inputs of a matrix.
    pub calibration: &'a [Vec<u32>],
    /// With [`Arrangement::Panels`] the packed matrices are written as the CPU's integer kernels use them, so that a file
    /// is used in place, without preparing it when it is loaded.
    pub arrangement: Arrangement,
    /// Replace a compressed model (or an empty folder); nothing else ever is.
    pub force: bool,
}

/// Compresses a model into the directory `out_dir`, which appears only when it is complete.
///
/// Every matrix of a unit gets the policy's format; norms and biases become f32. Packed matrices are written as
/// `X.qweight` and `X.qscales`, f16 and f32 ones under their own names. `config.json` says which is which in
/// `quantization_config` and holds the policy. Tokenizer files are copied, or made from a GGUF file's metadata.
/// One block, or the embedding, is in memory as f32 at a time, beside the calibration text's hidden states.
///
/// # Errors
/// The policy misses a unit or names one that the model does not have; a tensor cannot be read or compressed; `out_dir`
/// exists without `force`, or is no compressed model, or cannot be written. `out_dir` is as it was then.
pub fn compress_model(
    files: &ModelFiles,
    how: &Compression<'_>,
    out_dir: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Applied> {
    let policy = how.policy;
    check_policy(policy, files.config().n_layers)?;
    check_replaceable(out_dir, how.force, "a compressed model", |files| files.quantization().is_some())?;
    let plan = plan(files, policy, how.arrangement)?;
    let options = LoadOptions { device: Device::flex(), expand: false, activations: Activations::F32 };
    let decoder = Decoder::load(files, &options)?;
    let folder = AtomicDir::create(out_dir)?;
    let weights = folder.path().join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&weights, &specs(&plan))?;
    for (name, part) in &plan {
        if let Plan::Vector(_) = part {
            writer.write(name, &to_bytes(&files.vector(name)?))?;
        }
    }
    let total = plan.iter().filter(|(_, part)| matches!(part, Plan::Compress(..))).count();
    let mut done = 0;
    let mut write = |name: &str, packed: PackedHost, progress: &mut dyn FnMut(Progress<'_>)| -> Result<()> {
        let packed = if how.arrangement == Arrangement::Panels { packed.prepare()? } else { packed };
        write_matrix(&mut writer, name, &packed)?;
        done += 1;
        progress(Progress { done, total, what: name });
        Ok(())
    };
    progress(Progress { done: 0, total, what: EMBEDDING });
    let (mut sequence, embedding) = Sequence::start(&decoder, policy, how.compressor, how.calibration)?;
    write(EMBEDDING, embedding, progress)?;
    for index in 0..decoder.n_blocks() {
        for (name, packed) in super::sequence::names(index).zip(sequence.block()?) {
            write(&name, packed, progress)?;
        }
    }
    if let Some(head) = decoder.untied_head() {
        write(HEAD, sequence.head(&head.weight)?, progress)?;
    }
    writer.finish()?;
    write_config(files, policy, &plan, folder.path())?;
    write_companions(files, folder.path())?;
    let bytes_after = std::fs::metadata(&weights).map_err(|e| ModelError::io(&weights, e))?.len();
    folder.commit(how.force)?;
    let layouts = plan.iter().filter_map(|(_, part)| match part {
        Plan::Compress(layout) => Some((layout.bytes(), layout.rows as u64 * layout.cols as u64)),
        Plan::Vector(_) => None,
    });
    let (bytes, count) = layouts.fold((0, 0), |(b, n), (bytes, weights)| (b + bytes, n + weights));
    Ok(Applied { bytes_before: files.file_bytes(), bytes_after, bits_per_weight: bits_per_weight(bytes, count) })
}

/// Whether `out_dir` may be written at all: what is replaced is a model that `is_ours` accepts, described by `expected`.
pub(crate) fn check_replaceable(
    out_dir: &Path,
    force: bool,
    expected: &str,
    is_ours: impl Fn(&ModelFiles) -> bool,
) -> Result<()> {
    if out_dir.symlink_metadata().is_err() {
        return Ok(());
    }
    let refuse = |expected: String, found: &str| {
        let what = format!("output folder {}", out_dir.display());
        Err(ModelError::Value { what, expected, found: found.into() }.into())
    };
    if !force {
        return refuse("a path where nothing is, or to be told to replace it".into(), "something that exists");
    }
    let is_empty = std::fs::read_dir(out_dir).is_ok_and(|mut entries| entries.next().is_none());
    if is_empty || (out_dir.is_dir() && ModelFiles::open(out_dir).is_ok_and(|files| is_ours(&files))) {
        Ok(())
    } else {
        refuse(format!("{expected} or an empty folder to replace"), "something else")
    }
}

/// What becomes of every tensor, in the order of the files.
fn plan(files: &ModelFiles, policy: &CompressionPolicy, arrangement: Arrangement) -> Result<Vec<(String, Plan)>> {
    let mut plan = Vec::new();
    for name in files.names() {
        if name == HEAD && files.config().tie_word_embeddings {
            // Some files carry a copy of the embedding.
            continue;
        }
        let shape = files.shape(name)?;
        let part = match (unit_of(name), shape.as_slice()) {
            (Some(unit), _) => {
                let format = format_of(policy, unit, name)?;
                let found = files.layout(name)?;
                let layout = PackedLayout::new(found.rows, found.cols, format.packed()?)?;
                let layout = if arrangement == Arrangement::Panels { layout.prepared() } else { layout };
                Plan::Compress(layout)
            }
            (None, &[len]) => Plan::Vector(len),
            (None, _) => {
                return Err(ModelError::Unsupported {
                    path: files.path().to_owned(),
                    what: format!("tensor '{name}' of shape {shape:?}"),
                    supported: "embedding, head, the blocks' projections, norms and biases".into(),
                }
                .into());
            }
        };
        plan.push((name.to_owned(), part));
    }
    if !plan.iter().any(|(name, _)| name == EMBEDDING) {
        return Err(ModelError::MissingTensor {
            path: files.path().to_owned(),
            tensor: EMBEDDING.into(),
            available: plan.len(),
        }
        .into());
    }
    Ok(plan)
}

fn specs(plan: &[(String, Plan)]) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    for (name, part) in plan {
        match part {
            Plan::Vector(len) => specs.push(TensorSpec::new(name, Dtype::F32, [*len])),
            Plan::Compress(layout) => match float_type(layout.format) {
                Some(dtype) => specs.push(TensorSpec::new(name, dtype, [layout.rows, layout.cols])),
                None => {
                    let (codes, scales) = packed_names(name);
                    specs.push(TensorSpec::new(codes, Dtype::U32, layout.words_shape()));
                    specs.push(TensorSpec::new(scales, Dtype::U32, layout.scales_shape()));
                }
            },
        }
    }
    specs
}

/// The element type of a format that is written as a plain tensor.
fn float_type(format: Format) -> Option<Dtype> {
    match format {
        Format::F32 => Some(Dtype::F32),
        Format::F16 => Some(Dtype::F16),
        Format::BF16 => Some(Dtype::BF16),
        Format::Quantized(_) => None,
    }
}

fn write_matrix(writer: &mut SafetensorsWriter, name: &str, packed: &PackedHost) -> Result<()> {
    let layout = packed.layout;
    let Some(dtype) = float_type(layout.format) else {
        let (codes, scales) = packed_names(name);
        writer.write(&codes, &packed.words)?;
        return Ok(writer.write(&scales, &packed.scales)?);
    };
    let (row, padded) = (layout.cols * dtype.bitsize() / 8, layout.row_words() * 4);
    if row == padded {
        return Ok(writer.write(name, &packed.words)?);
    }
    // Rows of an odd number of 16-bit floats are padded in memory, but not in the file.
    let content: Vec<u8> = packed.words.chunks(padded).flat_map(|bytes| &bytes[..row]).copied().collect();
    Ok(writer.write(name, &content)?)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn write_config(files: &ModelFiles, policy: &CompressionPolicy, plan: &[(String, Plan)], dir: &Path) -> Result<()> {
    let packed = plan.iter().filter_map(|(name, part)| match part {
        Plan::Compress(layout) if float_type(layout.format).is_none() => {
            Some((name.clone(), PackedTensor::of(*layout)))
        }
        _ => None,
    });
    let quantization = QuantizationConfig {
        quant_method: QUANT_METHOD.into(),
        format_version: FORMAT_VERSION,
        tensors: packed.collect(),
        policy: Some(policy.clone()),
    };
    let mut config = files.config().clone();
    config.set("quantization_config", json!(quantization));
    write_json(&dir.join("config.json"), &config.to_json())
}

/// Tokenizer, chat template and generation settings.
fn write_companions(files: &ModelFiles, dir: &Path) -> Result<()> {
    if files.gguf().is_some() {
        atomic_write(&dir.join("tokenizer.json"), files.tokenizer()?.to_json()?.as_bytes())?;
        if let Some(template) = files.chat_template()? {
            let mut config: Map<String, Value> = template.tokens().clone();
            config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
            config.insert("chat_template".into(), template.source().into());
            write_json(&dir.join("tokenizer_config.json"), &Value::Object(config))?;
        }
        return Ok(());
    }
    for name in COMPANIONS {
        let source = files.path().join(name);
        if source.is_file() {
            std::fs::copy(&source, dir.join(name)).map_err(|e| ModelError::io(&source, e))?;
        }
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    // Maps and plain values: there is nothing in them that JSON cannot hold.
    let text = serde_json::to_string_pretty(value).expect("a JSON value is JSON") + "\n";
    Ok(atomic_write(path, text.as_bytes())?)
}
