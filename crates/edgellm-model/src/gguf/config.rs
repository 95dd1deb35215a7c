//! A GGUF file's metadata as a Hugging Face `config.json`.
//!
//! Keys: GGUF specification, section "Standardized key-value pairs". Floats are f32 in the file; their shortest
//! decimal form is taken, so that `1e-05` stays `1e-05`.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::{Gguf, dequantize};
use crate::arch::{Architecture, GGUF_ROPE_FACTORS, Switch};
use crate::error::{ModelError, Result, Shown};
use crate::rope::yarn_attention_factor;

/// The architecture that `general.architecture` names.
///
/// # Errors
/// The key is missing or names another one.
pub fn architecture(gguf: &Gguf) -> Result<&'static Architecture> {
    const KEY: &str = "general.architecture";
    let Some(name) = gguf.str(KEY)? else {
        return Err(ModelError::config(gguf.path(), KEY, "the name of an architecture", "nothing"));
    };
    Architecture::by_gguf(name).ok_or_else(|| {
        let what = format!("GGUF architecture '{}'", Shown(name));
        ModelError::unsupported(gguf.path(), what, "llama, qwen2, qwen3, smollm3")
    })
}

/// The `config.json` of a GGUF model.
///
/// # Errors
/// A key is missing or of the wrong type, or the model has parts that no supported architecture has.
pub fn config_json(gguf: &Gguf) -> Result<Value> {
    let arch = architecture(gguf)?;
    let keys = Keys { gguf, prefix: arch.gguf };
    if keys.u64("expert_count")?.unwrap_or(0) > 0 {
        return Err(ModelError::unsupported(gguf.path(), "a mixture of experts", "dense models"));
    }
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let kv_heads = keys.u64("attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = match keys.u64("attention.key_length")? {
        Some(dim) => dim,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    let value_dim = keys.u64("attention.value_length")?.unwrap_or(head_dim);
    if value_dim != head_dim {
        let expected = format!("the key length {head_dim}");
        return Err(ModelError::config(gguf.path(), &keys.key("attention.value_length"), expected, value_dim));
    }
    let mut json = json!({
        "architectures": [arch.name],
        "model_type": arch.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.required("feed_forward_length")?,
        "num_hidden_layers": keys.required("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size(gguf, &keys)?,
        "rms_norm_eps": keys.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
        "max_position_embeddings": keys.u64("context_length")?.unwrap_or(2048),
        "rope_theta": keys.float("rope.freq_base")?.unwrap_or(10_000.0),
        "tie_word_embeddings": !gguf.tensors().contains_key("output.weight"),
    });
    let fields = json.as_object_mut().expect("an object literal");
    add_biases(gguf, arch, fields)?;
    add_rope(gguf, &keys, head_dim, fields)?;
    add_window(&keys, fields)?;
    add_tokens(gguf, fields)?;
    Ok(json)
}

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn u64(&self, name: &str) -> Result<Option<u64>> {
        self.gguf.u64(&self.key(name))
    }

    fn required(&self, name: &str) -> Result<u64> {
        self.u64(name)?
            .ok_or_else(|| ModelError::config(self.gguf.path(), &self.key(name), "an integer from 1", "nothing"))
    }

    /// A float by the shortest decimal that is the same f32.
    fn float(&self, name: &str) -> Result<Option<f64>> {
        Ok(self.gguf.f64(&self.key(name))?.map(shortest))
    }

    fn str(&self, name: &str) -> Result<Option<&str>> {
        self.gguf.str(&self.key(name))
    }
}

fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn vocab_size(gguf: &Gguf, keys: &Keys<'_>) -> Result<u64> {
    // The embedding's rows are what counts; the key may be absent or lag behind.
    match gguf.tensors().get("token_embd.weight") {
        Some(embedding) => Ok(embedding.shape[0] as u64),
        None => keys.required("vocab_size"),
    }
}

fn add_biases(gguf: &Gguf, arch: &Architecture, fields: &mut Map<String, Value>) -> Result<()> {
    let has = |part: &str| gguf.tensors().contains_key(&format!("blk.0.{part}.bias"));
    let groups = [
        ("query, key and value", arch.qkv_bias, has("attn_q")),
        ("attention output", arch.o_bias, has("attn_output")),
        ("feed-forward", arch.mlp_bias, has("ffn_up")),
    ];
    for (what, switch, found) in groups {
        match switch {
            Switch::Always(expected) if expected != found => {
                let with = |on: bool| if on { "with biases" } else { "without biases" };
                return Err(ModelError::unsupported(
                    gguf.path(),
                    format!("{} {} on its {what} projections", arch.gguf, with(found)),
                    with(expected),
                ));
            }
            Switch::Always(_) => {}
            Switch::Field(field) => match fields.insert(field.into(), found.into()) {
                Some(before) if before != Value::Bool(found) => {
                    let what = "a bias on only some of the attention's projections";
                    return Err(ModelError::unsupported(gguf.path(), what, "a bias on all or none"));
                }
                _ => {}
            },
        }
    }
    Ok(())
}

fn add_rope(gguf: &Gguf, keys: &Keys<'_>, head_dim: u64, fields: &mut Map<String, Value>) -> Result<()> {
    if let Some(rotary) = keys.u64("rope.dimension_count")?.filter(|&rotary| rotary != head_dim) {
        fields.insert("partial_rotary_factor".into(), json!(rotary as f64 / head_dim as f64));
    }
    let original = keys.u64("rope.scaling.original_context_length")?;
    let scaling = match keys.str("rope.scaling.type")? {
        None | Some("none") => match keys.float("rope.scale_linear")?.filter(|&factor| factor != 1.0) {
            Some(factor) => Some(json!({"rope_type": "linear", "factor": factor})),
            None => rope_factors(gguf, head_dim, fields)?,
        },
        Some("linear") => Some(json!({"rope_type": "linear", "factor": keys.float("rope.scaling.factor")?})),
        Some("yarn") => {
            let factor = keys.float("rope.scaling.factor")?.unwrap_or(1.0);
            let mut yarn = json!({"rope_type": "yarn", "factor": factor});
            if let Some(original) = original {
                yarn["original_max_position_embeddings"] = original.into();
            }
            // llama.cpp multiplies its factor with the usual one.
            if let Some(by) = keys.float("rope.scaling.attn_factor")?.filter(|&by| by != 1.0) {
                yarn["attention_factor"] = json!(by * yarn_attention_factor(factor, 1.0));
            }
            for (key, field) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(beta) = keys.float(&format!("rope.scaling.{key}"))? {
                    yarn[field] = json!(beta);
                }
            }
            Some(yarn)
        }
        Some(other) => {
            let what = format!("rope scaling '{}'", Shown(other));
            return Err(ModelError::unsupported(gguf.path(), what, "none, linear, yarn"));
        }
    };
    if let Some(scaling) = scaling {
        fields.insert("rope_scaling".into(), scaling);
    }
    Ok(())
}

/// The divisors of `rope_freqs.weight`: as Llama 3's parameters where these give the same divisors.
fn rope_factors(gguf: &Gguf, head_dim: u64, fields: &Map<String, Value>) -> Result<Option<Value>> {
    let Some(tensor) = gguf.tensors().get(GGUF_ROPE_FACTORS) else { return Ok(None) };
    let len: usize = tensor.shape.iter().product();
    if len as u64 != head_dim / 2 {
        let expected = format!("{} values, half of a head's width", head_dim / 2);
        return Err(ModelError::tensor(gguf.path(), GGUF_ROPE_FACTORS, expected, len));
    }
    let mut factors = vec![0.0f32; len];
    dequantize(tensor.ggml_type, gguf.tensor(GGUF_ROPE_FACTORS)?.1, &mut factors);
    let theta = fields.get("rope_theta").and_then(Value::as_f64).unwrap_or(10_000.0);
    Ok(Some(llama3_parameters(&factors, theta).unwrap_or_else(|| {
        let factors: Vec<f64> = factors.iter().map(|&f| shortest(f.into())).collect();
        json!({"rope_type": "factors", "factors": factors})
    })))
}

/// Llama 3's published parameters (8192 positions, ramp from 1 to 4 turns), if they give these divisors.
fn llama3_parameters(factors: &[f32], theta: f64) -> Option<Value> {
    const CONTEXT: f64 = 8192.0;
    let factor = f64::from(*factors.last()?);
    let same = factors.iter().enumerate().all(|(i, &found)| {
        let turns = CONTEXT * theta.powf(-(i as f64) / factors.len() as f64) / (2.0 * PI);
        let kept = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        let expected = 1.0 / (kept + (1.0 - kept) / factor);
        (f64::from(found) - expected).abs() <= 1e-4 * expected
    });
    (same && factor > 1.0).then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT as u64,
        })
    })
}

fn add_window(keys: &Keys<'_>, fields: &mut Map<String, Value>) -> Result<()> {
    let Some(window) = keys.u64("attention.sliding_window")?.filter(|&w| w > 0) else { return Ok(()) };
    // llama.cpp has the window of these architectures on every block, if at all.
    let layers = fields.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(1 << 12);
    fields.insert("sliding_window".into(), window.into());
    fields.insert("use_sliding_window".into(), true.into());
    fields.insert("layer_types".into(), vec!["sliding_attention"; layers as usize].into());
    Ok(())
}

fn add_tokens(gguf: &Gguf, fields: &mut Map<String, Value>) -> Result<()> {
    let id = |name: &str| gguf.u64(&format!("tokenizer.ggml.{name}_token_id"));
    let mut ends = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some(end) = id(name)?.filter(|end| !ends.contains(end)) {
            ends.push(end);
        }
    }
    match ends.as_slice() {
        [] => {}
        [one] => drop(fields.insert("eos_token_id".into(), (*one).into())),
        several => drop(fields.insert("eos_token_id".into(), several.to_vec().into())),
    }
    for (name, field) in [("bos", "bos_token_id"), ("padding", "pad_token_id")] {
        if let Some(id) = id(name)? {
            fields.insert(field.into(), id.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_divisors_are_recognised() {
        // As llama.cpp's converter computes them for Llama 3.2: theta 500000, heads of 64, factor 32.
        let factors: Vec<f32> = (0..32)
            .map(|i| {
                let frequency = 500_000f64.powf(-(f64::from(i)) / 32.0);
                let wavelength = 2.0 * PI / frequency;
                if wavelength < 8192.0 / 4.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    32.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
                }
            })
            .collect();
        let json = llama3_parameters(&factors, 500_000.0).unwrap();
        assert_eq!(json["factor"], 32.0);
        assert!(llama3_parameters(&factors, 10_000.0).is_none());
        assert!(llama3_parameters(&[1.0, 1.0], 10_000.0).is_none());
        assert!(llama3_parameters(&[], 10_000.0).is_none());
    }

    #[test]
    fn floats_take_their_short_form() {
        assert_eq!(shortest(f64::from(1e-5f32)), 1e-5);
        assert_eq!(shortest(100_000.0), 100_000.0);
    }
}
