//! The comparison: an operator on tensors against a reference on vectors.

use burn::tensor::{Device, Tensor};

use crate::devices::Present;

/// An operator under test. All inputs and the output are flat; the closures know the shapes.
pub(crate) struct Case<'a> {
    pub name: String,
    pub inputs: Vec<Vec<f32>>,
    pub reference: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    pub operator: &'a dyn Fn(&[Tensor<1>]) -> Tensor<1>,
}

/// Reproducible values in `[-1, 1)`.
pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32) / (1 << 23) as f32 - 1.0
        })
        .collect()
}

pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

pub(crate) fn flat<const D: usize>(t: Tensor<D>) -> Tensor<1> {
    let n = t.shape().num_elements();
    t.reshape([n])
}

pub(crate) fn read(t: Tensor<1>) -> Vec<f32> {
    t.into_data().try_into_vec().expect("operators return f32")
}

/// Compares in the max norm, relative to the largest expected magnitude (at least 1).
pub(crate) fn assert_close(name: &str, device: &Present, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{name} on {}", device.name);
    let scale = expected.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(f) - e).abs() / scale;
        assert!(
            error <= device.tolerance,
            "{name} on {}: element {i} is {f}, expected {e} (error {error:.1e}, allowed {:.1e})",
            device.name,
            device.tolerance
        );
    }
}

impl Case<'_> {
    fn tensors(&self, device: &Device) -> Vec<Tensor<1>> {
        self.inputs.iter().map(|v| Tensor::from_floats(v.as_slice(), device)).collect()
    }

    fn expected(&self) -> Vec<f64> {
        let inputs: Vec<Vec<f64>> = self.inputs.iter().map(|v| wide(v)).collect();
        (self.reference)(&inputs)
    }

    /// Forward, on the plain device.
    pub(crate) fn forward(&self, device: &Present) {
        let found = read((self.operator)(&self.tensors(&device.device)));
        assert_close(&self.name, device, &found, &self.expected());
    }

    /// Forward and gradients on the autodiff device: of all inputs together, and of each input alone (what is saved
    /// depends on what is tracked).
    pub(crate) fn gradients(&self, device: &Present) {
        let expected = self.expected();
        let upstream = values(expected.len(), 77);
        let slopes = self.finite_differences(&upstream);
        let all: Vec<usize> = (0..self.inputs.len()).collect();
        let mut choices = vec![all.clone()];
        if all.len() > 1 {
            choices.extend(all.iter().map(|&i| vec![i]));
        }
        let autodiff = device.device.clone().autodiff();
        for tracked in choices {
            let mut inputs = self.tensors(&autodiff);
            for &i in &tracked {
                inputs[i] = inputs[i].clone().require_grad();
            }
            let out = (self.operator)(&inputs);
            assert_close(&self.name, device, &read(out.clone().inner()), &expected);
            let loss = (out * Tensor::from_floats(upstream.as_slice(), &autodiff)).sum();
            let grads = loss.backward();
            for &i in &tracked {
                let name = format!("{}: gradient of input {i} of tracked {tracked:?}", self.name);
                let grad = inputs[i].grad(&grads).unwrap_or_else(|| panic!("{name}: none on {}", device.name));
                assert_close(&name, device, &read(grad), &slopes[i]);
            }
        }
    }

    /// `d sum(upstream * reference) / d input`, by central differences in double precision.
    fn finite_differences(&self, upstream: &[f32]) -> Vec<Vec<f64>> {
        const STEP: f64 = 1e-5;
        let mut inputs: Vec<Vec<f64>> = self.inputs.iter().map(|v| wide(v)).collect();
        let loss = |inputs: &[Vec<f64>]| -> f64 {
            (self.reference)(inputs).iter().zip(upstream).map(|(y, &c)| y * f64::from(c)).sum()
        };
        let mut slopes = Vec::new();
        for i in 0..inputs.len() {
            let mut slope = Vec::with_capacity(inputs[i].len());
            for j in 0..inputs[i].len() {
                let centre = inputs[i][j];
                inputs[i][j] = centre + STEP;
                let above = loss(&inputs);
                inputs[i][j] = centre - STEP;
                let below = loss(&inputs);
                inputs[i][j] = centre;
                slope.push((above - below) / (2.0 * STEP));
            }
            slopes.push(slope);
        }
        slopes
    }
}
