//! `edgellm inspect`: what is in a model directory, GGUF file, adapter, policy, measurement or device profile.

pub(super) mod layers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::kernels::Format;
use edgellm::model::ModelError;
use edgellm::model::adapter::Adapter;
use edgellm::model::files::ModelFiles;
use edgellm::model::io::read_text;
use edgellm::model::values::{CompressionPolicy, DeviceProfile, Measurement, Value as _, read_value};
use serde_json::{Value, json};

use self::layers::budget;
use super::failure::Usage;
use super::measure::sensitivities;
use super::output::{bytes, table};
use super::{Context, profile};

/// Show what is in a model, adapter, policy, measurement or profile
#[derive(Args)]
pub(crate) struct Inspect {
    /// A folder, a file, or the name of a stored model
    path: String,
    /// Draw bits and sparsity by layer of a compressed model into this SVG file
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
}

/// The kinds of things that can be looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Adapter,
    Policy,
    Measurement,
    Profile,
}

impl Inspect {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let path = ctx.store.resolve(&self.path)?;
        let (json, text) = match kind(&path)? {
            Kind::Model => {
                let files = ModelFiles::open(&path)?;
                if let Some(chart) = &self.chart {
                    layers::draw(&files, chart)?;
                }
                model(&files, ctx.verbose > 0)?
            }
            _ if self.chart.is_some() => {
                return Err(Usage(format!("--chart: expected a compressed model, found {}", path.display())).into());
            }
            Kind::Adapter => adapter(&path)?,
            Kind::Policy => policy(&read_value(&path)?),
            Kind::Measurement => measurement(&read_value(&path)?),
            Kind::Profile => {
                let value: DeviceProfile = read_value(&path)?;
                (json!({ "kind": "device profile", "profile": value }), profile::describe(&value))
            }
        };
        ctx.result(json, || text)
    }
}

/// What a path holds, by its files or its fields.
fn kind(path: &Path) -> anyhow::Result<Kind> {
    if path.is_dir() {
        if Adapter::is_adapter_dir(path) {
            return Ok(Kind::Adapter);
        }
        if path.join("config.json").is_file() {
            return Ok(Kind::Model);
        }
        return Err(unknown(path, "a config.json or an adapter_config.json", "a folder with neither"));
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let fields: Value = match extension.as_str() {
        "toml" => match toml::from_str(&read_text(path)?) {
            Ok(value) => value,
            Err(e) => return Err(unknown(path, "TOML", &e.message().replace('\n', " "))),
        },
        "json" => match serde_json::from_str(&read_text(path)?) {
            Ok(value) => value,
            Err(e) => return Err(unknown(path, "JSON", &e.to_string())),
        },
        "safetensors" => {
            return Err(unknown(path, "a model's or adapter's folder", "one file of it; give the folder"));
        }
        // Whatever else it is called, it can only be a GGUF file; opening it says so if it is none.
        _ => return Ok(Kind::Model),
    };
    let has = |names: &[&str]| names.iter().all(|name| fields.get(name).is_some());
    if has(&["solver", "units"]) {
        Ok(Kind::Policy)
    } else if has(&["options", "units"]) {
        Ok(Kind::Measurement)
    } else if has(&["cores", "read_gbps"]) {
        Ok(Kind::Profile)
    } else {
        let kinds = format!("a {}, a {} or a {}", CompressionPolicy::KIND, Measurement::KIND, DeviceProfile::KIND);
        Err(unknown(path, &kinds, "a file with other fields"))
    }
}

fn unknown(path: &Path, expected: &str, found: &str) -> anyhow::Error {
    let (what, expected, found) = ("content".into(), expected.into(), found.into());
    ModelError::Format { path: path.to_path_buf(), what, expected, found }.into()
}

/// Weights and bytes of a part of a model, with its formats.
#[derive(Default)]
struct Part {
    weights: u64,
    bytes: u64,
    /// Weights that were pruned.
    pruned: f64,
    formats: BTreeMap<String, u64>,
}

impl Part {
    fn add(&mut self, weights: u64, bytes: u64, sparsity: f64, format: String) {
        self.weights += weights;
        self.bytes += bytes;
        self.pruned += sparsity * weights as f64;
        *self.formats.entry(format).or_default() += weights;
    }

    fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes as f64 / self.weights.max(1) as f64
    }

    fn sparsity(&self) -> f64 {
        self.pruned / self.weights.max(1) as f64
    }

    /// The formats, that of most weights first.
    fn formats(&self) -> String {
        let mut formats: Vec<(&String, &u64)> = self.formats.iter().collect();
        formats.sort_by_key(|(_, weights)| std::cmp::Reverse(**weights));
        formats.into_iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

/// The part of a model that a tensor belongs to: `embedding`, `block.3`, `head`, `norm`.
fn part_of(name: &str) -> (usize, String) {
    if let Some((block, _)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        && let Ok(index) = block.parse::<usize>()
    {
        return (index.saturating_add(1), format!("block.{index}"));
    }
    match name.split('.').nth(1) {
        Some("embed_tokens") => (0, "embedding".into()),
        _ if name.starts_with("lm_head") => (usize::MAX, "head".into()),
        _ => (usize::MAX - 1, "norm".into()),
    }
}

/// The parts of a model in order, by [`part_of`].
type Parts = BTreeMap<(usize, String), Part>;

fn model(files: &ModelFiles, verbose: bool) -> anyhow::Result<(Value, String)> {
    let config = files.config();
    let mut parts = Parts::new();
    let mut whole = Part::default();
    let mut tensors = Vec::new();
    for name in files.names() {
        let shape = files.shape(name)?;
        let weights = shape.iter().fold(1u64, |n, d| n.saturating_mul(*d as u64));
        let (format, size) = match shape.len() {
            2 => {
                let layout = files.layout(name)?;
                (layout.format.name(), layout.bytes())
            }
            // Vectors are read as f32.
            _ => (Format::F32.name(), weights.saturating_mul(4)),
        };
        if shape.len() == 2 {
            let sparsity = layers::sparsity_of(files, name)?;
            parts.entry(part_of(name)).or_default().add(weights, size, sparsity, format.clone());
        }
        whole.add(weights, size, 0.0, format.clone());
        tensors.push(json!({ "name": name, "shape": shape, "format": format, "bytes": size }));
    }
    let units: Vec<Value> = parts
        .iter()
        .map(|((_, unit), part)| {
            json!({
                "unit": unit, "weights": part.weights, "bytes": part.bytes,
                "bits_per_weight": part.bits_per_weight(), "sparsity": part.sparsity(), "formats": part.formats(),
            })
        })
        .collect();
    let template = files.chat_template()?.is_some();
    let mut json = json!({
        "kind": "model", "path": files.path(), "container": container(files),
        "architecture": config.architecture.name, "parameters": whole.weights, "bytes": files.file_bytes(),
        "bits_per_weight": whole.bits_per_weight(), "n_layers": config.n_layers, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim, "vocab_size": config.vocab_size, "context": config.max_position_embeddings,
        "tied_head": config.tie_word_embeddings, "chat_template": template, "units": units,
    });
    if verbose {
        json["tensors"] = Value::Array(tensors.clone());
    }
    if let Some(policy) = files.quantization().and_then(|q| q.policy.as_ref()) {
        json["policy"] = json!({
            "solver": policy.solver, "granularity": policy.granularity, "budget": policy.budget,
            "measurement_digest": policy.measurement_digest, "model_digest": policy.model_digest,
            "compressor": policy.compressor,
        });
    }
    Ok((json, model_text(files, &whole, &parts, template, verbose.then_some(&tensors))))
}

fn container(files: &ModelFiles) -> &'static str {
    match (files.gguf(), files.quantization()) {
        (Some(_), _) => "GGUF file",
        (None, Some(_)) => "compressed directory",
        (None, None) => "Hugging Face directory",
    }
}

fn model_text(files: &ModelFiles, whole: &Part, parts: &Parts, template: bool, tensors: Option<&Vec<Value>>) -> String {
    let config = files.config();
    let yes = |b: bool| if b { "yes" } else { "no" };
    let mut text = format!(
        "{}: {}, {}\n{:.1} million parameters, {} on disk, {:.3} bits per weight as loaded\n",
        files.path().display(),
        container(files),
        config.architecture.name,
        whole.weights as f64 / 1e6,
        bytes(files.file_bytes()),
        whole.bits_per_weight(),
    );
    text.push_str(&format!(
        "{} blocks, hidden size {}, feed-forward {}, {} heads on {} key and value heads of {}\n",
        config.n_layers,
        config.hidden_size,
        config.intermediate_size,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim
    ));
    text.push_str(&format!(
        "vocabulary {}, context {}, tied head: {}, chat template: {}\n",
        config.vocab_size,
        config.max_position_embeddings,
        yes(config.tie_word_embeddings),
        yes(template)
    ));
    if let Some(policy) = files.quantization().and_then(|q| q.policy.as_ref()) {
        let (solver, budget) = (&policy.solver, budget(&policy.budget));
        text.push_str(&format!("compressed with the policy '{solver}', budget: {budget}\n{}", layers::origin(policy)));
    }
    let most = parts.values().map(Part::bits_per_weight).fold(0.0, f64::max);
    let rows: Vec<Vec<String>> = parts
        .iter()
        .map(|((_, unit), part)| {
            let bits = part.bits_per_weight();
            let pruned = format!("{:.0}%", 100.0 * part.sparsity());
            let bar = layers::bar(bits, most, part.sparsity());
            vec![unit.clone(), format!("{bits:.2}"), bytes(part.bytes), pruned, bar, part.formats()]
        })
        .collect();
    text.push('\n');
    text.push_str(&table(&["unit", "bits/weight", "size", "pruned", "", "formats"], &rows));
    if let Some(tensors) = tensors {
        let cell = |t: &Value, key: &str| t[key].as_str().map_or_else(|| t[key].to_string(), String::from);
        let row = |t: &Value| vec![cell(t, "name"), cell(t, "shape"), cell(t, "format")];
        text.push('\n');
        text.push_str(&table(&["tensor", "shape", "format"], &tensors.iter().map(row).collect::<Vec<_>>()));
    }
    text
}

/// An adapter by its configuration and the shapes in its file; the base model is not needed.
fn adapter(dir: &Path) -> anyhow::Result<(Value, String)> {
    let config_path = dir.join("adapter_config.json");
    let text = read_text(&config_path)?;
    let config: Value = serde_json::from_str(&text).map_err(|e| unknown(&config_path, "JSON", &e.to_string()))?;
    let weights = edgellm::model::safetensors::Safetensors::open(&dir.join("adapter_model.safetensors"))?;
    let mut parameters = 0u64;
    let mut blocks = std::collections::BTreeSet::new();
    for name in weights.names() {
        let shape = &weights.entry(name)?.shape;
        parameters = parameters.saturating_add(shape.iter().map(|d| *d as u64).product());
        if let Some(block) = name.split("layers.").nth(1).and_then(|rest| rest.split('.').next()) {
            blocks.insert(block.to_string());
        }
    }
    let exits_path = dir.join("edgellm_exits.safetensors");
    let mut exits: Vec<usize> = Vec::new();
    if exits_path.exists() {
        let file = edgellm::model::safetensors::Safetensors::open(&exits_path)?;
        exits.extend(file.names().filter_map(|name| name.split('.').nth(1)?.parse::<usize>().ok()));
        exits.sort_unstable();
    }
    let json = json!({
        "kind": "adapter", "path": dir, "peft_type": config["peft_type"], "rank": config["r"],
        "alpha": config["lora_alpha"], "targets": config["target_modules"],
        "base_model": config["base_model_name_or_path"], "parameters": parameters, "blocks": blocks.len(),
        "bytes": weights.file_bytes(), "exits": exits,
    });
    let list = |value: &Value| match value.as_array() {
        Some(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        None => value.to_string(),
    };
    let text = format!(
        "{}: {} adapter for {}\nrank {}, alpha {}, {} values in {} blocks, {}\ntargets: {}\nexits: {}\n",
        dir.display(),
        config["peft_type"].as_str().unwrap_or("unknown"),
        config["base_model_name_or_path"].as_str().unwrap_or("an unnamed model"),
        config["r"],
        config["lora_alpha"],
        parameters,
        blocks.len(),
        bytes(weights.file_bytes()),
        list(&config["target_modules"]),
        if exits.is_empty() { "none".into() } else { format!("after {exits:?} blocks") },
    );
    Ok((json, text))
}

fn policy(policy: &CompressionPolicy) -> (Value, String) {
    let rows: Vec<Vec<String>> = policy.units.iter().map(|u| vec![u.unit.to_string(), u.format.to_string()]).collect();
    let text = format!(
        "compression policy by '{}', {} units, budget: {}\n{}\n{}",
        policy.solver,
        policy.units.len(),
        budget(&policy.budget),
        layers::origin(policy),
        table(&["unit", "format"], &rows)
    );
    (json!({ "kind": CompressionPolicy::KIND, "policy": policy }), text)
}

fn measurement(measurement: &Measurement) -> (Value, String) {
    let text = format!(
        "measurement of {}, {} units, {} options, {} calibration tokens\n\n{}",
        measurement.model,
        measurement.units.len(),
        measurement.options.len(),
        measurement.calibration_tokens,
        sensitivities(measurement)
    );
    (json!({ "kind": Measurement::KIND, "measurement": measurement }), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_belong_to_parts_in_order() {
        let names = [
            ("model.embed_tokens.weight", "embedding"),
            ("model.layers.0.mlp.up_proj.weight", "block.0"),
            ("model.layers.11.self_attn.q_proj.weight", "block.11"),
            ("model.norm.weight", "norm"),
            ("lm_head.weight", "head"),
        ];
        let parts: Vec<(usize, String)> = names.iter().map(|(name, _)| part_of(name)).collect();
        assert!(parts.is_sorted());
        for (part, (_, expected)) in parts.iter().zip(names) {
            assert_eq!(part.1, expected);
        }
    }

    #[test]
    fn files_are_known_by_their_fields() {
        let folder = tempfile::tempdir().unwrap();
        let check = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            kind(&path).map_err(|e| e.to_string())
        };
        assert_eq!(check("a.json", r#"{"solver": "x", "units": []}"#), Ok(Kind::Policy));
        assert_eq!(check("a.toml", "units = []\noptions = []\n"), Ok(Kind::Measurement));
        assert_eq!(check("b.toml", "cores = []\nread_gbps = []\n"), Ok(Kind::Profile));
        assert_eq!(check("x.gguf", ""), Ok(Kind::Model));
        for (name, text) in [("c.json", "{}"), ("d.json", "["), ("e.toml", "="), ("f.safetensors", "")] {
            assert!(check(name, text).unwrap_err().contains("expected"), "{name}");
        }
        assert!(kind(folder.path()).is_err());
    }
}
