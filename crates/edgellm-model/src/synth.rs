//! Random models with the shapes of real families, to measure speed and memory at sizes that nobody needs to download.
//!
//! Weights are uniform with variance `1 / cols`, so that activations neither grow nor vanish, and are packed a few
//! megabytes at a time: a model of any size is written in little memory. Every row is drawn from its own stream of the
//! seed, so that the bytes do not depend on the number of threads or on how rows are put together.

use std::collections::BTreeMap;
use std::path::Path;

use edgellm_kernels::{Arrangement, Format, PackedHost, PackedLayout};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::save::ModelWriter;
use crate::values::Projection;

/// Values that are drawn and packed at a time.
const CHUNK: usize = 1 << 20;

/// The shape of a family's model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// The model whose shape it is.
    pub family: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    n_layers: usize,
    n_heads: usize,
    n_kv_heads: usize,
    vocab_size: usize,
    max_positions: usize,
    rope_theta: f64,
    tied: bool,
}

/// All shapes, smallest first.
pub const PRESETS: [Preset; 5] = [
    Preset {
        name: "135m",
        family: "SmolLM2-135M",
        hidden_size: 576,
        intermediate_size: 1536,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        vocab_size: 49152,
        max_positions: 8192,
        rope_theta: 1e5,
        tied: true,
    },
    Preset {
        name: "0.5b",
        family: "Qwen2.5-0.5B",
        hidden_size: 896,
        intermediate_size: 4864,
        n_layers: 24,
        n_heads: 14,
        n_kv_heads: 2,
        vocab_size: 151_936,
        max_positions: 32768,
        rope_theta: 1e6,
        tied: true,
    },
    Preset {
        name: "1b",
        family: "Llama-3.2-1B",
        hidden_size: 2048,
        intermediate_size: 8192,
        n_layers: 16,
        n_heads: 32,
        n_kv_heads: 8,
        vocab_size: 128_256,
        max_positions: 131_072,
        rope_theta: 5e5,
        tied: true,
    },
    Preset {
        name: "3b",
        family: "Llama-3.2-3B",
        hidden_size: 3072,
        intermediate_size: 8192,
        n_layers: 28,
        n_heads: 24,
        n_kv_heads: 8,
        vocab_size: 128_256,
        max_positions: 131_072,
        rope_theta: 5e5,
        tied: true,
    },
    Preset {
        name: "7b",
        family: "Llama-2-7B",
        hidden_size: 4096,
        intermediate_size: 11008,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 32,
        vocab_size: 32000,
        max_positions: 4096,
        rope_theta: 1e4,
        tied: false,
    },
];

impl Preset {
    /// The preset of a name.
    pub fn by_name(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|preset| preset.name == name)
    }

    /// The `config.json` of such a model in the Llama layout.
    pub fn config_json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.hidden_size / self.n_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "attention_bias": false,
            "mlp_bias": false,
        })
    }
}

/// How the matrices of a random model are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Their format.
    pub format: Format,
    /// In which order their words lie; formats without panels keep rows.
    pub arrangement: Arrangement,
}

/// Rows that are packed together in panels: parts of a matrix have a multiple of them.
const PANEL: usize = 16;

/// Writes a model with random weights, its matrices in `packing`. The tokenizer is copied from the directory
/// `tokenizer`; the configuration may have a larger vocabulary. `on_progress` gets the values done and all of them.
///
/// # Errors
/// The configuration is no plain Llama's, the format does not fit the matrices, or the directory cannot be written.
pub fn write_random_model(
    target: &Path,
    config: Value,
    tokenizer: &Path,
    packing: Packing,
    seed: u64,
    replace: bool,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let config = ModelConfig::from_json(&target.join("config.json"), config)?;
    if config.qk_norm || config.qkv_bias || config.o_bias || config.mlp_bias {
        return Err(ModelError::unsupported(target, "a random model with biases or norms of heads", "neither"));
    }
    let shapes = matrix_shapes(&config);
    let mut layouts = BTreeMap::new();
    for (name, [rows, cols]) in &shapes {
        let layout = PackedLayout::new(*rows, *cols, packing.format)?;
        layouts
            .insert(name.clone(), if packing.arrangement == Arrangement::Panels { layout.prepared() } else { layout });
    }
    let ones = |name: String| (name, vec![1.0; config.hidden_size]);
    let mut vectors = BTreeMap::from([ones("model.norm.weight".into())]);
    for index in 0..config.n_layers {
        vectors.extend([
            ones(format!("model.layers.{index}.input_layernorm.weight")),
            ones(format!("model.layers.{index}.post_attention_layernorm.weight")),
        ]);
    }
    let all: u64 = shapes.iter().map(|(_, [rows, cols])| (rows * cols) as u64).sum();
    let mut done = 0;
    let mut writer = ModelWriter::create_new(target, &config, tokenizer, layouts, &vectors)?;
    for (stream, (name, [rows, cols])) in shapes.iter().enumerate() {
        let most = (CHUNK / cols).max(1).next_multiple_of(PANEL);
        let layout = writer.layouts()[name];
        let mut first = 0;
        while first < *rows {
            let count = most.min(rows - first);
            let values = random_rows(seed, stream as u64, first, count, *cols);
            writer.append(name, &PackedHost::quantize(&values, layout.with_rows(count))?)?;
            first += count;
            done += (count * cols) as u64;
            on_progress(done, all);
        }
    }
    writer.finish(replace)
}

/// The matrices of a model, in the order in which they are drawn.
fn matrix_shapes(config: &ModelConfig) -> Vec<(String, [usize; 2])> {
    let vocabulary = [config.vocab_size, config.hidden_size];
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vocabulary)];
    for index in 0..config.n_layers {
        shapes.extend(Projection::ALL.map(|p| (p.weight_name(index), config.projection_shape(p))));
    }
    if !config.tie_word_embeddings {
        shapes.push(("lm_head.weight".to_owned(), vocabulary));
    }
    shapes
}

/// Rows `first .. first + count` of matrix `stream`: uniform, with variance `1 / cols`.
fn random_rows(seed: u64, stream: u64, first: usize, count: usize, cols: usize) -> Vec<f32> {
    let step = (3.0 / cols as f32).sqrt() / (1u32 << 23) as f32;
    let mut values = vec![0.0; count * cols];
    values.par_chunks_mut(cols).enumerate().for_each(|(row, values)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream << 32 | (first + row) as u64);
        for value in values {
            // From -2^23 to 2^23 - 1.
            *value = (rng.random::<u32>() as i32 >> 8) as f32 * step;
        }
    });
    values
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::decoder::{Activations, Decoder, LoadOptions};
    use crate::files::ModelFiles;
    use crate::generate::to_vec;
    use crate::testing::{tiny_config_json, tiny_model_dir};

    /// Writes a random tiny model and returns the bytes of its weights.
    fn written(folder: &Path, format: &str, seed: u64, changes: Value) -> Vec<u8> {
        written_as(folder, format, Arrangement::Rows, seed, changes)
    }

    fn written_as(folder: &Path, format: &str, arrangement: Arrangement, seed: u64, changes: Value) -> Vec<u8> {
        let tokenizer = folder.join("tiny");
        tiny_model_dir(&tokenizer, 0).unwrap();
        let mut config = tiny_config_json();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let target = folder.join("random");
        let mut last = (0, 1);
        let on_progress = &mut |done, all| last = (done, all);
        let packing = Packing { format: Format::parse(format).unwrap(), arrangement };
        write_random_model(&target, config, &tokenizer, packing, seed, true, on_progress).unwrap();
        assert_eq!(last.0, last.1);
        std::fs::read(target.join("model.safetensors")).unwrap()
    }

    #[test]
    fn random_models_load_and_stay_finite() {
        let folder = tempfile::tempdir().unwrap();
        for (format, tied) in [("q4g32s", true), ("q2g64a", false), ("q8g32s", true), ("f16", false), ("f32", true)] {
            written(folder.path(), format, 0, json!({ "tie_word_embeddings": tied }));
            let files = ModelFiles::open(&folder.path().join("random")).unwrap();
            assert_eq!(files.layout("model.layers.3.mlp.up_proj.weight").unwrap().format.name(), format);
            assert!(files.tokenizer().is_ok());
            let options = LoadOptions { device: Device::flex(), expand: false, activations: Activations::F32 };
            let decoder = Decoder::load(&files, &options).unwrap();
            let logits = to_vec(decoder.forward(&[1, 2, 3, 4], None, None).unwrap()).unwrap();
            let largest = logits.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            assert!(logits.iter().all(|v| v.is_finite()) && (0.1..100.0).contains(&largest), "{format}: {largest}");
        }
    }

    #[test]
    fn the_seed_decides_the_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let first = written(folder.path(), "q4g32s", 1, json!({}));
        assert!(first == written(folder.path(), "q4g32s", 1, json!({})));
        assert!(first != written(folder.path(), "q4g32s", 2, json!({})));
        let whole = random_rows(3, 4, 0, 10, 64);
        assert_eq!(random_rows(3, 4, 6, 2, 64), whole[6 * 64..8 * 64]);
    }

    #[test]
    fn panels_are_those_of_the_prepared_rows() {
        let folder = tempfile::tempdir().unwrap();
        let name = "model.layers.1.mlp.down_proj.weight";
        let matrix = |arrangement| {
            written_as(folder.path(), "q4g32a", arrangement, 1, json!({}));
            ModelFiles::open(&folder.path().join("random")).unwrap().matrix(name).unwrap()
        };
        let rows = matrix(Arrangement::Rows);
        assert_eq!(rows.layout.arrangement, Arrangement::Rows);
        assert!(matrix(Arrangement::Panels) == rows.prepare().unwrap());
    }

    #[test]
    fn values_have_the_variance_that_they_should() {
        let values = random_rows(0, 0, 0, 100, 576);
        let variance: f32 = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!((variance * 576.0 - 1.0).abs() < 0.02, "{variance}");
    }

    #[test]
    fn presets_are_configurations_of_the_size_they_say() {
        for (name, millions) in [("135m", 134), ("0.5b", 493), ("1b", 1235), ("3b", 3212), ("7b", 6738)] {
            let config = Preset::by_name(name).unwrap().config_json();
            let config = ModelConfig::from_json(Path::new("config.json"), config).unwrap();
            let weights: usize = matrix_shapes(&config).iter().map(|(_, [rows, cols])| rows * cols).sum();
            assert_eq!(weights / 1_000_000, millions, "{name}");
        }
        assert_eq!(Preset::by_name("8b"), None);
    }
}
