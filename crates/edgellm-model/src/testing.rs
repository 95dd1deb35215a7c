//! Small random models for tests and examples: the same seed gives the same values everywhere.
//!
//! [`tiny_decoder`] makes one in memory, [`tiny_model_dir`] writes the same one as a Hugging Face directory.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use edgellm_kernels::PackedHost;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::ModelError;
use crate::config::ModelConfig;
use crate::decoder::{Block, Decoder, Linear, ResidentStore, Weight};
use crate::io::atomic_write;
use crate::safetensors::{SafetensorsWriter, TensorSpec};
use crate::values::Projection;

/// A tensor of a model: Hugging Face name, shape, values.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// The `config.json` of the tiny model: 4 blocks of the Llama layout, hidden size 64, 4 heads on 2 key and value
/// heads, a vocabulary of 288 (the 256 bytes and specials), tied head.
pub fn tiny_config_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": true,
        "bos_token_id": 257,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    })
}

/// [`tiny_config_json`] with some fields replaced: `json!({"tie_word_embeddings": false})`.
///
/// # Panics
/// If the result is no valid configuration.
pub fn tiny_config(changes: Value) -> ModelConfig {
    let mut config = tiny_config_json();
    if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
        config.extend(changes);
    }
    ModelConfig::from_json(Path::new("config.json"), config).expect("a valid tiny configuration")
}

/// Random tensors for a configuration, in file order.
pub fn random_tensors(config: &ModelConfig, seed: u64) -> Vec<NamedTensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // Uniform with mean `centre` and standard deviation `deviation`.
    let mut draw = |name: String, shape: Vec<usize>, centre: f32, deviation: f32| {
        let bound = deviation * 3f32.sqrt();
        let values = (0..shape.iter().product()).map(|_| centre + rng.random_range(-bound..bound)).collect();
        (name, shape, values)
    };
    let d = config.hidden_size;
    let embedding = vec![config.vocab_size, d];
    let mut tensors = vec![draw("model.embed_tokens.weight".into(), embedding.clone(), 0.0, 0.3)];
    for index in 0..config.n_layers {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        tensors.push(draw(name("input_layernorm.weight"), vec![d], 1.0, 0.1));
        for projection in Projection::ALL {
            let [out, input] = config.projection_shape(projection);
            let deviation = (input as f32).sqrt().recip();
            tensors.push(draw(projection.weight_name(index), vec![out, input], 0.0, deviation));
            if has_bias(config, projection) {
                tensors.push(draw(name(&format!("{}.bias", projection.path())), vec![out], 0.0, 0.1));
            }
        }
        if config.qk_norm {
            for part in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                tensors.push(draw(name(part), vec![config.head_dim], 1.0, 0.1));
            }
        }
        tensors.push(draw(name("post_attention_layernorm.weight"), vec![d], 1.0, 0.1));
    }
    tensors.push(draw("model.norm.weight".into(), vec![d], 1.0, 0.1));
    if !config.tie_word_embeddings {
        tensors.push(draw("lm_head.weight".into(), embedding, 0.0, 0.3));
    }
    tensors
}

fn has_bias(config: &ModelConfig, projection: Projection) -> bool {
    match projection {
        Projection::Q | Projection::K | Projection::V => config.qkv_bias,
        Projection::O => config.o_bias,
        Projection::Gate | Projection::Up | Projection::Down => config.mlp_bias,
    }
}

/// A decoder of the tiny model, f32 weights.
///
/// # Panics
/// Never, unless the model's code is wrong.
pub fn tiny_decoder(seed: u64, device: &Device) -> Decoder {
    decoder_of(&tiny_config(json!({})), seed, device)
}

/// A decoder of [`random_tensors`].
///
/// # Panics
/// If the configuration and the tensors do not fit each other.
pub fn decoder_of(config: &ModelConfig, seed: u64, device: &Device) -> Decoder {
    let mut tensors: std::collections::BTreeMap<String, (Vec<usize>, Vec<f32>)> =
        random_tensors(config, seed).into_iter().map(|(name, shape, values)| (name, (shape, values))).collect();
    let mut take = |name: &str| tensors.remove(name);
    let vector = |found: Option<(Vec<usize>, Vec<f32>)>| {
        found.map(|(_, values)| Tensor::<1>::from_data(values.as_slice(), device))
    };
    let matrix = |found: Option<(Vec<usize>, Vec<f32>)>| {
        let (shape, values) = found.expect("the tensor was drawn");
        let host = PackedHost::from_f32(values, shape[0], shape[1]).expect("a matrix that is not empty");
        Weight::Packed(host.to_device(device))
    };
    let mut blocks = Vec::new();
    for index in 0..config.n_layers {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let linears = Projection::ALL.map(|projection| Linear {
            weight: matrix(take(&projection.weight_name(index))),
            bias: vector(take(&name(&format!("{}.bias", projection.path())))),
        });
        blocks.push(Block {
            attn_norm: vector(take(&name("input_layernorm.weight"))).expect("the norm was drawn"),
            mlp_norm: vector(take(&name("post_attention_layernorm.weight"))).expect("the norm was drawn"),
            q_norm: vector(take(&name("self_attn.q_norm.weight"))),
            k_norm: vector(take(&name("self_attn.k_norm.weight"))),
            linears,
        });
    }
    let embedding = matrix(take("model.embed_tokens.weight"));
    let norm = vector(take("model.norm.weight")).expect("the norm was drawn");
    let head = (!config.tie_word_embeddings).then(|| Linear::new(matrix(take("lm_head.weight"))));
    let store = Arc::new(ResidentStore::new(blocks));
    Decoder::from_parts(config.clone(), embedding, store, norm, head, device.clone()).expect("parts that fit")
}

/// Writes the tiny model as a Hugging Face directory: f32 weights, a tokenizer of single bytes, a chat template.
///
/// # Errors
/// A file cannot be written.
pub fn tiny_model_dir(dir: &Path, seed: u64) -> Result<(), ModelError> {
    write_model_dir(dir, &tiny_config(json!({})), seed)
}

/// As [`tiny_model_dir`], for another configuration.
///
/// # Errors
/// A file cannot be written.
pub fn write_model_dir(dir: &Path, config: &ModelConfig, seed: u64) -> Result<(), ModelError> {
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let json = |name: &str, value: &Value| atomic_write(&dir.join(name), value.to_string().as_bytes());
    json("config.json", &config.to_json())?;
    json("tokenizer.json", &byte_tokenizer())?;
    let template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}\
                    {% if add_generation_prompt %}<|assistant|>{% endif %}";
    json(
        "tokenizer_config.json",
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|start|>",
            "eos_token": "<|end|>",
            "chat_template": template,
        }),
    )?;
    let tensors = random_tensors(config, seed);
    let specs: Vec<_> =
        tensors.iter().map(|(name, shape, _)| TensorSpec::new(name, Dtype::F32, shape.as_slice())).collect();
    let mut writer = SafetensorsWriter::create(&dir.join("model.safetensors"), &specs)?;
    for (name, _, values) in &tensors {
        writer.write(name, bytemuck::cast_slice(values))?;
    }
    writer.finish()
}

/// A byte-level BPE tokenizer without merges: token `b` is byte `b`, 256 is `<|end|>`, 257 `<|start|>`.
fn byte_tokenizer() -> Value {
    // GPT-2's printable stand-ins for bytes.
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut vocab = Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        let symbol = char::from_u32(code).map(String::from).unwrap_or_default();
        vocab.insert(symbol, json!(byte));
    }
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(256, "<|end|>"), special(257, "<|start|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    })
}
