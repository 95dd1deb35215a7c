//! Inference on the CPU runs blocks on plain slices; it must be the tensor path, which training and other devices take.

use burn::tensor::{Device, Tensor};
use edgellm_kernels::CacheType;
use edgellm_model::adapter::{Adapter, LoraConfig, Targets};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::testing::{decoder_of, tiny_config};
use edgellm_model::values::Projection;
use serde_json::json;

const IDS: [u32; 21] = [5, 200, 17, 99, 257, 0, 42, 1, 2, 3, 77, 78, 79, 80, 9, 8, 7, 6, 150, 151, 152];

/// The hidden state after all blocks by the tensor path, which an observer asks for.
fn by_tensors(decoder: &Decoder, ids: &[&[u32]]) -> Vec<f32> {
    let mut x = decoder.embed(ids).unwrap();
    for index in 0..decoder.n_blocks() {
        let block = decoder.store().block(index).unwrap();
        x = decoder.run_block(&block, index, x, Some(&|_, _: &Tensor<2>| {}));
    }
    to_vec(x).unwrap()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let scale = b.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

fn configs() -> Vec<ModelConfig> {
    [
        json!({}),
        json!({"num_key_value_heads": 4}),
        json!({"num_key_value_heads": 1, "head_dim": 32}),
        json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}),
        json!({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 48}),
        json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5}),
    ]
    .map(tiny_config)
    .into()
}

#[test]
fn slices_and_tensors_agree() {
    for config in configs() {
        let decoder = decoder_of(&config, 3, &Device::flex());
        for ids in [vec![&IDS[..]], vec![&IDS[..9], &IDS[9..18]]] {
            let x = decoder.embed(&ids).unwrap();
            let found = to_vec(decoder.run_blocks(x, 0..decoder.n_blocks(), None, None).unwrap()).unwrap();
            let error = difference(&found, &by_tensors(&decoder, &ids));
            assert!(error <= 1e-5, "{}: {error:e}", config.architecture.model_type);
        }
    }
}

/// Token by token through a cache is all at once; what a cache of fewer bits may cost is bounded.
#[test]
fn caches_of_every_type() {
    for config in configs() {
        let decoder = decoder_of(&config, 4, &Device::flex());
        let expected = by_tensors(&decoder, &[&IDS]);
        for (kind, allowed) in [(CacheType::F32, 1e-5), (CacheType::F16, 2e-3), (CacheType::Int8, 4e-2)] {
            let mut cache = decoder.new_cache_of(kind);
            let mut found = Vec::new();
            // A part of three tokens, then one by one; some positions are forgotten and seen again.
            let run = |cache: &mut _, ids: &[u32]| {
                let x = decoder.embed(&[ids]).unwrap();
                to_vec(decoder.run_blocks(x, 0..decoder.n_blocks(), None, Some(cache)).unwrap()).unwrap()
            };
            found.extend(run(&mut cache, &IDS[..3]));
            for id in &IDS[3..12] {
                found.extend(run(&mut cache, &[*id]));
            }
            run(&mut cache, &[1, 2, 3]);
            cache.truncate(12);
            assert_eq!(cache.len(0), 12);
            found.extend(run(&mut cache, &IDS[12..]));
            assert!(cache.bytes() > 0, "the cache of the slice path");
            let error = difference(&found, &expected);
            assert!(error <= allowed, "{} {kind}: {error:e}", config.architecture.model_type);
        }
    }
}

#[test]
fn adapters_on_both_paths() {
    let config = tiny_config(json!({}));
    let device = Device::flex();
    let decoder = decoder_of(&config, 5, &device);
    let mut adapter = Adapter::new(
        &config,
        LoraConfig { rank: 4, alpha: 8.0, use_rslora: false, targets: Targets::all_linear() },
        7,
        &device,
    )
    .unwrap();
    for index in 0..decoder.n_blocks() {
        let block = adapter.block_mut(index).unwrap();
        for projection in Projection::ALL {
            let Some(lora) = block.get_mut(projection) else { continue };
            let [rows, rank] = lora.b.dims();
            let values: Vec<f32> = (0..rows * rank).map(|i| (i as f32 * 0.7).sin() * 0.05).collect();
            lora.b = Tensor::<1>::from_floats(values.as_slice(), &device).reshape([rows, rank]);
        }
    }
    let run = |adapter: Option<&Adapter>, device: &Device| {
        let x = decoder.embed(&[&IDS]).unwrap();
        let x = if device.is_autodiff() { Tensor::from_inner(x) } else { x };
        let y = decoder.run_blocks(x, 0..decoder.n_blocks(), adapter, None).unwrap();
        to_vec(if device.is_autodiff() { y.inner() } else { y }).unwrap()
    };
    let plain = run(None, &device);
    let by_slices = run(Some(&adapter), &device);
    let by_tensors = run(Some(&adapter), &device.clone().autodiff());
    assert!(difference(&by_slices, &plain) > 1e-3, "the adapter does something");
    assert!(difference(&by_slices, &by_tensors) <= 1e-5);
}
