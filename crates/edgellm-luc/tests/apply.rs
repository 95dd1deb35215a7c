//! Compressed directories: what is written is, loaded again, the model that was compressed in memory.

use std::path::Path;

use burn::tensor::Device;
use edgellm_kernels::Arrangement;
use edgellm_luc::{Applied, Compression, LucError, Rtn, compress_decoder, compress_model, uniform_policy};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Activations, Decoder, LoadOptions};
use edgellm_model::files::{ModelFiles, packed_names};
use edgellm_model::generate::to_vec;
use edgellm_model::testing::{decoder_of, tiny_config, tiny_model_dir, write_model_dir};
use edgellm_model::values::{CompressionPolicy, Granularity, LayerFormat, Pattern, Projection, Unit, UnitPolicy};
use serde_json::json;

fn load(files: &ModelFiles) -> Decoder {
    Decoder::load(files, &LoadOptions { device: Device::flex(), expand: false, activations: Activations::F32 }).unwrap()
}

fn logits(decoder: &Decoder) -> Vec<f32> {
    to_vec(decoder.forward(&[5, 200, 17, 99, 257, 0, 42], None, None).unwrap()).unwrap()
}

fn how(policy: &CompressionPolicy, arrangement: Arrangement, force: bool) -> Compression<'_> {
    Compression { policy, compressor: &Rtn, calibration: &[], arrangement, force }
}

fn rtn(
    files: &ModelFiles,
    policy: &CompressionPolicy,
    arrangement: Arrangement,
    out: &Path,
    force: bool,
) -> Result<Applied, LucError> {
    compress_model(files, &how(policy, arrangement, force), out, &mut |_| {})
}

/// Compresses the model of `config` both ways and compares; returns bits per weight.
fn check(config: &ModelConfig, policy: &CompressionPolicy) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    write_model_dir(&source, config, 7).unwrap();
    let files = ModelFiles::open(&source).unwrap();
    let in_memory = compress_decoder(&load(&files), policy, &Rtn, &[]).unwrap();
    let applied = rtn(&files, policy, Arrangement::Rows, &target, false).unwrap();
    let reopened = ModelFiles::open(&target).unwrap();
    let reloaded = load(&reopened);
    let (a, b) = (logits(&in_memory), logits(&reloaded));
    assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "logits differ");
    assert!(a.iter().all(|v| v.is_finite()));
    assert_eq!(reopened.quantization().unwrap().policy.as_ref(), Some(policy));
    assert_eq!(applied.bytes_before, files.file_bytes());
    assert_eq!(applied.bytes_after, reopened.file_bytes());
    // The tokenizer and the template came along.
    let text = "Grüße, 世界!";
    let tokens = |f: &ModelFiles| f.tokenizer().unwrap().encode(text, true).unwrap();
    assert_eq!(tokens(&files), tokens(&reopened));
    assert_eq!(files.chat_template().unwrap().unwrap().source(), reopened.chat_template().unwrap().unwrap().source());
    applied.bits_per_weight
}

#[test]
fn every_format_reloads_bit_for_bit() {
    let config = tiny_config(json!({}));
    for bits in [2, 3, 4, 5, 6, 8] {
        for (group, symmetric) in [(32, false), (64, true), (128, false)] {
            let format = LayerFormat::quantized(bits, group, symmetric);
            let found = check(&config, &uniform_policy(config.n_layers, format).unwrap());
            assert!(found > f64::from(bits) && found < f64::from(bits) + 1.5, "{format}: {found} bits per weight");
        }
    }
    for bits in [16u8, 32] {
        let found = check(&config, &uniform_policy(config.n_layers, LayerFormat::float(bits)).unwrap());
        assert_eq!(found, f64::from(bits));
    }
}

#[test]
fn sparse_formats_store_the_kept_weights_and_reload_bit_for_bit() {
    let config = tiny_config(json!({}));
    for bits in [2, 3, 4, 5, 6, 8] {
        for symmetric in [true, false] {
            let dense = LayerFormat::quantized(bits, 64, symmetric);
            for pattern in [Pattern::TwoFour, Pattern::FourEight] {
                let found = check(&config, &uniform_policy(config.n_layers, dense.with_n_of_m(pattern)).unwrap());
                // Half of the codes, a bit of mask, and the scales; rows that are no multiple of 64 are padded.
                let exact = f64::from(bits) / 2.0 + 1.0 + if symmetric { 0.25 } else { 0.5 };
                assert!(found >= exact && found < exact + 0.5, "{bits} bits, {pattern}: {found} bits per weight");
            }
            if bits > 2 {
                let format = LayerFormat { symmetric, ..dense.with_sparsity(0.6) };
                let found = check(&config, &uniform_policy(config.n_layers, format).unwrap());
                assert!(found < f64::from(bits), "{format}: {found} bits per weight");
            }
        }
    }
}

/// What is on disk says how it is stored, and a damaged mask is an error when the tensor is read.
#[test]
fn sparse_tensors_are_named_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    tiny_model_dir(&source, 1).unwrap();
    let format = LayerFormat::quantized(4, 32, true);
    let mut policy = uniform_policy(4, format.with_n_of_m(Pattern::TwoFour)).unwrap();
    policy.units[1].format = format.with_sparsity(0.6);
    policy.units[2].format = format.with_sparsity(0.1);
    let files = ModelFiles::open(&source).unwrap();
    rtn(&files, &policy, Arrangement::Rows, &target, false).unwrap();
    let reopened = ModelFiles::open(&target).unwrap();
    let name = |block| Projection::Q.weight_name(block);
    let stored = |block| reopened.layout(&name(block)).unwrap().format.name();
    assert_eq!([stored(0), stored(1), stored(2)], ["q4g32s-b40", "q4g32s", "q4g32s-2:4"]);
    let zeros = |block| {
        let values = reopened.matrix(&name(block)).unwrap().dequantize();
        values.iter().filter(|v| **v == 0.0).count() as f64 / values.len() as f64
    };
    assert!(zeros(0) > 0.58 && zeros(1) > 0.08 && zeros(2) >= 0.5);
    drop(reopened);

    let (codes, _) = packed_names(&name(2));
    let weights = target.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let offset = header[&codes]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header_len + offset] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let damaged = ModelFiles::open(&target).unwrap();
    let error = damaged.matrix(&name(2)).unwrap_err().to_string();
    assert!(error.contains(&name(2)) && error.contains("expected 2 kept columns from 0 to 4"), "{error}");
    assert!(damaged.matrix(&name(3)).is_ok());
}

#[test]
fn f32_changes_nothing() {
    let config = tiny_config(json!({}));
    let decoder = decoder_of(&config, 7, &Device::flex());
    let policy = uniform_policy(config.n_layers, LayerFormat::float(32)).unwrap();
    assert_eq!(logits(&decoder), logits(&compress_decoder(&decoder, &policy, &Rtn, &[]).unwrap()));
}

#[test]
fn pruned_and_mixed_units_with_ragged_rows_and_an_own_head() {
    // Rows of 36, 18 and 85 columns: padding in every format, odd rows of f16.
    let config = tiny_config(json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 36, "intermediate_size": 85, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 6, "num_hidden_layers": 2, "tie_word_embeddings": false,
        "attention_bias": true,
    }));
    let formats = [
        LayerFormat::quantized(3, 32, true).with_sparsity(0.5),
        LayerFormat::float(16),
        LayerFormat::quantized(5, 32, false),
        LayerFormat::float(16).with_sparsity(0.25),
        LayerFormat::quantized(8, 128, false).with_n_of_m(Pattern::FourEight),
        LayerFormat::float(32),
        LayerFormat::float(16).with_n_of_m(Pattern::TwoFour),
    ];
    let mut policy = uniform_policy(0, LayerFormat::quantized(6, 64, false)).unwrap();
    policy.granularity = Granularity::Linear;
    for block in 0..2 {
        for (projection, format) in Projection::ALL.into_iter().zip(formats) {
            policy.units.push(UnitPolicy { unit: Unit::Linear(block, projection), format });
        }
    }
    check(&config, &policy);
    policy.units.push(UnitPolicy { unit: Unit::Head, format: LayerFormat::float(16) });
    check(&config, &policy);
}

#[test]
fn qwen2_biases_survive() {
    let config = tiny_config(json!({"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}));
    check(&config, &uniform_policy(2, LayerFormat::quantized(4, 32, false)).unwrap());
}

#[test]
fn a_compressed_model_can_be_compressed_again() {
    let folder = tempfile::tempdir().unwrap();
    let (source, eight, four) = (folder.path().join("s"), folder.path().join("8"), folder.path().join("4"));
    tiny_model_dir(&source, 1).unwrap();
    let policy = |bits| uniform_policy(4, LayerFormat::quantized(bits, 32, false)).unwrap();
    let files = ModelFiles::open(&source).unwrap();
    rtn(&files, &policy(8), Arrangement::Rows, &eight, false).unwrap();
    let files = ModelFiles::open(&eight).unwrap();
    rtn(&files, &policy(4), Arrangement::Rows, &four, false).unwrap();
    let expected = compress_decoder(&load(&files), &policy(4), &Rtn, &[]).unwrap();
    assert_eq!(logits(&expected), logits(&load(&ModelFiles::open(&four).unwrap())));
}

fn refused(policy: &CompressionPolicy, source: &Path, target: &Path, force: bool) -> String {
    let files = ModelFiles::open(source).unwrap();
    rtn(&files, policy, Arrangement::Rows, target, force).unwrap_err().to_string()
}

#[test]
fn what_is_there_stays_unless_it_is_a_compressed_model_and_forced() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    tiny_model_dir(&source, 1).unwrap();
    let policy = uniform_policy(4, LayerFormat::quantized(4, 32, false)).unwrap();
    let files = ModelFiles::open(&source).unwrap();
    // Not ours: neither a folder with something in it, nor the source itself.
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("thesis.txt"), "years of work").unwrap();
    assert!(refused(&policy, &source, &target, false).contains("exists"));
    assert!(refused(&policy, &source, &target, true).contains("compressed model"));
    assert!(refused(&policy, &source, &source, true).contains("compressed model"));
    assert_eq!(std::fs::read_to_string(target.join("thesis.txt")).unwrap(), "years of work");
    // An empty folder, then a compressed model.
    std::fs::remove_file(target.join("thesis.txt")).unwrap();
    for bits in [4, 2] {
        let policy = uniform_policy(4, LayerFormat::quantized(bits, 32, false)).unwrap();
        rtn(&files, &policy, Arrangement::Rows, &target, true).unwrap();
        assert_eq!(ModelFiles::open(&target).unwrap().quantization().unwrap().policy.as_ref(), Some(&policy));
    }
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["source", "target"], "nothing may be left beside");
}

#[test]
fn policies_that_do_not_fit_are_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    tiny_model_dir(&source, 1).unwrap();
    let format = LayerFormat::quantized(4, 32, false);
    let small = uniform_policy(3, format).unwrap();
    assert!(refused(&small, &source, &target, false).contains("block.3"));
    let large = uniform_policy(5, format).unwrap();
    assert!(refused(&large, &source, &target, false).contains("block.4"));
    let mut twice = uniform_policy(4, format).unwrap();
    twice.units.push(twice.units[1].clone());
    assert!(refused(&twice, &source, &target, false).contains("twice"));
    let mut overflowing = uniform_policy(4, LayerFormat::float(16)).unwrap();
    overflowing.units[2].format = LayerFormat { bit_width: 9, ..format };
    assert!(refused(&overflowing, &source, &target, false).contains('9'));
    let decoder = load(&ModelFiles::open(&source).unwrap());
    assert!(compress_decoder(&decoder, &small, &Rtn, &[]).is_err());
    assert!(compress_decoder(&decoder, &large, &Rtn, &[]).is_err());
    assert!(!target.exists());
}

#[test]
fn progress_reaches_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    tiny_model_dir(&source, 1).unwrap();
    let policy = uniform_policy(4, LayerFormat::quantized(4, 32, false)).unwrap();
    let mut seen = Vec::new();
    let files = ModelFiles::open(&source).unwrap();
    let how = how(&policy, Arrangement::Rows, false);
    compress_model(&files, &how, &folder.path().join("t"), &mut |p| seen.push((p.done, p.total))).unwrap();
    assert_eq!(seen.first().unwrap().0, 0);
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert_eq!(seen.last().unwrap().0, seen.last().unwrap().1);
}

#[test]
fn a_prepared_directory_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    tiny_model_dir(&source, 1).unwrap();
    let files = ModelFiles::open(&source).unwrap();
    for format in [LayerFormat::quantized(3, 32, false), LayerFormat::quantized(8, 64, true)] {
        let policy = uniform_policy(files.config().n_layers, format).unwrap();
        let open = |name: &str, arrangement| {
            let target = folder.path().join(format!("{name}{}", format.bit_width));
            rtn(&files, &policy, arrangement, &target, false).unwrap();
            ModelFiles::open(&target).unwrap()
        };
        let (rows, panels) = (open("rows", Arrangement::Rows), open("panels", Arrangement::Panels));
        for name in rows.names() {
            if rows.shape(name).unwrap().len() == 2 {
                let (rows, panels) = (rows.matrix(name).unwrap(), panels.matrix(name).unwrap());
                assert_eq!(panels.layout.arrangement, Arrangement::Panels, "{name}");
                assert_eq!(rows.prepare().unwrap(), panels, "{name}");
            }
        }
    }
}
