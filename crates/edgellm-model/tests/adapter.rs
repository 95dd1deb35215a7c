//! Adapters on disk: PEFT's layout, a round trip, and files that are wrong.

use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use edgellm_model::adapter::{Adapter, LoraConfig};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::tiny_decoder;
use edgellm_model::values::Projection;

fn adapter(model: &ModelConfig, device: &Device) -> Adapter {
    let targets = vec![Projection::Q, Projection::Down];
    let lora = LoraConfig { rank: 2, alpha: 4.0, use_rslora: false, targets: targets.into() };
    let mut adapter = Adapter::new(model, lora, 7, device).unwrap();
    for index in 0..model.n_layers {
        let block = adapter.block_mut(index).unwrap();
        for projection in [Projection::Q, Projection::Down] {
            let lora = block.get_mut(projection).as_mut().unwrap();
            lora.b = Tensor::ones(lora.b.dims(), device).mul_scalar(0.01 * (index + 1) as f32);
        }
    }
    adapter.set_exit_norm(1, Tensor::ones([model.hidden_size], device).mul_scalar(1.5));
    adapter.set_exit_norm(model.n_layers, Tensor::ones([model.hidden_size], device));
    adapter
}

fn saved() -> (tempfile::TempDir, std::path::PathBuf, Decoder, Adapter) {
    let device = Device::flex();
    let decoder = tiny_decoder(1, &device);
    let adapter = adapter(decoder.config(), &device);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("adapter");
    adapter.save(&dir, "base", false).unwrap();
    (folder, dir, decoder, adapter)
}

fn logits(decoder: &Decoder, adapter: &Adapter) -> Vec<f32> {
    to_vec(decoder.forward(&[1, 2, 3], Some(adapter), None).unwrap()).unwrap()
}

#[test]
fn a_saved_adapter_gives_the_same_bits() {
    let (_folder, dir, decoder, adapter) = saved();
    assert!(Adapter::is_adapter_dir(&dir));
    let loaded = Adapter::load(&dir, decoder.config(), decoder.device()).unwrap();
    assert_eq!(loaded.config(), adapter.config());
    assert_eq!(loaded.exits(), [1, decoder.n_blocks()]);
    assert_eq!(loaded.parameters(), adapter.parameters());
    assert_eq!(logits(&decoder, &loaded), logits(&decoder, &adapter));
    assert_eq!(to_vec(loaded.exit_norm(1).unwrap().clone()).unwrap()[0], 1.5);
}

#[test]
fn names_and_orientation_are_those_of_peft() {
    let (_folder, dir, decoder, _) = saved();
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), decoder.n_blocks() * 4);
    let [out, input] = decoder.config().projection_shape(Projection::Down);
    let name = "base_model.model.model.layers.0.mlp.down_proj";
    assert_eq!(tensors.tensor(&format!("{name}.lora_A.weight")).unwrap().shape(), [2, input]);
    assert_eq!(tensors.tensor(&format!("{name}.lora_B.weight")).unwrap().shape(), [out, 2]);
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(config["r"], 2);
    assert_eq!(config["lora_alpha"], 4.0);
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "down_proj"]));
}

#[test]
fn a_name_that_is_taken_is_kept() {
    let (folder, dir, decoder, adapter) = saved();
    assert!(adapter.save(&dir, "base", false).is_err());
    adapter.save(&dir, "base", true).unwrap();
    Adapter::load(&dir, decoder.config(), decoder.device()).unwrap();
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious.txt"), "keep").unwrap();
    assert!(adapter.save(&other, "base", true).is_err());
    assert_eq!(fs::read_to_string(other.join("precious.txt")).unwrap(), "keep");
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "nothing half-written is left: {left:?}");
}

fn edit_config(dir: &Path, field: &str, value: serde_json::Value) {
    let path = dir.join("adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(&path, config.to_string()).unwrap();
}

/// What is done to a good adapter, and a part of the message that must follow.
type Damage = (&'static str, fn(&Path), &'static str);

const DAMAGES: &[Damage] = &[
    ("no config", |d| fs::remove_file(d.join("adapter_config.json")).unwrap(), "adapter_config.json"),
    ("empty config", |d| fs::write(d.join("adapter_config.json"), "").unwrap(), "PEFT adapter configuration"),
    ("config is no object", |d| fs::write(d.join("adapter_config.json"), "[1]").unwrap(), "PEFT adapter configuration"),
    ("config is no text", |d| fs::write(d.join("adapter_config.json"), [0xff, 0xfe]).unwrap(), "adapter_config.json"),
    ("another method", |d| edit_config(d, "peft_type", "IA3".into()), "expected LORA, found IA3"),
    ("DoRA", |d| edit_config(d, "use_dora", true.into()), "plain LoRA"),
    ("rank zero", |d| edit_config(d, "r", 0.into()), "LoRA rank: expected from 1 to 1024, found 0"),
    ("rank too large", |d| edit_config(d, "r", 1_000_000.into()), "LoRA rank"),
    ("negative rank", |d| edit_config(d, "r", (-4).into()), "PEFT adapter configuration"),
    ("rank of another adapter", |d| edit_config(d, "r", 4.into()), "adapter shapes (A, B) for model.layers.0"),
    ("unknown target", |d| edit_config(d, "target_modules", serde_json::json!(["q_proj", "x"])), "target_modules"),
    ("no target", |d| edit_config(d, "target_modules", serde_json::json!([])), "at least one projection"),
    ("a target less", |d| edit_config(d, "target_modules", serde_json::json!(["q_proj"])), "other tensors"),
    ("no weights", |d| fs::remove_file(d.join("adapter_model.safetensors")).unwrap(), "adapter_model.safetensors"),
    ("empty weights", |d| fs::write(d.join("adapter_model.safetensors"), "").unwrap(), "safetensors file"),
    ("weights cut short", |d| cut(&d.join("adapter_model.safetensors"), 100), "safetensors file"),
    (
        "weights' header length is huge",
        |d| {
            let path = d.join("adapter_model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            fs::write(path, bytes).unwrap();
        },
        "safetensors file",
    ),
    (
        "weights hold NaN",
        |d| {
            let path = d.join("adapter_model.safetensors");
            let mut bytes = fs::read(&path).unwrap();
            let end = bytes.len();
            bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            fs::write(path, bytes).unwrap();
        },
        "expected finite values",
    ),
    ("exits cut short", |d| cut(&d.join("edgellm_exits.safetensors"), 10), "edgellm_exits.safetensors"),
    (
        "exits with another's names",
        |d| {
            fs::copy(d.join("adapter_model.safetensors"), d.join("edgellm_exits.safetensors")).map(drop).unwrap();
        },
        "exits.N.norm.weight",
    ),
];

fn cut(path: &Path, by: usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - by]).unwrap();
}

#[test]
fn bad_adapters_get_one_clear_sentence() {
    for (name, damage, expected) in DAMAGES {
        let (_folder, dir, decoder, _) = saved();
        damage(&dir);
        let error = Adapter::load(&dir, decoder.config(), decoder.device()).expect_err(name).to_string();
        assert!(error.contains(expected), "{name}: '{error}' does not say '{expected}'");
        assert!(!error.contains('\n') && error.len() < 500, "{name}: {error}");
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (_folder, dir, decoder, _) = saved();
    let mut other = decoder.config().clone();
    other.hidden_size *= 2;
    assert!(Adapter::load(&dir, &other, decoder.device()).is_err());
    let mut deeper = decoder.config().clone();
    deeper.n_layers -= 1;
    assert!(Adapter::load(&dir, &deeper, decoder.device()).is_err());
}
