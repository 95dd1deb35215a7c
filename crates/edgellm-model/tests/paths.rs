//! Inference on the CPU runs blocks on plain slices; it must be the tensor path, which training and other devices take.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use edgellm_kernels::{BlockGradients, BlockScratch, CacheType, Lora, LoraGradient};
use edgellm_model::adapter::{Adapter, LoraConfig, Targets};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Block, Decoder, Dropout, ResidentStore, SlicePass};
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

/// An adapter whose `B` is not zero, so that it does something and has gradients everywhere.
fn adapter_of(config: &ModelConfig) -> Adapter {
    let device = Device::flex();
    let lora = LoraConfig { rank: 4, alpha: 8.0, use_rslora: false, targets: Targets::all_linear() };
    let mut adapter = Adapter::new(config, lora, 7, &device).unwrap();
    for index in 0..config.n_layers {
        let block = adapter.block_mut(index).unwrap();
        for projection in Projection::ALL {
            let Some(lora) = block.get_mut(projection) else { continue };
            let [rows, rank] = lora.b.dims();
            let values: Vec<f32> = (0..rows * rank).map(|i| (i as f32 * 0.7).sin() * 0.05).collect();
            lora.b = Tensor::<1>::from_floats(values.as_slice(), &device).reshape([rows, rank]);
        }
    }
    adapter
}

#[test]
fn adapters_on_both_paths() {
    let config = tiny_config(json!({}));
    let device = Device::flex();
    let decoder = decoder_of(&config, 5, &device);
    let adapter = adapter_of(&config);
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

/// The gradients of two sequences' summed losses at an exit, by autodiff: A, B of every layer of the window, the norm's.
fn gradients_by_tensors(
    decoder: &Decoder,
    adapter: &Adapter,
    window: Range<usize>,
    exit: usize,
) -> (f64, Vec<Vec<f32>>) {
    let mut tracked = adapter.clone();
    let mut leaves = Vec::new();
    for index in window.clone() {
        for projection in Projection::ALL {
            let lora = tracked.block_mut(index).unwrap().get_mut(projection).as_mut().unwrap();
            lora.a = lora.a.clone().autodiff().require_grad();
            lora.b = lora.b.clone().autodiff().require_grad();
            leaves.extend([lora.a.clone(), lora.b.clone()]);
        }
    }
    let norm = decoder.final_norm().clone().autodiff().require_grad();
    tracked.set_exit_norm(exit, norm.clone());
    let mut loss: Option<Tensor<1>> = None;
    for ids in SEQUENCES {
        let x = decoder.embed(&[ids]).unwrap();
        let x = decoder.run_blocks(x, 0..window.start, Some(adapter), None).unwrap();
        let x = decoder.run_blocks(x, window.clone(), Some(&tracked), None).unwrap();
        let x = x.reshape([ids.len(), decoder.config().hidden_size]);
        let targets: Vec<i32> = ids.iter().map(|id| *id as i32 / 2).collect();
        let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &Device::flex());
        let weights = Tensor::full([ids.len()], 0.25, &Device::flex());
        let part = decoder.loss(decoder.exit_norm(x, exit, Some(&tracked)), targets, weights);
        loss = Some(loss.map_or(part.clone(), |sum| sum.add(part)));
    }
    let loss = loss.unwrap();
    let mut all = loss.clone().backward();
    let mut out: Vec<Vec<f32>> =
        leaves.iter().map(|leaf| to_vec(leaf.grad_remove(&mut all).unwrap()).unwrap()).collect();
    out.push(to_vec(norm.grad_remove(&mut all).unwrap()).unwrap());
    (f64::from(to_vec(loss.inner()).unwrap()[0]), out)
}

/// The same on slices; every other block keeps its activations.
fn gradients_by_slices(
    decoder: &Decoder,
    adapter: &Adapter,
    window: Range<usize>,
    exit: usize,
) -> (f64, Vec<Vec<f32>>) {
    assert!(decoder.runs_on_slices(0..decoder.n_blocks()).unwrap());
    let x = decoder.embed_slices(&SEQUENCES).unwrap();
    let lengths = SEQUENCES.map(<[u32]>::len);
    let (mut scratch, mut tapes) = (BlockScratch::default(), Vec::new());
    let mut gradients: Vec<BlockGradients> = window.clone().map(|_| zeros(adapter)).collect();
    let mut out = (0.0, Vec::new());
    // Twice with the same buffers: the second pass must not see the first.
    for _ in 0..2 {
        let mut x = x.clone();
        let mut pass = SlicePass::new(decoder, adapter, &lengths, &mut scratch);
        pass.forward(&mut x, 0..window.start).unwrap();
        pass.record(&mut x, window.clone(), |index| index % 2 == 0, &mut tapes).unwrap();
        let targets: Vec<u32> = SEQUENCES.iter().flat_map(|ids| ids.iter().map(|id| id / 2)).collect();
        let mut head = decoder.loss_on_slices(&x, exit, adapter, &targets, 0.25);
        gradients.iter_mut().for_each(|g| *g = zeros(adapter));
        pass.backward(&mut head.d_hidden, window.clone(), &mut tapes, &mut gradients).unwrap();
        let of_layers = gradients.iter().flat_map(|g| g.linears.iter().flatten());
        out = (head.loss, of_layers.flat_map(|g| [g.a.clone(), g.b.clone()]).collect());
        out.1.push(head.d_norm);
    }
    out
}

fn zeros(adapter: &Adapter) -> BlockGradients {
    let block = adapter.block(0).unwrap();
    let zeros = |lora: &Lora| LoraGradient {
        a: vec![0.0; lora.a.shape().num_elements()],
        b: vec![0.0; lora.b.shape().num_elements()],
    };
    BlockGradients { linears: Projection::ALL.map(|p| block.get(p).map(zeros)), ..Default::default() }
}

const SEQUENCES: [&[u32]; 3] = [&IDS, &[7], &[3, 1, 4, 1, 5, 9, 2, 6]];

#[test]
fn gradients_on_both_paths() {
    for config in configs() {
        let decoder = decoder_of(&config, 6, &Device::flex());
        let adapter = adapter_of(&config);
        let n = decoder.n_blocks();
        for (window, exit) in [(0..n, n), (1..n, n), (0..1, 1)] {
            let (expected_loss, expected) = gradients_by_tensors(&decoder, &adapter, window.clone(), exit);
            let (loss, found) = gradients_by_slices(&decoder, &adapter, window.clone(), exit);
            assert!((loss - expected_loss).abs() <= 1e-5 * expected_loss, "{loss} is not {expected_loss}");
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.len(), expected.len());
                let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                assert!(scale > 0.0, "gradient {i} of {window:?} is zero");
                let error = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / scale;
                let what = &config.architecture.model_type;
                assert!(error <= 2e-5, "{what}, gradient {i} of {window:?}: {error:e} of {scale:e}");
            }
        }
    }
}

/// The gradients of a low-rank update `s B A` follow from that of the weight: `dB = s dW A^T`, `dA = s B^T dW`.
#[test]
fn gradients_of_weights_and_of_updates_agree() {
    let config = tiny_config(json!({}));
    let decoder = decoder_of(&config, 6, &Device::flex());
    let adapter = adapter_of(&config);
    let n = decoder.n_blocks();
    let lengths = SEQUENCES.map(<[u32]>::len);
    let targets: Vec<u32> = SEQUENCES.iter().flat_map(|ids| ids.iter().map(|id| id / 2)).collect();
    let mut x = decoder.embed_slices(&SEQUENCES).unwrap();
    let (mut scratch, mut tapes) = (BlockScratch::default(), Vec::new());
    let mut pass = SlicePass::new(&decoder, &adapter, &lengths, &mut scratch);
    pass.record(&mut x, 0..n, |_| true, &mut tapes).unwrap();
    let mut dy = decoder.loss_on_slices(&x, n, &adapter, &targets, 1.0).d_hidden;
    for index in (0..n).rev() {
        let mut gradients = zeros(&adapter);
        for (weight, projection) in gradients.weights.iter_mut().zip(Projection::ALL) {
            *weight = Some(vec![0.0; config.projection_shape(projection).iter().product()]);
        }
        pass.backward_block(&mut dy, index, &mut tapes[index], index > 0, &mut gradients).unwrap();
        for projection in Projection::ALL {
            let lora = adapter.block(index).unwrap().get(projection).unwrap();
            let device = Device::flex();
            let dw = gradients.weights[projection as usize].clone().unwrap();
            let dw = Tensor::<2>::from_data(TensorData::new(dw, config.projection_shape(projection)), &device);
            let of_a = lora.b.clone().transpose().matmul(dw.clone()).mul_scalar(lora.scaling);
            let of_b = dw.matmul(lora.a.clone().transpose()).mul_scalar(lora.scaling);
            let found = gradients.linears[projection as usize].as_ref().unwrap();
            for (found, expected) in [(&found.a, of_a), (&found.b, of_b)] {
                let expected = to_vec(expected).unwrap();
                let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let error = found.iter().zip(&expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(scale > 0.0 && error <= 1e-4 * scale, "block {index}, {projection:?}: {error:e} of {scale:e}");
            }
        }
    }
}

/// In the direction of a norm's gradient, the loss rises by its squared length.
#[test]
fn gradients_of_norms() {
    let config = tiny_config(json!({}));
    let decoder = decoder_of(&config, 6, &Device::flex());
    let n = decoder.n_blocks();
    let lengths = SEQUENCES.map(<[u32]>::len);
    let targets: Vec<u32> = SEQUENCES.iter().flat_map(|ids| ids.iter().map(|id| id / 2)).collect();
    let adapter = adapter_of(&config);
    let blocks: Vec<Block> = (0..n).map(|index| decoder.store().block(index).unwrap()).collect();
    // The loss, and the gradients of both norms of every block; the first block's is asked for without that of its input.
    let run = |decoder: &Decoder| {
        let mut x = decoder.embed_slices(&SEQUENCES).unwrap();
        let (mut scratch, mut tapes) = (BlockScratch::default(), Vec::new());
        let mut pass = SlicePass::new(decoder, None, &lengths, &mut scratch);
        pass.record(&mut x, 0..n, |index| index == 0, &mut tapes).unwrap();
        let head = decoder.loss_on_slices(&x, n, &adapter, &targets, 1.0);
        let (mut dy, mut norms) = (head.d_hidden, vec![[const { Vec::new() }; 2]; n]);
        for index in (0..n).rev() {
            let zeros = [(); 2].map(|()| vec![0.0; config.hidden_size]);
            let mut gradients = BlockGradients { norms: Some(zeros), ..Default::default() };
            pass.backward_block(&mut dy, index, &mut tapes[index], index > 0, &mut gradients).unwrap();
            norms[index] = gradients.norms.unwrap();
        }
        (head.loss, norms)
    };
    let (_, norms) = run(&decoder);
    for (index, which) in [(0, 0), (0, 1), (n - 1, 0), (n - 1, 1)] {
        let gradient = &norms[index][which];
        let length = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let moved = |sign: f64| {
            let mut blocks = blocks.clone();
            let norm = if which == 0 { &mut blocks[index].attn_norm } else { &mut blocks[index].mlp_norm };
            let step = (sign * 1e-2 / length) as f32;
            let change = Tensor::<1>::from_floats(gradient.as_slice(), &Device::flex()).mul_scalar(step);
            *norm = norm.clone().add(change);
            run(&decoder.clone().with_store(Arc::new(ResidentStore::new(blocks)))).0
        };
        let slope = (moved(1.0) - moved(-1.0)) / 2e-2;
        assert!((slope - length).abs() <= 2e-2 * length, "block {index}, norm {which}: {slope} is not {length}");
    }
}

/// With dropout, gradients are those of the loss with the same inputs dropped.
#[test]
fn gradients_with_dropout() {
    let config = tiny_config(json!({}));
    let decoder = decoder_of(&config, 8, &Device::flex());
    let adapter = adapter_of(&config);
    let n = decoder.n_blocks();
    let lengths = SEQUENCES.map(<[u32]>::len);
    let targets: Vec<u32> = SEQUENCES.iter().flat_map(|ids| ids.iter().map(|id| id / 2)).collect();
    let run = |adapter: &Adapter, share: f32, seed: u64| {
        let mut x = decoder.embed_slices(&SEQUENCES).unwrap();
        let (mut scratch, mut tapes) = (BlockScratch::default(), Vec::new());
        let dropout = (share > 0.0).then_some(Dropout { share, seed });
        let mut pass = SlicePass::new(&decoder, adapter, &lengths, &mut scratch).with_dropout(dropout);
        pass.record(&mut x, 0..n, |index| index == 0, &mut tapes).unwrap();
        let mut head = decoder.loss_on_slices(&x, n, adapter, &targets, 1.0);
        let mut gradients: Vec<BlockGradients> = (0..n).map(|_| zeros(adapter)).collect();
        pass.backward(&mut head.d_hidden, 0..n, &mut tapes, &mut gradients).unwrap();
        (head.loss, gradients)
    };
    let (loss, gradients) = run(&adapter, 0.4, 3);
    assert_ne!(loss, run(&adapter, 0.0, 3).0);
    assert_ne!(loss, run(&adapter, 0.4, 4).0);
    for (block, projection) in
        [(0, Projection::Q), (0, Projection::Gate), (n - 1, Projection::Down), (1, Projection::O)]
    {
        let gradient = gradients[block].linears[projection as usize].as_ref().unwrap();
        // In the direction of the gradient of A, the loss rises by its squared norm.
        let norm = gradient.a.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let moved = |sign: f64| {
            let mut adapter = adapter.clone();
            let lora = adapter.block_mut(block).unwrap().get_mut(projection).as_mut().unwrap();
            let step = (sign * 2e-2 / norm) as f32;
            let change = Tensor::<1>::from_floats(gradient.a.as_slice(), &Device::flex()).mul_scalar(step);
            lora.a = lora.a.clone().add(change.reshape(lora.a.dims()));
            run(&adapter, 0.4, 3).0
        };
        let slope = (moved(1.0) - moved(-1.0)) / 4e-2;
        assert!((slope - norm).abs() <= 2e-2 * norm, "block {block} {}: {slope} is not {norm}", projection.name());
    }
}
