use super::*;
use crate::checkpoint::{Buffer, NamedBuffer};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const INT8: AdamWConfig =
    AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, state: StateType::Int8 };

#[test]
fn adamw_matches_hand_worked_steps() {
    let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(config);
    let mut value = [1.0f32, -2.0];
    let (mut expected, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
    for (t, grad) in [[0.5f64, -1.0], [0.25, 2.0], [-1.0, 0.0]].into_iter().enumerate() {
        // The factor on the gradient: twice the half.
        optimizer.update("w", &mut value, &grad.map(|g| 2.0 * g as f32), 0.5, 0.01);
        for i in 0..2 {
            m[i] = 0.9 * m[i] + 0.1 * grad[i];
            v[i] = 0.999 * v[i] + 0.001 * grad[i] * grad[i];
            let power = t as i32 + 1;
            let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(power)), v[i] / (1.0 - 0.999f64.powi(power)));
            expected[i] -= 0.01 * (mh / (vh.sqrt() + 1e-8) + 0.1 * expected[i]);
        }
    }
    for i in 0..2 {
        assert!((f64::from(value[i]) - expected[i]).abs() < 1e-6, "{value:?} is not {expected:?}");
    }
    assert_eq!(optimizer.state_bytes(), 16);
}

#[test]
fn the_first_8_bit_step_is_the_f32_step() {
    // Both moments are zero before, so that nothing is rounded yet in what the first step uses.
    let grad: Vec<f32> = (0..5000).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
    let (mut a, mut b) = (vec![0.5f32; 5000], vec![0.5f32; 5000]);
    AdamW::new(AdamWConfig::default()).update("w", &mut a, &grad, 1.0, 1e-3);
    let mut optimizer = AdamW::new(INT8);
    optimizer.update("w", &mut b, &grad, 1.0, 1e-3);
    assert_eq!(a, b);
    // A byte a value and moment, and a scale for each of 20 blocks (the last one has 136 values).
    assert_eq!(optimizer.state_bytes(), 2 * (5000 + 4 * 20));
    let small = vec![0.1f32; MIN_INT8_VALUES - 1];
    optimizer.update("small", &mut small.clone(), &small, 1.0, 1e-3);
    assert_eq!(optimizer.state_bytes(), 2 * (5000 + 4 * 20) + 8 * (MIN_INT8_VALUES as u64 - 1));
}

/// Mini-batches of a linear regression with 8192 weights, whose inputs differ by two decades in size.
struct Regression {
    truth: Vec<f32>,
    sizes: Vec<f32>,
    rng: ChaCha8Rng,
}

impl Regression {
    fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = || (0..8192).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect::<Vec<f32>>();
        let (truth, sizes) = (draw(), draw().into_iter().map(|x| 10f32.powf(x)).collect());
        Self { truth, sizes, rng }
    }

    /// Gradient of half the squared error of 16 samples, each of 8 weights, and the error of the noise-free weights.
    fn grad(&mut self, weights: &[f32]) -> Vec<f32> {
        let mut grad = vec![0.0; weights.len()];
        for chunk in 0..weights.len() / 8 {
            for _ in 0..16 {
                let base = 8 * chunk;
                let x: Vec<f32> =
                    (0..8).map(|i| self.sizes[base + i] * (self.rng.random::<f32>() * 2.0 - 1.0)).collect();
                let error: f32 = (0..8).map(|i| x[i] * (weights[base + i] - self.truth[base + i])).sum();
                for i in 0..8 {
                    grad[base + i] += error * x[i] / 16.0;
                }
            }
        }
        grad
    }

    fn distance(&self, weights: &[f32]) -> f64 {
        let squares = weights.iter().zip(&self.truth).map(|(w, t)| f64::from(w - t).powi(2));
        (squares.sum::<f64>() / weights.len() as f64).sqrt()
    }
}

fn solve(config: AdamWConfig, steps: u64) -> (f64, f64) {
    let mut problem = Regression::new();
    let mut weights = vec![0.0f32; 8192];
    let before = problem.distance(&weights);
    let mut optimizer = AdamW::new(config);
    for step in 0..steps {
        let grad = problem.grad(&weights);
        let lr = 1e-2 * LrSchedule::Cosine.factor(step, steps, 10);
        optimizer.update("w", &mut weights, &grad, 1.0, lr);
    }
    (before, problem.distance(&weights))
}

#[test]
fn eight_bits_follow_f32_on_a_regression() {
    let (before, f32_end) = solve(AdamWConfig::default(), 400);
    let (_, int8_end) = solve(INT8, 400);
    assert!(f32_end < 0.3 * before, "f32 goes from {before} to {f32_end}");
    assert!((int8_end / f32_end - 1.0).abs() < 0.12, "{int8_end} in 8 bits is not within 12% of {f32_end} in f32");
}

/// Two optimizers: one that goes on, and one that is made from the first one's state.
fn restored(config: AdamWConfig, len: usize) -> (AdamW, AdamW, Vec<f32>) {
    let mut optimizer = AdamW::new(config);
    let mut value = vec![0.25; len];
    for step in 0..5 {
        let grad: Vec<f32> = (0..len).map(|i| ((i + 3 * step) as f32).sin()).collect();
        optimizer.update("0.q.a", &mut value, &grad, 0.9, 1e-3);
    }
    let mut other = AdamW::new(config);
    let mut buffers = optimizer.state();
    buffers.reverse();
    other.restore(buffers, |name| (name == "0.q.a").then_some(len)).unwrap();
    (optimizer, other, value)
}

#[test]
fn a_restored_state_is_the_same_to_the_bit() {
    for (config, len) in [(AdamWConfig::default(), 5000), (INT8, 5000), (INT8, 7)] {
        let (mut a, mut b, value) = restored(config, len);
        assert_eq!(a.state(), b.state());
        assert_eq!(a.state_bytes(), b.state_bytes());
        let (mut x, mut y) = (value.clone(), value.clone());
        a.update("0.q.a", &mut x, &value, 1.0, 1e-3);
        b.update("0.q.a", &mut y, &value, 1.0, 1e-3);
        assert_eq!(x, y);
        assert_ne!(x, value);
        assert_eq!(a.state(), b.state());
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let (optimizer, mut other, _) = restored(INT8, 5000);
    let before = other.state();
    let mut check = |change: &dyn Fn(&mut Vec<NamedBuffer>), len: Option<usize>, expected: &str| {
        let mut buffers = optimizer.state();
        change(&mut buffers);
        let error = other.restore(buffers, |_| len).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(other.state(), before, "the state before stays");
    };
    check(&|_| {}, None, "expected a parameter that is trained");
    check(&|_| {}, Some(5001), "expected 5001 values of u8, found 5000 values of u8");
    check(&|_| {}, Some(100), "expected 100 values of f32, found nothing");
    check(&|b| b.truncate(4), Some(5000), "expected 20 values of f32, found nothing");
    check(&|b| b[0].data = Buffer::U64(vec![0]), Some(5000), "a number of updates above 0");
    check(&|b| b[2].data = Buffer::F32(vec![-1.0; 20]), Some(5000), "no number below 0, found -1");
    check(&|b| b[2].data = Buffer::F32(vec![f32::NAN; 20]), Some(5000), "expected numbers");
    check(&|b| b.push(NamedBuffer::new("x", Buffer::U8(vec![1]))), Some(5000), "belong to no such state");
    check(&|b| b.push(b[1].clone()), Some(5000), "the buffer twice");
    let mut f32_optimizer = AdamW::new(AdamWConfig::default());
    let error = f32_optimizer.restore(optimizer.state(), |_| Some(5000)).unwrap_err().to_string();
    assert!(error.contains("expected 5000 values of f32, found nothing"), "{error}");
}

#[test]
fn state_types_have_names() {
    for state in [StateType::F32, StateType::Int8] {
        assert_eq!(state.name().parse::<StateType>().unwrap(), state);
    }
    assert!("int4".parse::<StateType>().is_err());
}
