//! What analytics cost while a model decodes: with metrics, with a trace, and with nobody listening.
//!
//! Pieces of work with and without a listener take turns in one process, each pair in both orders, so that what slows the
//! machine down for a while slows both; the median of the pairs' ratios counts. A span that nobody listens to costs less than
//! can be told apart this way: what one costs by itself is measured instead, and multiplied by how many there are.
//!
//!     cargo run --release --example telemetry_cost -- MODEL [PAIRS] [TOKENS]
#![allow(clippy::print_stdout, reason = "it talks to a person")]

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use edgellm::model::decoder::{Activations, LoadOptions};
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::load_model;
use edgellm::telemetry::{Destinations, Telemetry};
use edgellm::tune::voters::Last;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

type Failure = Box<dyn std::error::Error>;

/// Spans that nobody listens to, timed together.
const SPANS: u32 = 10_000_000;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().map(PathBuf::from).ok_or("expected the path of a model")?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (pairs, tokens) = (number(60)?, number(32)?);
    // Threads that wait for each other measure the machine's other work.
    edgellm::kernels::set_threads(1);
    let options = LoadOptions { device: Device::flex(), expand: false, activations: Activations::Int8 };
    let model = load_model(&model, &options)?;
    let exits = [model.decoder.n_blocks()];
    let mut generator = model.generator(&Last, &exits)?;
    decode(&mut generator, tokens)?;

    let folder = tempfile::tempdir()?;
    let [metrics, trace] = ["metrics.jsonl", "trace.json"].map(|name| folder.path().join(name));
    let nothing = Destinations::default();
    let with_metrics = Destinations { metrics: Some(metrics), ..nothing.clone() };
    let with_trace = Destinations { trace: Some(trace), ..nothing };
    println!("| analytics | time to that without | 95% interval | pairs of {tokens} tokens |");
    println!("|-----------|---------------------:|-------------:|---------:|");
    let mut token_ns = f64::INFINITY;
    for (name, destinations) in [("metrics", with_metrics), ("trace", with_trace)] {
        let telemetry = Telemetry::open(&destinations)?;
        let mut ratios = Vec::with_capacity(pairs);
        for pair in 0..pairs {
            let mut ns = [0.0; 2];
            for listening in if pair % 2 == 0 { [false, true] } else { [true, false] } {
                ns[usize::from(listening)] = if listening {
                    let subscriber = tracing_subscriber::registry().with(telemetry.layer());
                    tracing::subscriber::with_default(subscriber, || decode(&mut generator, tokens))?
                } else {
                    decode(&mut generator, tokens)?
                };
                // Whoever listened is gone: call sites must know.
                tracing::callsite::rebuild_interest_cache();
            }
            ratios.push(ns[1] / ns[0]);
            token_ns = token_ns.min(ns[0] / tokens as f64);
        }
        telemetry.finish()?;
        let [low, median, high] = median_with_interval(&mut ratios);
        println!("| {name} | {median:.4} | {low:.4} to {high:.4} | {pairs} |");
    }

    let spans = spans_of(&mut generator)?;
    let ns = span_ns();
    let share = spans as f64 * ns / token_ns;
    println!("\nnobody listens: {spans} spans a token of {ns:.2} ns each, {:.4}% of its time", share * 100.0);
    Ok(())
}

/// Decodes; nanoseconds of the clock, since what the system tells of a thread's time may be a tick old.
fn decode(generator: &mut Generator<'_>, tokens: usize) -> Result<f64, Failure> {
    generator.clear();
    let mut sampler = Sampler::new(SamplingConfig { temperature: 0.0, ..SamplingConfig::default() })?;
    let start = Instant::now();
    let found = generator.generate(&[1], tokens, &[], &mut sampler, |_| Ok(Flow::Continue))?;
    black_box(found);
    Ok(start.elapsed().as_nanos() as f64)
}

/// The median, and the order statistics that enclose it with 95% confidence.
fn median_with_interval(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let (n, half) = (values.len() as f64, 0.98 * (values.len() as f64).sqrt());
    [n / 2.0 - half, n / 2.0, n / 2.0 + half].map(|rank| values[(rank as usize).min(values.len() - 1)])
}

/// Spans of one token.
fn spans_of(generator: &mut Generator<'_>) -> Result<u64, Failure> {
    let mut count = |tokens: usize| -> Result<u64, Failure> {
        let counted = Arc::new(AtomicU64::new(0));
        let subscriber = tracing_subscriber::registry().with(Count(counted.clone()));
        tracing::subscriber::with_default(subscriber, || decode(generator, tokens))?;
        Ok(counted.load(Ordering::Relaxed))
    };
    let spans = count(3)? - count(2)?;
    tracing::callsite::rebuild_interest_cache();
    Ok(spans)
}

struct Count(Arc<AtomicU64>);

impl<S: tracing::Subscriber> Layer<S> for Count {
    fn on_new_span(&self, _: &tracing::span::Attributes<'_>, _: &tracing::span::Id, _: Context<'_, S>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Nanoseconds of a span that nobody listens to.
fn span_ns() -> f64 {
    let start = Instant::now();
    for index in 0..SPANS {
        let _span = tracing::debug_span!("nobody", index = black_box(index)).entered();
    }
    start.elapsed().as_nanos() as f64 / f64::from(SPANS)
}
