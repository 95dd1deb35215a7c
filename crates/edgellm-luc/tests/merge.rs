//! Merging an adapter: exact into floats, with the update kept in packed formats, and what is refused.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use edgellm_kernels::{Arrangement, Format};
use edgellm_luc::{
    Aim, Compression, InputMoments, MergeOptions, Merged, Rtn, compress_model, merge_adapter, uniform_policy,
};
use edgellm_model::adapter::{Adapter, LoraConfig, Targets};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Activations, Decoder, LoadOptions};
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::{tiny_config, tiny_model_dir};
use edgellm_model::values::{LayerFormat, Projection};
use serde_json::json;

const IDS: [u32; 7] = [5, 200, 17, 99, 257, 0, 42];

/// An adapter whose `B` is not zero: `size` is about its largest value.
fn adapter(model: &ModelConfig, targets: &str, use_rslora: bool, size: f32) -> Adapter {
    let targets: Targets = targets.parse().unwrap();
    let lora = LoraConfig { rank: 4, alpha: 8.0, use_rslora, targets };
    let mut adapter = Adapter::new(model, lora, 11, &Device::flex()).unwrap();
    for index in 0..model.n_layers {
        for projection in Projection::ALL {
            let Some(lora) = adapter.block_mut(index).unwrap().get_mut(projection) else { continue };
            let dims = lora.b.dims();
            let values: Vec<f32> =
                (0..dims[0] * dims[1]).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0 * size).collect();
            lora.b = Tensor::from_data(TensorData::new(values, dims), &Device::flex());
        }
    }
    adapter.set_exit_norm(2, Tensor::ones([model.hidden_size], &Device::flex()).mul_scalar(1.5));
    adapter
}

fn load(files: &ModelFiles) -> Decoder {
    Decoder::load(files, &LoadOptions { device: Device::flex(), expand: false, activations: Activations::F32 }).unwrap()
}

fn logits(decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
    to_vec(decoder.forward(&IDS, adapter, None).unwrap()).unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt()
}

fn base(folder: &Path, format: Option<&str>, arrangement: Arrangement) -> ModelFiles {
    let source = folder.join("source");
    tiny_model_dir(&source, 7).unwrap();
    let files = ModelFiles::open(&source).unwrap();
    let Some(format) = format else { return files };
    let target = folder.join("packed");
    let policy = uniform_policy(files.config().n_layers, LayerFormat::of(Format::parse(format).unwrap())).unwrap();
    let how = Compression { policy: &policy, compressor: &Rtn, calibration: &[], arrangement, force: false };
    compress_model(&files, &how, &target, &mut |_| {}).unwrap();
    ModelFiles::open(&target).unwrap()
}

fn merge(files: &ModelFiles, adapter: &Adapter, options: MergeOptions<'_>, out: &Path) -> (Merged, ModelFiles) {
    let merged = merge_adapter(files, adapter, &options, out, true, &mut |_| {}).unwrap();
    (merged, ModelFiles::open(out).unwrap())
}

#[test]
fn floats_hold_the_sum_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let files = base(folder.path(), None, Arrangement::Rows);
    for use_rslora in [false, true] {
        let adapter = adapter(files.config(), "q_proj,2-3:down_proj", use_rslora, 0.1);
        let (merged, result) = merge(&files, &adapter, MergeOptions::default(), &folder.path().join("out"));
        assert_eq!(merged.matrices.len(), 6);
        assert!((merged.survived - 1.0).abs() < 1e-6 && merged.residual < 1e-4, "{merged:?}");
        let (unmerged, found) = (logits(&load(&files), Some(&adapter)), logits(&load(&result), None));
        let moved = distance(&unmerged, &logits(&load(&files), None));
        assert!(distance(&unmerged, &found) < 1e-4 * moved, "rsLoRA {use_rslora}");
        // `W + s B A` by the formula, for one matrix.
        let name = Projection::Down.weight_name(2);
        let lora = adapter.block(2).unwrap().get(Projection::Down).unwrap();
        assert_eq!(lora.scaling, if use_rslora { 4.0 } else { 2.0 });
        let update = to_vec(lora.b.clone().matmul(lora.a.clone()).mul_scalar(lora.scaling)).unwrap();
        let (before, after) = (files.matrix(&name).unwrap().dequantize(), result.matrix(&name).unwrap().dequantize());
        for ((before, after), update) in before.iter().zip(&after).zip(&update) {
            assert!((before + update - after).abs() < 1e-6);
        }
        let untouched = Projection::Down.weight_name(0);
        assert_eq!(files.matrix(&untouched).unwrap(), result.matrix(&untouched).unwrap());
    }
}

#[test]
fn a_packed_base_keeps_its_formats_and_most_of_a_small_update() {
    for (format, arrangement) in
        [("q4g32a", Arrangement::Rows), ("q4g32s", Arrangement::Panels), ("q3g64a", Arrangement::Rows)]
    {
        let folder = tempfile::tempdir().unwrap();
        let files = base(folder.path(), Some(format), arrangement);
        // Far below half a step of the grid.
        let adapter = adapter(files.config(), "all-linear", false, 0.01);
        let plain = MergeOptions { aim: Aim::Constant(0.0), ..MergeOptions::default() };
        let (lost, _) = merge(&files, &adapter, plain, &folder.path().join("plain"));
        let strong = MergeOptions { aim: Aim::Constant(100.0), ..plain };
        let (kept, result) = merge(&files, &adapter, strong, &folder.path().join("out"));
        assert!(lost.survived < 0.5, "{format}: {} survives plain rounding", lost.survived);
        assert!((kept.survived - 1.0).abs() < 0.1, "{format}: {} survives", kept.survived);
        assert_eq!(kept.applied.bytes_after, files.file_bytes());
        for name in files.names().filter(|name| name.ends_with("_proj.weight") || name.contains("embed")) {
            assert_eq!(files.layout(name).unwrap(), result.layout(name).unwrap(), "{format} {name}");
        }
        let embedding = "model.embed_tokens.weight";
        assert_eq!(files.matrix(embedding).unwrap(), result.matrix(embedding).unwrap());
        assert_eq!(files.quantization().unwrap().policy, result.quantization().unwrap().policy);
        for matrix in &kept.matrices {
            assert_eq!(matrix.format, format);
            assert!(matrix.update > 0.0 && matrix.residual.is_finite(), "{matrix:?}");
        }
    }
}

#[test]
fn another_format_and_exit_norms_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let files = base(folder.path(), Some("q4g32a"), Arrangement::Rows);
    let adapter = adapter(files.config(), "v_proj", false, 0.2);
    for (format, name) in [(LayerFormat::float(32), "f32"), (LayerFormat::quantized(8, 32, true), "q8g32s")] {
        let options = MergeOptions { format: Some(format), ..MergeOptions::default() };
        let (merged, result) = merge(&files, &adapter, options, &folder.path().join("out"));
        assert!(merged.matrices.iter().all(|m| m.format == name));
        assert!((merged.survived - 1.0).abs() < 0.02, "{name}: {}", merged.survived);
        assert_eq!(result.quantization().is_some(), name != "f32");
        let exits = Adapter::load_exits(result.path(), result.config(), &Device::flex()).unwrap().unwrap();
        assert_eq!(exits.exits(), [2]);
        assert!(!exits.has_updates());
        assert_eq!(to_vec(exits.exit_norm(2).unwrap().clone()).unwrap()[0], 1.5);
        // The norm of an early exit changes nothing at the last.
        let decoder = load(&result);
        assert_eq!(logits(&decoder, Some(&exits)), logits(&decoder, None));
        assert!(exits.save(&folder.path().join("no"), "base", false).is_err(), "there is no update to save");
    }
    assert!(Adapter::load_exits(files.path(), files.config(), &Device::flex()).unwrap().is_none());
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let files = base(folder.path(), None, Arrangement::Rows);
    let out = folder.path().join("out");
    let options = MergeOptions::default();
    let fails = |adapter: &Adapter, options: &MergeOptions<'_>, out: &Path, force| {
        merge_adapter(&files, adapter, options, out, force, &mut |_| {}).unwrap_err().to_string()
    };
    let other = tiny_config(json!({"intermediate_size": 96}));
    let error = fails(&adapter(&other, "q_proj,up_proj", false, 0.1), &options, &out, false);
    assert!(error.contains("model.layers.0.mlp.up_proj.weight") && error.contains("160"), "{error}");
    let shallow = tiny_config(json!({"num_hidden_layers": 2}));
    assert!(fails(&adapter(&shallow, "q_proj", false, 0.1), &options, &out, false).contains("blocks"));
    let good = adapter(files.config(), "q_proj", false, 0.1);
    let bad = MergeOptions { aim: Aim::Constant(f32::NAN), ..options };
    assert!(fails(&good, &bad, &out, false).contains("at least 0"));
    assert!(!out.exists());
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious.txt"), "keep").unwrap();
    assert!(fails(&good, &options, &out, false).contains("something that exists"));
    assert!(fails(&good, &options, &out, true).contains("a model or an empty folder"));
    assert_eq!(std::fs::read_to_string(out.join("precious.txt")).unwrap(), "keep");
}

/// With the activations, the outputs of a projection are closer to those of base and adapter than without.
#[test]
fn activations_say_which_errors_matter() {
    let folder = tempfile::tempdir().unwrap();
    let files = base(folder.path(), Some("q4g32a"), Arrangement::Rows);
    let adapter = adapter(files.config(), "all-linear", false, 0.02);
    let decoder = load(&files);
    let windows: Vec<Vec<u32>> = (0..8).map(|w| (0..48).map(|i| (i * 31 + w * 57 + i * i) % 256).collect()).collect();
    let inputs = InputMoments::measure(&decoder, &adapter, &windows, &mut |_| {}).unwrap();
    // The inputs of a projection of the first block, which no rounding has changed.
    let seen = std::cell::RefCell::new(None);
    let keep = |p: Projection, x: &Tensor<2>| {
        if p == Projection::Up {
            *seen.borrow_mut() = Some(x.clone());
        }
    };
    let block = decoder.store().block(0).unwrap();
    decoder.run_block(&block, 0, decoder.embed(&[&windows[0]]).unwrap(), Some(&keep));
    let x = seen.take().unwrap();
    let lora = adapter.block(0).unwrap().get(Projection::Up);
    let expected = to_vec(block.linear(Projection::Up).forward(x.clone(), lora)).unwrap();
    let error = |aim: Aim<'_>| {
        let options = MergeOptions { format: None, aim };
        let (_, result) = merge(&files, &adapter, options, &folder.path().join("out"));
        let block = load(&result).store().block(0).unwrap();
        distance(&to_vec(block.linear(Projection::Up).forward(x.clone(), None)).unwrap(), &expected)
    };
    let (plain, informed) = (error(Aim::Constant(0.0)), error(Aim::Inputs(&inputs)));
    assert!(informed < plain, "{informed} with activations, {plain} without");
    assert!(InputMoments::measure(&decoder, &adapter, &[vec![1]], &mut |_| {}).is_err());
}
