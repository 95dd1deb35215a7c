//! Results do not depend on the number of threads, to the last bit.

use burn::tensor::{Device, Int, Tensor};
use edgellm_kernels::{
    AttentionParams, Format, PackedHost, PackedLayout, attention, cross_entropy_head, packed_linear, rms_norm, swiglu,
};

use crate::check::{flat, read, values};
use crate::devices::turn;

fn tensor<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    Tensor::<1>::from_floats(values(shape.iter().product(), seed).as_slice(), device).reshape(shape)
}

/// Everything that the operators compute, forward and backward, one after another.
fn everything() -> Vec<Vec<f32>> {
    let device = Device::flex().autodiff();
    let mut results = Vec::new();
    for format in ["q3g64a", "f16"] {
        let layout = PackedLayout::new(700, 300, Format::parse(format).unwrap()).unwrap();
        let w = PackedHost::quantize(&values(700 * 300, 1), layout).unwrap().to_device(&device);
        for tokens in [1, 5, 90] {
            let x = tensor([tokens, 300], 2, &device).require_grad();
            let weight = tensor([300], 3, &device).require_grad();
            let normed = rms_norm(x.clone(), weight.clone(), 1e-6);
            let y = packed_linear(normed.clone(), &w, None);
            let y = swiglu(y.clone(), y * 0.5);
            let targets = Tensor::<1, Int>::full([tokens], 3, &device);
            let loss = cross_entropy_head(normed, &w, targets, tensor([tokens], 4, &device));
            let grads = (y.clone().sum() + loss.clone()).backward();
            results.push(read(flat(y.inner())));
            results.push(read(loss.inner()));
            results.push(read(flat(x.grad(&grads).unwrap())));
            results.push(read(weight.grad(&grads).unwrap()));
        }
    }
    let (q, k) = (tensor([2, 6, 70, 16], 5, &device).require_grad(), tensor([2, 2, 75, 16], 6, &device).require_grad());
    let params = AttentionParams { scale: 0.25, offset: 5, window: Some(50) };
    let out = attention(q.clone(), k.clone(), k.clone(), params);
    let grads = out.clone().sum().backward();
    results.push(read(flat(out.inner())));
    results.push(read(flat(q.grad(&grads).unwrap())));
    results.push(read(flat(k.grad(&grads).unwrap())));
    results
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let _turn = turn();
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(everything);
    let one = on(1);
    assert!(one.iter().flatten().all(|v| v.is_finite()));
    for threads in [2, 3, 5] {
        for (i, (found, expected)) in on(threads).iter().zip(&one).enumerate() {
            assert!(found == expected, "result {i} differs on {threads} threads");
        }
    }
}
