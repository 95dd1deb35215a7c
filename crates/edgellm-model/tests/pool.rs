//! A pool's one head product gives what the pool of the exits' logits gives.

use burn::tensor::{Device, Int, Tensor, TensorData};
use edgellm_model::decoder::{Decoder, Linear, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::sample::log_softmax;
use edgellm_model::testing::tiny_decoder;

const VOCAB: usize = 288;

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 16) as f32 / 32768.0 - 1.0).collect()
}

fn states(device: &Device) -> Vec<Tensor<2>> {
    (0..3).map(|seed| Tensor::from_data(TensorData::new(values(5 * 64, seed * 1000), [5, 64]), device)).collect()
}

/// Log-probabilities of the pool from every exit's own logits.
fn directly(decoder: &Decoder, states: &[Tensor<2>], weights: &[f32]) -> Vec<f32> {
    let mut rows = vec![0.0; 5 * VOCAB];
    for (state, weight) in states.iter().zip(weights) {
        let logits = to_vec(decoder.logits(state.clone())).unwrap();
        rows.iter_mut().zip(logits).for_each(|(sum, logit)| *sum += weight * logit);
    }
    rows.chunks_mut(VOCAB).for_each(log_softmax);
    rows
}

#[track_caller]
fn check(decoder: &Decoder, weights: [f32; 3]) {
    let states = states(decoder.device());
    let expected = directly(decoder, &states, &weights);
    let mut found = to_vec(decoder.pooled_logits(&states, &weights)).unwrap();
    found.chunks_mut(VOCAB).for_each(log_softmax);
    let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-5, "{weights:?}: off by {worst}");
    let targets = [0, 1, 33, 200, 287];
    let loss: f32 = targets.iter().enumerate().map(|(row, &t)| -expected[row * VOCAB + t as usize]).sum();
    let targets = Tensor::<1, Int>::from_data(targets.as_slice(), decoder.device());
    let pooled = to_vec(decoder.pooled_loss(&states, &weights, targets)).unwrap()[0];
    assert!((pooled - loss).abs() < 1e-4 * loss.abs(), "{weights:?}: loss {pooled} is not {loss}");
}

#[test]
fn one_head_product_is_the_pool() {
    let decoder = tiny_decoder(3, &Device::flex());
    for weights in [[0.0, 0.0, 1.0], [1.0 / 3.0; 3], [-0.4, 0.3, 1.7]] {
        check(&decoder, weights);
    }
}

#[test]
fn a_bias_of_the_head_counts_as_often_as_the_weights_say() {
    let decoder = tiny_decoder(3, &Device::flex());
    let head = Linear {
        weight: Weight::Dense(decoder.embedding().dequantize()),
        bias: Some(Tensor::from_data(TensorData::new(values(VOCAB, 77), [VOCAB]), decoder.device())),
    };
    let decoder = decoder.with_head(head);
    for weights in [[0.0, 0.0, 1.0], [1.0 / 3.0; 3], [-0.4, 0.3, 1.7]] {
        check(&decoder, weights);
    }
}
