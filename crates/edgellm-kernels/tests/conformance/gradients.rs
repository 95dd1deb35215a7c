//! Gradients of the operators without packed weights.

use burn::tensor::{Int, Tensor};
use edgellm_kernels::{
    Format, Lora, PackedHost, PackedLayout, cross_entropy_head, packed_linear, rms_norm, rope, swiglu,
};

use crate::check::{assert_close, flat, read, values, wide};
use crate::devices::on_every_device;
use crate::layers::{attention_case, heads, rms_norm_case, rope_case, swiglu_case};
use crate::reference::Heads;

#[test]
fn rms_norm_gradient() {
    on_every_device("rms_norm gradient", |device| {
        for (rows, width, magnitude) in [(1, 1, 1.0), (3, 7, 1.0), (2, 33, 3.0)] {
            rms_norm_case(device, rows, width, magnitude, true);
        }
    });
}

#[test]
fn rope_gradient() {
    on_every_device("rope gradient", |device| {
        rope_case(device, [2, 3, 2, 8], 4, true);
        rope_case(device, [1, 2, 3, 10], 3, true);
    });
}

#[test]
fn attention_gradient() {
    on_every_device("attention gradient", |device| {
        attention_case(device, &heads(1, 4, 2, 3, 6), true);
        attention_case(device, &Heads { offset: 3, ..heads(2, 3, 3, 2, 5) }, true);
        attention_case(device, &Heads { offset: 2, window: Some(2), ..heads(1, 6, 2, 4, 4) }, true);
    });
}

#[test]
fn swiglu_gradient() {
    on_every_device("swiglu gradient", |device| {
        swiglu_case(device, 1, 1.0, true);
        swiglu_case(device, 37, 6.0, true);
    });
}

/// Gradients are the same when Burn recomputes cheap operations around these operators.
#[test]
fn gradient_checkpointing_changes_nothing() {
    on_every_device("gradient checkpointing", |device| {
        let layout = PackedLayout::new(9, 33, Format::parse("q4g32a").unwrap()).unwrap();
        let w = PackedHost::quantize(&values(9 * 33, 1), layout).unwrap().to_device(&device.device);
        let run = |checkpointing: bool| {
            let autodiff = device.device.clone().autodiff();
            let autodiff = if checkpointing { autodiff.gradient_checkpointing() } else { autodiff };
            let x = Tensor::<1>::from_floats(values(2 * 33, 2).as_slice(), &autodiff).reshape([2, 33]).require_grad();
            let normed = rms_norm(x.clone().exp() * 0.5, Tensor::ones([33], &autodiff), 1e-6);
            let y = packed_linear(normed.tanh(), &w, None);
            let grads = swiglu(y.clone().exp(), y.tanh()).sum().backward();
            read(flat(x.grad(&grads).unwrap()))
        };
        let (plain, checkpointed) = (run(false), run(true));
        assert!(plain.iter().any(|g| g.abs() > 1e-3));
        assert_close("with gradient checkpointing", device, &checkpointed, &wide(&plain));
    });
}

/// Frozen tensors may stay on the inner device while others are tracked: they count as constants.
#[test]
fn constants_on_the_inner_device() {
    on_every_device("constants on the inner device", |device| {
        let (inner, tracked) = (&device.device, device.device.clone().autodiff());
        let layout = PackedLayout::new(6, 8, Format::parse("q4g32a").unwrap()).unwrap();
        let w = PackedHost::quantize(&values(48, 1), layout).unwrap().to_device(inner);
        let run = |constants: &burn::tensor::Device| {
            let make = |n: usize, seed: u64| Tensor::<1>::from_floats(values(n, seed).as_slice(), constants);
            let leaf = |n: usize, seed: u64| Tensor::<1>::from_floats(values(n, seed).as_slice(), &tracked);
            let (a, b) = (leaf(16, 2).reshape([2, 8]).require_grad(), leaf(12, 3).reshape([6, 2]).require_grad());
            // A frozen activation below the first tracked parameter.
            let x = make(3 * 8, 4).reshape([3, 8]);
            let y = packed_linear(x, &w, Some(&Lora { a: a.clone(), b: b.clone(), scaling: 0.5 }));
            let y = rms_norm(y, make(6, 5), 1e-6);
            let y = rope(y.reshape([1, 1, 3, 6]), make(9, 6).reshape([3, 3]), make(9, 7).reshape([3, 3]));
            let hidden = y.reshape([3, 6]).matmul(leaf(48, 8).reshape([6, 8]));
            let targets = Tensor::<1, Int>::from_ints([1, 5, 0], constants);
            let loss = cross_entropy_head(hidden, &w, targets, make(3, 9));
            let grads = loss.clone().backward();
            [read(loss.inner()), read(flat(a.grad(&grads).unwrap())), read(flat(b.grad(&grads).unwrap()))]
        };
        let found = run(inner);
        assert!(found.iter().flatten().any(|g| g.abs() > 1e-3));
        for (found, expected) in found.iter().zip(run(&tracked)) {
            assert_close("constants on the inner device", device, found, &wide(&expected));
        }
    });
}
