//! The model's configuration: one structure for every architecture, from Hugging Face's `config.json`.
//!
//! A GGUF file's metadata is first written as such a `config.json` (see [`crate::gguf`]), so that there is one reading
//! of the fields. The JSON that was read is kept whole: [`ModelConfig::to_json`] gives it back, unknown fields too.

use std::path::Path;

use serde_json::{Map, Value};

use crate::arch::{Architecture, Switch, WindowRule};
use crate::error::{ModelError, Result, Shown};
use crate::rope::{RopeConfig, RopeScaling, inv_freq, yarn_attention_factor};
use crate::values::Projection;

/// What a decoder has to know of a model.
///
/// The fields are read from the JSON; [`set`](Self::set) changes the JSON, not the fields.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// The line of the table of architectures.
    pub architecture: &'static Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Sliding window of every block: keys that a query sees, itself included.
    pub windows: Vec<Option<usize>>,
    /// Whether each block has the rotary embedding.
    pub rope_layers: Vec<bool>,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub o_bias: bool,
    /// Biases of the feed-forward part.
    pub mlp_bias: bool,
    /// RMSNorm on every head's query and key.
    pub qk_norm: bool,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Start of a text.
    pub bos_token_id: Option<u32>,
    /// Ends of a text; the first is the one that training appends.
    pub eos_token_ids: Vec<u32>,
    /// Filler.
    pub pad_token_id: Option<u32>,
    /// Positions that the model is made for.
    pub max_position_embeddings: usize,
    json: Map<String, Value>,
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// The text is no JSON object, its architecture is not supported, or a field is missing or makes no sense.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| ModelError::format(path, "configuration", "a JSON object", e))?;
        Self::from_json(path, value)
    }

    /// As [`parse`](Self::parse), from a JSON value.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn from_json(path: &Path, value: Value) -> Result<Self> {
        let Value::Object(json) = value else {
            return Err(ModelError::format(path, "configuration", "a JSON object", "another kind of value"));
        };
        let fields = Fields { path, json: &json };
        let architecture = fields.architecture()?;
        if let Some(act) = fields.str("hidden_act")?.filter(|act| !["silu", "swish"].contains(act)) {
            return Err(ModelError::unsupported(path, format!("activation '{}'", Shown(act)), "silu"));
        }
        let hidden_size = fields.size("hidden_size", 1 << 20)?;
        let n_layers = fields.size("num_hidden_layers", 1 << 12)?;
        let n_heads = fields.size("num_attention_heads", 1 << 16)?;
        let n_kv_heads = fields.size_or("num_key_value_heads", 1 << 16, n_heads)?;
        if n_heads % n_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads = {n_heads}");
            return Err(ModelError::config(path, "num_key_value_heads", expected, n_kv_heads));
        }
        let head_dim =
            fields.size_or("head_dim", 1 << 14, architecture.default_head_dim.unwrap_or(hidden_size / n_heads))?;
        if head_dim == 0 || head_dim % 2 != 0 {
            return Err(ModelError::config(path, "head_dim", "an even number from 2", head_dim));
        }
        let max_position_embeddings = fields.size_or("max_position_embeddings", 1 << 31, 2048)?;
        let rope_layers = fields.rope_layers(architecture, n_layers)?;
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 1 << 22)?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size: fields.size("vocab_size", 1 << 24)?,
            rms_norm_eps: fields.number_or("rms_norm_eps", 0.0..=1.0, 1e-6)?,
            rope: fields.rope(architecture, max_position_embeddings, head_dim)?,
            windows: fields.windows(architecture, &rope_layers)?,
            rope_layers,
            qkv_bias: fields.switch(architecture.qkv_bias)?,
            o_bias: fields.switch(architecture.o_bias)?,
            mlp_bias: fields.switch(architecture.mlp_bias)?,
            qk_norm: architecture.qk_norm,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(architecture.default_tied),
            bos_token_id: fields.token("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token("eos_token_id")?,
            pad_token_id: fields.token("pad_token_id")?.first().copied(),
            max_position_embeddings,
            json,
        })
    }

    /// Takes the ends of a text from a `generation_config.json`: they go before those of the configuration.
    ///
    /// # Errors
    /// The text is no JSON object, or its token ids are none.
    pub fn add_generation_config(&mut self, path: &Path, text: &str) -> Result<()> {
        let json: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| ModelError::format(path, "generation configuration", "a JSON object", e))?;
        let fields = Fields { path, json: &json };
        let mut ends = fields.token("eos_token_id")?;
        ends.append(&mut self.eos_token_ids);
        let mut seen = std::collections::BTreeSet::new();
        ends.retain(|id| seen.insert(*id));
        self.eos_token_ids = ends;
        self.bos_token_id = self.bos_token_id.or(fields.token("bos_token_id")?.first().copied());
        self.pad_token_id = self.pad_token_id.or(fields.token("pad_token_id")?.first().copied());
        Ok(())
    }

    /// The `config.json`, as it was read and [`set`](Self::set).
    pub fn to_json(&self) -> Value {
        Value::Object(self.json.clone())
    }

    /// A field of the JSON.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.json.get(field)
    }

    /// Sets a field of the JSON that [`to_json`](Self::to_json) gives, such as `torch_dtype`.
    pub fn set(&mut self, field: &str, value: Value) {
        self.json.insert(field.to_owned(), value);
    }

    /// Removes a field of the JSON.
    pub fn remove(&mut self, field: &str) {
        self.json.remove(field);
    }

    /// The factor on attention scores, `1 / sqrt(head_dim)`.
    pub fn attention_scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    /// The sliding window of a block; `None` where it sees everything.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Whether a block has the rotary embedding.
    pub fn uses_rope(&self, layer: usize) -> bool {
        self.rope_layers.get(layer).copied().unwrap_or(true)
    }

    /// Rotary frequencies and the factor on cosines and sines, as [`inv_freq`](crate::rope::inv_freq).
    pub fn inv_freq(&self) -> (Vec<f64>, f64) {
        inv_freq(&self.rope, self.head_dim)
    }

    /// Output and input features of a projection.
    pub fn projection_shape(&self, projection: Projection) -> [usize; 2] {
        let (d, i) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        match projection {
            Projection::Q => [q, d],
            Projection::K | Projection::V => [kv, d],
            Projection::O => [d, q],
            Projection::Gate | Projection::Up => [i, d],
            Projection::Down => [d, i],
        }
    }
}

/// The JSON's fields, with checks. `null` counts as absent, as in transformers.
struct Fields<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.json.get(field).filter(|v| !v.is_null())
    }

    fn wrong<T>(&self, field: &str, expected: impl Into<String>, found: &Value) -> Result<T> {
        Err(ModelError::config(self.path, field, expected, Shown(&found.to_string())))
    }

    fn size_if(&self, field: &str, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=most).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => self.wrong(field, format!("an integer from 1 to {most}"), value),
        }
    }

    fn size_or(&self, field: &str, most: usize, default: usize) -> Result<usize> {
        Ok(self.size_if(field, most)?.unwrap_or(default))
    }

    fn size(&self, field: &str, most: usize) -> Result<usize> {
        self.size_if(field, most)?
            .ok_or_else(|| ModelError::config(self.path, field, format!("an integer from 1 to {most}"), "nothing"))
    }

    fn number_if(&self, field: &str, range: std::ops::RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => self.wrong(field, format!("a number from {} to {}", range.start(), range.end()), value),
        }
    }

    fn number_or(&self, field: &str, range: std::ops::RangeInclusive<f64>, default: f64) -> Result<f64> {
        Ok(self.number_if(field, range)?.unwrap_or(default))
    }

    fn bool(&self, field: &str) -> Result<Option<bool>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => self.wrong(field, "true or false", other),
        }
    }

    fn str(&self, field: &str) -> Result<Option<&'a str>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => self.wrong(field, "a text", other),
        }
    }

    fn array(&self, field: &str, len: usize) -> Result<Option<&'a [Value]>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(items)) if items.len() == len => Ok(Some(items)),
            Some(other) => self.wrong(field, format!("a list of {len}, one for each block"), other),
        }
    }

    fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => self.wrong(field, "an object", other),
        }
    }

    fn switch(&self, switch: Switch) -> Result<bool> {
        match switch {
            Switch::Always(on) => Ok(on),
            Switch::Field(field) => Ok(self.bool(field)?.unwrap_or(false)),
        }
    }

    /// One token id, a list of them, or none.
    fn token(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let ids = match value {
            // Some files write -1 for none.
            Value::Number(n) if n.as_i64() == Some(-1) => Some(Vec::new()),
            Value::Array(items) => items.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        ids.map_or_else(|| self.wrong(field, "a token id or a list of them", value), Ok)
    }

    fn architecture(&self) -> Result<&'static Architecture> {
        if let Some(name) = self.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) {
            return Architecture::by_name(name).ok_or_else(|| {
                let what = format!("architecture '{}'", Shown(name));
                ModelError::unsupported(self.path, what, Architecture::names())
            });
        }
        match self.str("model_type")? {
            Some(model_type) => Architecture::by_model_type(model_type).ok_or_else(|| {
                let what = format!("model type '{}'", Shown(model_type));
                ModelError::unsupported(self.path, what, Architecture::names())
            }),
            None => Err(ModelError::config(self.path, "architectures", "a list with a class name", "nothing")),
        }
    }

    /// Per block, whether it has the rotary embedding. The list `no_rope_layers` has 1 where it *is* used.
    fn rope_layers(&self, architecture: &Architecture, n_layers: usize) -> Result<Vec<bool>> {
        let Some(default) = architecture.no_rope_interval else { return Ok(vec![true; n_layers]) };
        let Some(list) = self.array("no_rope_layers", n_layers)? else {
            let interval = self.size_or("no_rope_layer_interval", 1 << 12, default)?;
            return Ok((1..=n_layers).map(|layer| layer % interval != 0).collect());
        };
        let flag = |value: &Value| match value {
            Value::Bool(used) => Some(*used),
            other => other.as_u64().filter(|n| *n <= 1).map(|n| n == 1),
        };
        match list.iter().map(flag).collect() {
            Some(flags) => Ok(flags),
            None => self.wrong("no_rope_layers", "a list of 0 and 1", &Value::Array(list.to_vec())),
        }
    }

    fn windows(&self, architecture: &Architecture, rope_layers: &[bool]) -> Result<Vec<Option<usize>>> {
        let n_layers = rope_layers.len();
        let enabled = match architecture.windows {
            WindowRule::Never => false,
            WindowRule::All => true,
            WindowRule::FromLayer | WindowRule::WithoutRope => self.bool("use_sliding_window")?.unwrap_or(false),
        };
        let window = if enabled { self.size_if("sliding_window", 1 << 31)? } else { None };
        let Some(window) = window else { return Ok(vec![None; n_layers]) };
        if let Some(kinds) = self.array("layer_types", n_layers)? {
            return kinds
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("sliding_attention") => Ok(Some(window)),
                    Some("full_attention") => Ok(None),
                    _ => self.wrong("layer_types", "full_attention or sliding_attention", kind),
                })
                .collect();
        }
        let first = match self.get("max_window_layers").and_then(Value::as_u64) {
            Some(0) => 0,
            _ => self.size_or("max_window_layers", 1 << 12, 28)?,
        };
        let has = |layer: usize| match architecture.windows {
            WindowRule::Never => false,
            WindowRule::All => true,
            WindowRule::FromLayer => layer >= first,
            WindowRule::WithoutRope => !rope_layers[layer],
        };
        Ok((0..n_layers).map(|layer| has(layer).then_some(window)).collect())
    }

    /// Either `rope_theta` and `rope_scaling`, or `rope_parameters` with both.
    fn rope(&self, architecture: &Architecture, max_positions: usize, head_dim: usize) -> Result<RopeConfig> {
        let theta_range = 1.0 + f64::EPSILON..=1e12;
        let part_range = 0.0..=1.0;
        let parameters = self.object("rope_parameters")?;
        let scaling = match parameters {
            Some(json) => Some(json),
            None => self.object("rope_scaling")?,
        };
        let inner = parameters.map(|json| Fields { path: self.path, json });
        let inner_number = |field: &str, range| inner.as_ref().map_or(Ok(None), |i| i.number_if(field, range));
        let theta = match inner_number("rope_theta", theta_range.clone())? {
            Some(theta) => theta,
            None => self.number_or("rope_theta", theta_range, architecture.default_rope_theta)?,
        };
        let partial_rotary_factor = match inner_number("partial_rotary_factor", part_range.clone())? {
            Some(part) => part,
            None => self.number_or("partial_rotary_factor", part_range, 1.0)?,
        };
        let scaling = match scaling {
            Some(json) => Fields { path: self.path, json }.rope_scaling(max_positions, head_dim)?,
            None => RopeScaling::None,
        };
        Ok(RopeConfig { theta, partial_rotary_factor, scaling })
    }

    /// The object `rope_scaling` or `rope_parameters`.
    fn rope_scaling(&self, max_positions: usize, head_dim: usize) -> Result<RopeScaling> {
        let kind = match self.str("rope_type")? {
            Some(kind) => Some(kind),
            None => self.str("type")?,
        };
        let factor = |default: Option<f64>| match (self.number_if("factor", 1e-3..=1e6)?, default) {
            (Some(factor), _) | (None, Some(factor)) => Ok(factor),
            (None, None) => Err(ModelError::config(self.path, "factor", "the factor of rope_scaling", "nothing")),
        };
        let original = self.size_if("original_max_position_embeddings", 1 << 31)?;
        match kind {
            None if self.json.values().any(Value::is_object) => {
                let what = "rotary parameters per kind of layer";
                Err(ModelError::unsupported(self.path, what, "one set for all layers"))
            }
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: factor(None)? }),
            Some("llama3") => {
                let low = self.number_or("low_freq_factor", 1e-3..=1e6, 1.0)?;
                let high = self.number_or("high_freq_factor", 1e-3..=1e6, 4.0)?;
                if high <= low {
                    let expected = format!("more than low_freq_factor = {low}");
                    return Err(ModelError::config(self.path, "high_freq_factor", expected, high));
                }
                Ok(RopeScaling::Llama3 {
                    factor: factor(None)?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: original.unwrap_or(max_positions),
                })
            }
            Some("yarn") => {
                let original_context = original.unwrap_or(max_positions);
                let factor = factor(original.map(|original| max_positions as f64 / original as f64))?;
                self.yarn(factor, original_context)
            }
            Some("factors") => self.rope_factors(head_dim),
            Some(other) => {
                let what = format!("rope scaling '{}'", Shown(other));
                Err(ModelError::unsupported(self.path, what, "default, linear, llama3, yarn"))
            }
        }
    }

    fn yarn(&self, factor: f64, original_context: usize) -> Result<RopeScaling> {
        let mscale = self.number_if("mscale", 0.0..=1e3)?.filter(|m| *m != 0.0);
        let mscale_all = self.number_if("mscale_all_dim", 0.0..=1e3)?.filter(|m| *m != 0.0);
        let attention_factor = match (self.number_if("attention_factor", 1e-3..=1e3)?, mscale, mscale_all) {
            (Some(given), _, _) => given,
            (None, Some(m), Some(all)) => yarn_attention_factor(factor, m) / yarn_attention_factor(factor, all),
            _ => yarn_attention_factor(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: self.number_or("beta_fast", 1e-3..=1e6, 32.0)?,
            beta_slow: self.number_or("beta_slow", 1e-3..=1e6, 1.0)?,
            attention_factor,
            truncate: self.bool("truncate")?.unwrap_or(true),
        })
    }

    /// A divisor for each pair, which Hugging Face does not know: models from GGUF files have it.
    fn rope_factors(&self, head_dim: usize) -> Result<RopeScaling> {
        let value = self.get("factors").unwrap_or(&Value::Null);
        let number = |v: &Value| v.as_f64().filter(|f| (1e-6..=1e6).contains(f));
        match value.as_array().and_then(|items| items.iter().map(number).collect::<Option<Vec<_>>>()) {
            Some(factors) if factors.len() <= head_dim / 2 => Ok(RopeScaling::Factors(factors)),
            _ => self.wrong("factors", format!("at most {} positive numbers", head_dim / 2), value),
        }
    }
}

#[cfg(test)]
mod tests;
