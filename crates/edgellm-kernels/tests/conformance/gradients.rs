//! Gradients of the operators without packed weights.

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
