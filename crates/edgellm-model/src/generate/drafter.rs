//! A drafter on disk: what `edgellm draft` fits to a model, in one safetensors file.
//!
//! `lens`, `[d, 2 d]` in f32; `exit` and `temperature`, one value each; `shortlist`, token ids; `texts`, token ids of the
//! model's own texts one after the other, and `text_lengths`. Integers are 32 bits.

use std::path::Path;

use burn::tensor::Device;
use edgellm_kernels::{Format, PackedHost, PackedLayout};
use safetensors::Dtype;

use super::head::{DraftHead, Shortlist};
use super::lookup::NgramStore;
use crate::ModelError;
use crate::decoder::{Decoder, Linear, Weight};
use crate::safetensors::{Safetensors, SafetensorsWriter, TensorSpec};

/// What the lens is rounded to: it is read for every draft.
const LENS_FORMAT: &str = "q8g32s";

/// The contents of a drafter's file.
#[derive(Clone, Debug, PartialEq)]
pub struct DrafterParts {
    /// Blocks below the exit; 0 drafts from the embedding.
    pub exit: usize,
    /// `[d, 2 d]`, row-major.
    pub lens: Vec<f32>,
    /// Divides the exit's scores.
    pub temperature: f32,
    /// Tokens that the exit's head can name.
    pub shortlist: Vec<u32>,
    /// Texts to look drafts up in.
    pub texts: Vec<Vec<u32>>,
}

impl DrafterParts {
    /// Writes the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ModelError> {
        let lengths: Vec<u32> = self.texts.iter().map(|text| text.len() as u32).collect();
        let texts = self.texts.concat();
        let spec = |name: &str, dtype, n: usize| TensorSpec::new(name, dtype, vec![n]);
        let specs = [
            spec("exit", Dtype::U32, 1),
            spec("lens", Dtype::F32, self.lens.len()),
            spec("shortlist", Dtype::U32, self.shortlist.len()),
            spec("temperature", Dtype::F32, 1),
            spec("text_lengths", Dtype::U32, lengths.len()),
            spec("texts", Dtype::U32, texts.len()),
        ];
        let mut writer = SafetensorsWriter::create(path, &specs)?;
        writer.write("exit", bytemuck::cast_slice(&[self.exit as u32]))?;
        writer.write("lens", bytemuck::cast_slice(&self.lens))?;
        writer.write("shortlist", bytemuck::cast_slice(&self.shortlist))?;
        writer.write("temperature", bytemuck::cast_slice(&[self.temperature]))?;
        writer.write("text_lengths", bytemuck::cast_slice(&lengths))?;
        writer.write("texts", bytemuck::cast_slice(&texts))?;
        writer.finish()
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It is none, or its tensors do not fit together.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let file = Safetensors::open(path)?;
        let values = |name: &str, dtype| -> Result<Vec<[u8; 4]>, ModelError> {
            let entry = file.entry(name)?;
            if entry.dtype != dtype {
                return Err(ModelError::tensor(path, name, format!("{dtype:?}"), format!("{:?}", entry.dtype)));
            }
            Ok(file.slice(name)?.as_chunks::<4>().0.to_vec())
        };
        let integers = |name: &str| -> Result<Vec<u32>, ModelError> {
            Ok(values(name, Dtype::U32)?.into_iter().map(u32::from_le_bytes).collect())
        };
        let floats = |name: &str| -> Result<Vec<f32>, ModelError> {
            Ok(values(name, Dtype::F32)?.into_iter().map(f32::from_le_bytes).collect())
        };
        let one = |name: &str, n: usize| ModelError::tensor(path, name, "one value", format!("{n} values"));
        let (exit, temperature) = (integers("exit")?, floats("temperature")?);
        let [exit] = exit[..] else { return Err(one("exit", exit.len())) };
        let [temperature] = temperature[..] else { return Err(one("temperature", temperature.len())) };
        let (all, lengths) = (integers("texts")?, integers("text_lengths")?);
        let total: u64 = lengths.iter().map(|&n| u64::from(n)).sum();
        if total != all.len() as u64 {
            return Err(ModelError::tensor(path, "texts", format!("{total} ids"), format!("{}", all.len())));
        }
        let mut rest = &all[..];
        let mut texts = Vec::with_capacity(lengths.len());
        for &n in &lengths {
            let (text, after) = rest.split_at(n as usize);
            texts.push(text.to_vec());
            rest = after;
        }
        let lens = floats("lens")?;
        if let Some(value) = lens.iter().find(|value| !value.is_finite()) {
            return Err(ModelError::tensor(path, "lens", "finite values", value.to_string()));
        }
        Ok(Self { exit: exit as usize, lens, temperature, shortlist: integers("shortlist")?, texts })
    }
}

/// A drafter, ready to be used with a model.
#[derive(Clone, Debug)]
pub struct Drafter {
    /// The exit with its lens.
    pub head: DraftHead,
    /// The texts.
    pub store: NgramStore,
}

impl Drafter {
    /// The drafter for a decoder.
    ///
    /// # Errors
    /// It was made for a model of another shape.
    pub fn new(decoder: &Decoder, parts: &DrafterParts) -> Result<Self, ModelError> {
        let d = decoder.config().hidden_size;
        if parts.lens.len() != 2 * d * d {
            return Err(ModelError::Value {
                what: "lens of the drafter".into(),
                expected: format!("{} values, for the model's hidden size {d}", 2 * d * d),
                found: parts.lens.len().to_string(),
            });
        }
        let lens = pack_lens(&parts.lens, d, decoder.device())?;
        let shortlist = Shortlist::new(decoder, &parts.shortlist)?;
        let head = DraftHead::with_lens(decoder, parts.exit, lens, parts.temperature, shortlist)?;
        Ok(Self { head, store: NgramStore::new(parts.texts.iter().map(Vec::as_slice)) })
    }
}

/// A lens `[d, 2 d]` as the CPU's integer kernels, or another device, read it.
fn pack_lens(values: &[f32], d: usize, device: &Device) -> Result<Linear, ModelError> {
    let layout = PackedLayout::new(d, 2 * d, Format::parse(LENS_FORMAT)?)?;
    let packed = PackedHost::quantize(values, layout)?.prepare()?;
    Ok(Linear::new(Weight::Packed(packed.to_device(device))))
}
