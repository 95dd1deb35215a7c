//! Operators on the CPU backend at the shapes of a small decoder: `packed_linear` by format (one token in bytes of
//! weights per second, many tokens forward and backward in multiply-adds per second), attention and the output head.

use std::hint::black_box;

use burn::tensor::{Device, Distribution, Int, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use edgellm_kernels::{
    AttentionParams, Format, PackedHost, PackedLayout, PackedMatrix, attention, cross_entropy_head, packed_linear,
};

const ROWS: usize = 1536;
const COLS: usize = 576;
const TOKENS: usize = 128;
const FORMATS: [&str; 10] =
    ["q2g64s", "q3g64a", "q4g32a", "q4g32a-8", "q5g32a", "q6g16s-f32", "q8g32s", "f16", "bf16", "f32"];

fn matrix(rows: usize, cols: usize, format: &str, device: &Device) -> PackedMatrix {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.618).sin() * 0.05).collect();
    let format = Format::parse(format).expect("a name of the registry");
    let layout = PackedLayout::new(rows, cols, format).expect("a small matrix");
    PackedHost::quantize(&values, layout).expect("finite values").to_device(device)
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), device)
}

fn linear(c: &mut Criterion) {
    let device = Device::flex();
    let (one, many) = (random([1, COLS], &device), random([TOKENS, COLS], &device));
    for format in FORMATS {
        let w = matrix(ROWS, COLS, format, &device);
        let mut group = c.benchmark_group("packed_linear");
        group.throughput(Throughput::Bytes(w.layout().bytes()));
        group.bench_function(BenchmarkId::new("decode", format), |b| {
            b.iter(|| black_box(packed_linear(one.clone(), &w, None)));
        });
        group.throughput(Throughput::Elements((TOKENS * ROWS * COLS) as u64));
        group.bench_function(BenchmarkId::new("prefill", format), |b| {
            b.iter(|| black_box(packed_linear(many.clone(), &w, None)));
        });
        group.bench_function(BenchmarkId::new("forward and backward", format), |b| {
            b.iter(|| {
                let x = Tensor::from_inner(many.clone()).require_grad();
                let loss = packed_linear(x, &w, None).sum();
                black_box(loss.backward())
            });
        });
        group.finish();
    }
}

fn others(c: &mut Criterion) {
    let device = Device::flex();
    let mut group = c.benchmark_group("attention");
    for (name, tokens, offset) in [("decode", 1, 511), ("prefill", 512, 0)] {
        let q = random([1, 9, tokens, 64], &device);
        let k = random([1, 3, offset + tokens, 64], &device);
        let params = AttentionParams { scale: 0.125, offset, window: None };
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(name, |b| b.iter(|| black_box(attention(q.clone(), k.clone(), k.clone(), params))));
    }
    group.finish();

    let head = matrix(8192, COLS, "q4g32a", &device);
    let ids = Tensor::<1, Int>::from_ints([7; TOKENS], &device);
    let (hidden, weights) = (random([TOKENS, COLS], &device), Tensor::ones([TOKENS], &device));
    let mut group = c.benchmark_group("cross_entropy_head");
    group.throughput(Throughput::Elements((TOKENS * 8192 * COLS) as u64));
    group.bench_function("forward", |b| {
        b.iter(|| black_box(cross_entropy_head(hidden.clone(), &head, ids.clone(), weights.clone())));
    });
    group.bench_function("forward and backward", |b| {
        b.iter(|| {
            let hidden = Tensor::from_inner(hidden.clone()).require_grad();
            let weights = Tensor::from_inner(weights.clone());
            black_box(cross_entropy_head(hidden, &head, ids.clone(), weights).backward())
        });
    });
    group.finish();
}

fn configured() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(600))
}

criterion_group! { name = benches; config = configured(); targets = linear, others }
criterion_main!(benches);
