//! Adapters on disk, in the layout of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Tensor names and orientations are PEFT's (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, `[r, in]`;
//! `lora_B.weight`, `[out, r]`), so that Python's `peft` loads the directory. Exit norms lie beside them in
//! `edgellm_exits.safetensors`, which `peft` ignores; the directory of a model with a merged adapter holds such a file too.
//!
//! Fields of `adapter_config.json` that change what an adapter computes, and that are not done here, are refused where
//! they are set. llama.cpp's `convert_lora_to_gguf.py` reads `lora_alpha` and the tensors alone: it takes `alpha / r` for
//! the scale of a rank-stabilized adapter too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use edgellm_kernels::Lora;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};

use super::{Adapter, BlockLora, LoraConfig, Targets};
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
    lora_alpha: Number,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers_to_transform: Option<Value>,
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
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Fields of PEFT's that change the result of an adapter unless they are null, false or empty.
const UNSUPPORTED: &[&str] = &[
    "exclude_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
];

/// Starts of an adapter that take something out of the base's weights.
const CHANGES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// Shapes and f32 bytes by name.
type NamedTensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn write_file(dir: &Path, name: &str, content: &[u8]) -> Result<(), ModelError> {
    let path = dir.join(name);
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

/// What `adapter_config.json` says.
struct Config {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    /// `None` where the names of the tensors say it.
    targets: Option<Targets>,
}

fn read_config(dir: &Path, n_layers: usize) -> Result<Config, ModelError> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| ModelError::io(&path, e))?;
    let bad =
        |reason: String| ModelError::Parse { path: path.clone(), what: "PEFT adapter configuration".into(), reason };
    let config: PeftConfig = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    if config.peft_type != "LORA" {
        return Err(bad(format!("peft_type: expected LORA, found {:.80}", config.peft_type)));
    }
    if config.use_dora || config.fan_in_fan_out || !matches!(config.bias.as_deref(), None | Some("none")) {
        return Err(bad("expected plain LoRA: use_dora and fan_in_fan_out false, bias none".into()));
    }
    let set = UNSUPPORTED.iter().find_map(|field| Some((field, config.others.get(*field).filter(|v| is_set(v))?)));
    if let Some((field, value)) = set {
        let found: String = value.to_string().chars().take(80).collect();
        return Err(bad(format!("{field}: expected nothing, as plain LoRA has, found {found}")));
    }
    let start = config.others.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
    if let Some(name) = CHANGES_BASE.iter().find(|name| start.starts_with(**name)) {
        return Err(bad(format!("init_lora_weights: expected a start that leaves the base as it is, found {name}")));
    }
    let alpha = config.lora_alpha.as_f64().unwrap_or(f64::NAN);
    let targets =
        Targets::from_peft(&config.target_modules, config.layers_to_transform.as_ref(), n_layers).map_err(bad)?;
    Ok(Config { rank: config.r, alpha, use_rslora: config.use_rslora, targets })
}

/// The projections that a file has low-rank tensors for.
fn targets_in(file: &SmallFile<'_>, n_layers: usize) -> Targets {
    let mut targets = Targets::default();
    for projection in Projection::ALL {
        let found = |block: &usize| file.tensors.tensor(&lora_names(*block, projection).0).is_ok();
        let blocks: BTreeSet<usize> = (0..n_layers).filter(found).collect();
        if !blocks.is_empty() {
            targets.add(projection, (blocks.len() < n_layers).then_some(blocks));
        }
    }
    targets
}

/// A number as PEFT's users write it: some programs that read `lora_alpha` ask for an integer.
fn whole_if_it_is(value: f64) -> Result<Number, ModelError> {
    // Every whole number below 2^53 is exact.
    let number =
        if value.fract() == 0.0 && value.abs() < 9e15 { Some((value as i64).into()) } else { Number::from_f64(value) };
    number.ok_or_else(|| ModelError::Value {
        what: "LoRA alpha".into(),
        expected: "a finite number".into(),
        found: value.to_string(),
    })
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
        let Config { rank, alpha, use_rslora, targets } = read_config(dir, model.n_layers)?;
        let path = dir.join(WEIGHTS_FILE);
        let bytes = std::fs::read(&path).map_err(|e| ModelError::io(&path, e))?;
        let file = SmallFile::parse(&path, &bytes)?;
        let targets = targets.unwrap_or_else(|| targets_in(&file, model.n_layers));
        let config = LoraConfig { rank, alpha, use_rslora, targets };
        config.validate()?;
        let mut blocks = vec![BlockLora::default(); model.n_layers];
        let mut used = 0;
        for (index, block) in blocks.iter_mut().enumerate() {
            for &projection in config.targets.iter().filter(|p| config.targets.contains(index, **p)) {
                let (name_a, name_b) = lora_names(index, projection);
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
        adapter.read_exits(dir, device)?;
        adapter.check_fits(model)?;
        Ok(adapter)
    }

    /// The exit norms in the directory of a model that an adapter was merged into, as an adapter without low-rank
    /// updates; `None` if there are none. Of a GGUF file there are none.
    ///
    /// # Errors
    /// The file is malformed, or does not fit the model.
    pub fn load_exits(dir: &Path, model: &ModelConfig, device: &Device) -> Result<Option<Self>, ModelError> {
        if !dir.join(EXITS_FILE).is_file() {
            return Ok(None);
        }
        let config = LoraConfig { rank: 0, alpha: 0.0, use_rslora: false, targets: Targets::default() };
        let blocks = vec![BlockLora::default(); model.n_layers];
        let mut adapter = Self { config, blocks, exit_norms: BTreeMap::new() };
        adapter.read_exits(dir, device)?;
        adapter.check_fits(model)?;
        Ok(Some(adapter))
    }

    /// Writes the exit norms into a directory that is being built; nothing where there are none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_exits(&self, dir: &Path) -> Result<(), ModelError> {
        let (_, exits) = self.named_tensors()?;
        if exits.is_empty() {
            return Ok(());
        }
        write_file(dir, EXITS_FILE, &to_safetensors(&exits)?)
    }

    fn read_exits(&mut self, dir: &Path, device: &Device) -> Result<(), ModelError> {
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
    /// There is no low-rank update; the name is taken (without `replace`, or by something that is no adapter), or the
    /// directory cannot be written.
    pub fn save(&self, dir: &Path, base_model: &str, replace: bool) -> Result<(), ModelError> {
        self.config.validate()?;
        let replace = replace && Self::is_adapter_dir(dir);
        let json = self.peft_config_json(dir, base_model)?;
        let (tensors, _) = self.named_tensors()?;
        let out = AtomicDir::create(dir)?;
        write_file(out.path(), CONFIG_FILE, json.as_bytes())?;
        write_file(out.path(), WEIGHTS_FILE, &to_safetensors(&tensors)?)?;
        self.write_exits(out.path())?;
        out.commit(replace)
    }

    fn peft_config_json(&self, dir: &Path, base_model: &str) -> Result<String, ModelError> {
        let (modules, layers) = self.config.targets.to_peft(self.blocks.len());
        let config = PeftConfig {
            peft_type: "LORA".into(),
            task_type: Some("CAUSAL_LM".into()),
            base_model_name_or_path: Some(base_model.into()),
            r: self.config.rank,
            lora_alpha: whole_if_it_is(self.config.alpha)?,
            lora_dropout: 0.0,
            target_modules: json!(modules),
            layers_to_transform: layers.map(|layers| json!(layers)),
            bias: Some("none".into()),
            fan_in_fan_out: false,
            use_rslora: self.config.use_rslora,
            use_dora: false,
            inference_mode: true,
            // Where the adapter came from does not matter any more: nothing of it is in the base.
            others: Map::from_iter([("init_lora_weights".to_string(), true.into())]),
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
