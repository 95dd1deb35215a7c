//! Adapters on disk, in the layout of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Tensor names and orientations are PEFT's (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, `[r, in]`;
//! `lora_B.weight`, `[out, r]`), so that Python's `peft` loads the directory. Exit norms lie beside them in
//! `edgellm_exits.safetensors`, which `peft` ignores.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use edgellm_kernels::Lora;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};

use super::{Adapter, BlockLora, LoraConfig};
use crate::ModelError;
use crate::config::ModelConfig;
use crate::io::AtomicDir;
use crate::values::Projection;

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const EXITS_FILE: &str = "edgellm_exits.safetensors";
const PREFIX: &str = "base_model.model.";

/// The fields of PEFT's `LoraConfig` that we read and write.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Vec<String>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    inference_mode: bool,
}

/// Shapes and f32 bytes by name.
type NamedTensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn write_file(dir: &AtomicDir, name: &str, content: &[u8]) -> Result<(), ModelError> {
    let path = dir.path().join(name);
    std::fs::write(&path, content).map_err(|e| ModelError::io(&path, e))
}

fn lora_names(block: usize, projection: Projection) -> (String, String) {
    let module = projection.weight_name(block);
    let module = module.trim_end_matches(".weight");
    (format!("{PREFIX}{module}.lora_A.weight"), format!("{PREFIX}{module}.lora_B.weight"))
}

fn exit_name(exit: usize) -> String {
    format!("exits.{exit}.norm.weight")
}

fn f32_bytes<const D: usize>(tensor: &Tensor<D>, what: &str) -> Result<Vec<u8>, ModelError> {
    let data = tensor.clone().into_data().convert::<f32>();
    let values = data.as_slice::<f32>().map_err(|e| ModelError::Value {
        what: what.into(),
        expected: "f32 values".into(),
        found: format!("{e:?}"),
    })?;
    Ok(bytemuck::cast_slice(values).to_vec())
}

fn to_safetensors(tensors: &NamedTensors) -> Result<Vec<u8>, ModelError> {
    let encode_error = |e: safetensors::SafeTensorError| ModelError::Value {
        what: "adapter tensors".into(),
        expected: "tensors that safetensors can hold".into(),
        found: e.to_string(),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for (name, (shape, bytes)) in tensors {
        views.push((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(encode_error)?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize(views, Some(metadata)).map_err(encode_error)
}

/// A parsed safetensors file that is small enough to be read whole.
struct SmallFile<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl<'a> SmallFile<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self, ModelError> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| ModelError::Parse {
            path: path.to_path_buf(),
            what: "safetensors file".into(),
            reason: e.to_string(),
        })?;
        Ok(Self { path, tensors })
    }

    fn tensor<const D: usize>(&self, name: &str, device: &Device) -> Result<Tensor<D>, ModelError> {
        let bad = |reason: String| ModelError::Parse {
            path: self.path.to_path_buf(),
            what: format!("tensor {name}"),
            reason,
        };
        let view = self.tensors.tensor(name).map_err(|e| bad(e.to_string()))?;
        let shape: [usize; D] = view
            .shape()
            .try_into()
            .map_err(|_| bad(format!("expected {D} dimensions, found shape {:?}", view.shape())))?;
        let data = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => data.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            other => return Err(bad(format!("expected F32, F16 or BF16, found {other:?}"))),
        };
        if let Some(value) = values.iter().find(|v| !v.is_finite()) {
            return Err(bad(format!("expected finite values, found {value}")));
        }
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }
}

fn read_config(dir: &Path) -> Result<LoraConfig, ModelError> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| ModelError::io(&path, e))?;
    let bad =
        |reason: String| ModelError::Parse { path: path.clone(), what: "PEFT adapter configuration".into(), reason };
    let config: PeftConfig = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    if config.peft_type != "LORA" {
        return Err(bad(format!("peft_type: expected LORA, found {}", config.peft_type)));
    }
    if config.use_dora || config.fan_in_fan_out || !matches!(config.bias.as_deref(), None | Some("none")) {
        return Err(bad("expected plain LoRA: use_dora and fan_in_fan_out false, bias none".into()));
    }
    let mut targets = Vec::new();
    for projection in Projection::ALL {
        if config.target_modules.iter().any(|name| name == projection.name()) {
            targets.push(projection);
        }
    }
    if targets.len() != config.target_modules.len() {
        return Err(bad(format!(
            "target_modules: expected projections of a decoder block, found {:?}",
            config.target_modules
        )));
    }
    let lora = LoraConfig { rank: config.r, alpha: config.lora_alpha, use_rslora: config.use_rslora, targets };
    lora.validate()?;
    Ok(lora)
}

impl Adapter {
    /// Whether a directory holds an adapter.
    pub fn is_adapter_dir(dir: &Path) -> bool {
        dir.join(CONFIG_FILE).is_file()
    }

    /// Reads a PEFT adapter directory for a model, with the exit norms if there are any.
    ///
    /// # Errors
    /// A file is missing or malformed, or the adapter does not fit the model.
    pub fn load(dir: &Path, model: &ModelConfig, device: &Device) -> Result<Self, ModelError> {
        let config = read_config(dir)?;
        let path = dir.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(|e| ModelError::io(&path, e))?;
        let file = SmallFile::parse(&path, &bytes)?;
        let mut blocks = vec![BlockLora::default(); model.n_layers];
        let mut used = 0;
        for (index, block) in blocks.iter_mut().enumerate() {
            for &projection in &config.targets {
                let (name_a, name_b) = lora_names(index, projection);
                if file.tensors.tensor(&name_a).is_err() && file.tensors.tensor(&name_b).is_err() {
                    continue;
                }
                let a = file.tensor(&name_a, device)?;
                let b = file.tensor(&name_b, device)?;
                *block.get_mut(projection) = Some(Lora { a, b, scaling: config.scaling() });
                used += 2;
            }
        }
        if used != file.tensors.len() {
            return Err(ModelError::Parse {
                path: path.clone(),
                what: "adapter weights".into(),
                reason: format!(
                    "expected only lora_A and lora_B of the target modules in {} blocks, found {} other tensors",
                    model.n_layers,
                    file.tensors.len() - used
                ),
            });
        }
        let mut adapter = Self { config, blocks, exit_norms: BTreeMap::new() };
        adapter.load_exits(dir, device)?;
        adapter.check_fits(model)?;
        Ok(adapter)
    }

    fn load_exits(&mut self, dir: &Path, device: &Device) -> Result<(), ModelError> {
        let path = dir.join(EXITS_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(ModelError::io(&path, e)),
        };
        let file = SmallFile::parse(&path, &bytes)?;
        for name in file.tensors.names() {
            let exit = name.strip_prefix("exits.").and_then(|rest| rest.strip_suffix(".norm.weight"));
            let exit: usize = exit.and_then(|e| e.parse().ok()).ok_or_else(|| ModelError::Parse {
                path: path.clone(),
                what: "exit norms".into(),
                reason: format!("expected tensors named exits.N.norm.weight, found {name}"),
            })?;
            self.exit_norms.insert(exit, file.tensor(name, device)?);
        }
        Ok(())
    }

    /// Writes the adapter as a PEFT directory. With `replace`, an adapter of that name gives way once the new one is whole.
    ///
    /// # Errors
    /// The name is taken (without `replace`, or by something that is no adapter), or the directory cannot be written.
    pub fn save(&self, dir: &Path, base_model: &str, replace: bool) -> Result<(), ModelError> {
        let replace = replace && Self::is_adapter_dir(dir);
        let json = self.peft_config_json(dir, base_model)?;
        let (tensors, exits) = self.named_tensors()?;
        let out = AtomicDir::create(dir)?;
        write_file(&out, CONFIG_FILE, json.as_bytes())?;
        write_file(&out, WEIGHTS_FILE, &to_safetensors(&tensors)?)?;
        if !exits.is_empty() {
            write_file(&out, EXITS_FILE, &to_safetensors(&exits)?)?;
        }
        out.commit(replace)
    }

    fn peft_config_json(&self, dir: &Path, base_model: &str) -> Result<String, ModelError> {
        let config = PeftConfig {
            peft_type: "LORA".into(),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some(base_model.into()),
            r: self.config.rank,
            lora_alpha: self.config.alpha,
            lora_dropout: 0.0,
            target_modules: self.config.targets.iter().map(|p| p.name().to_string()).collect(),
            bias: Some("none".into()),
            fan_in_fan_out: false,
            use_rslora: self.config.use_rslora,
            use_dora: false,
            inference_mode: true,
        };
        serde_json::to_string_pretty(&config).map_err(|e| ModelError::Parse {
            path: dir.join(CONFIG_FILE),
            what: "PEFT adapter configuration".into(),
            reason: e.to_string(),
        })
    }

    /// Low-rank tensors under PEFT's names, and exit norms under ours.
    fn named_tensors(&self) -> Result<(NamedTensors, NamedTensors), ModelError> {
        let mut tensors = BTreeMap::new();
        for (index, block) in self.blocks.iter().enumerate() {
            for projection in Projection::ALL {
                let Some(lora) = block.get(projection) else { continue };
                let (name_a, name_b) = lora_names(index, projection);
                let (bytes_a, bytes_b) = (f32_bytes(&lora.a, &name_a)?, f32_bytes(&lora.b, &name_b)?);
                tensors.insert(name_a, (lora.a.dims().to_vec(), bytes_a));
                tensors.insert(name_b, (lora.b.dims().to_vec(), bytes_b));
            }
        }
        let mut exits = BTreeMap::new();
        for (exit, norm) in &self.exit_norms {
            let name = exit_name(*exit);
            let bytes = f32_bytes(norm, &name)?;
            exits.insert(name, (norm.dims().to_vec(), bytes));
        }
        Ok((tensors, exits))
    }
}
