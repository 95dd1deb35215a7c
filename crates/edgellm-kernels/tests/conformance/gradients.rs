//! Gradients of the operators without packed weights.

use burn::tensor::Tensor;
use edgellm_kernels::{Format, PackedHost, PackedLayout, packed_linear, rms_norm, swiglu};

use crate::check::{flat, read, values};
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
        assert_eq!(plain, checkpointed, "{}", device.name);
    });
}
