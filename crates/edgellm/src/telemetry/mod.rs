//! Analytics: what a model's layers and operators take, as metrics, as a trace, or as a page for Prometheus.
//!
//! The libraries open `tracing` spans (see [`edgellm_model::spans`]), which cost a load and a branch while nobody listens.
//! [`Telemetry::layer`] listens: it sums time and bytes by layer and operator, and once a second, and at the end, writes
//! events to a file of JSON lines: `layers` for each kind of pass, `stages`, `memory`, `exits`, `activations`,
//! `gradients` and `energy`. Sums of an event are since the one before it. Times of operators are measured in some of the
//! decoded tokens and scaled to all.

mod figures;
mod layer;
#[cfg(feature = "prometheus")]
mod prometheus;
mod totals;
mod trace_file;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use edgellm_eval::{EnergyMeter, JsonLines, peak_rss_bytes, rss_bytes};
use edgellm_model::ModelError;
use edgellm_model::decoder::Decoder;
use edgellm_model::traits::MetricSink;
use edgellm_model::values::LayerFormat;
use serde_json::{Map, Value, json};

use self::figures::Figures;
use self::trace_file::TraceFile;

pub use self::layer::TelemetryLayer;
#[cfg(feature = "prometheus")]
pub use self::prometheus::MetricsServer;
pub use self::totals::{LayerTotals, Named, Pass, PassTotals, Totals};
pub use self::trace_file::TRACE_LIMIT;

/// Time between events.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is written, and where.
#[derive(Clone, Debug, Default)]
pub struct Destinations {
    /// JSON lines; they are appended.
    pub metrics: Option<PathBuf>,
    /// A trace; it is replaced.
    pub trace: Option<PathBuf>,
}

/// Collects analytics of this process. Clones share everything.
#[derive(Clone)]
pub struct Telemetry {
    shared: Arc<Shared>,
}

/// What a layer of the model is.
#[derive(Clone, Copy, Debug)]
struct LayerFacts {
    /// Mean bits of a weight, scales included.
    bits: f64,
    /// Share of weights that are zero.
    sparsity: f64,
}

/// What the layer of `tracing` and the writers share.
struct Shared {
    state: Mutex<State>,
    trace: Option<Mutex<TraceFile>>,
}

struct State {
    sink: Option<JsonLines>,
    /// Since the last event.
    since: Totals,
    /// Before the last event.
    before: Totals,
    figures: Figures,
    layers: Vec<LayerFacts>,
    /// With the joules that were written.
    energy: Option<(EnergyMeter, f64)>,
    written: Instant,
    failure: Option<ModelError>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes events if they are due.
    fn tick(&self) {
        let mut state = self.lock();
        if state.written.elapsed() >= INTERVAL {
            state.write();
            drop(state);
            if let Some(trace) = &self.trace {
                let result = trace.lock().unwrap_or_else(PoisonError::into_inner).flush();
                self.note(result);
            }
        }
    }

    /// Keeps the first failure for the end: a run goes on without its metrics.
    fn note(&self, result: Result<(), ModelError>) {
        if let Err(error) = result {
            self.lock().failure.get_or_insert(error);
        }
    }
}

impl State {
    /// Writes what happened since the last time.
    fn write(&mut self) {
        self.written = Instant::now();
        let since = std::mem::take(&mut self.since);
        let mut events: Vec<(&str, Value)> = Vec::new();
        for pass in Pass::ALL {
            if !since.pass(pass).is_empty() {
                events.push(("layers", self.layers_event(pass, since.pass(pass))));
            }
        }
        let stages: Map<String, Value> =
            since.stages.iter().map(|(name, ns)| (name.to_owned(), ms(ns as f64).into())).collect();
        if !stages.is_empty() {
            events.push(("stages", json!({"ms": stages})));
        }
        if let Some(rss) = rss_bytes() {
            events.push(("memory", json!({"rss_bytes": rss, "peak_rss_bytes": peak_rss_bytes()})));
        }
        events.extend(self.figures.take());
        if let Some((meter, written)) = &mut self.energy
            && let Some(joules) = meter.joules()
        {
            events.push(("energy", json!({"joules": joules - *written, "of": meter.scope()})));
            *written = joules;
        }
        self.before.merge(&since);
        let Some(sink) = &mut self.sink else { return };
        let result = events.into_iter().try_for_each(|(event, fields)| sink.record(event, fields));
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }

    fn layers_event(&self, pass: Pass, sums: &PassTotals) -> Value {
        let layers = sums.layers.iter().enumerate().filter(|(_, layer)| layer.ns > 0).map(|(index, layer)| {
            let mut fields = json!({
                "index": index, "ms": ms(layer.ns as f64), "bytes": layer.bytes, "operators": all_ms(&layer.operators()),
            });
            if let Some(facts) = self.layers.get(index) {
                (fields["bits"], fields["sparsity"]) = (facts.bits.into(), facts.sparsity.into());
            }
            fields
        });
        json!({
            "pass": pass.name(), "passes": sums.passes, "tokens": sums.tokens, "ms": ms(sums.ns as f64),
            "layers": layers.collect::<Vec<_>>(), "operators": all_ms(&sums.operators()),
        })
    }
}

/// Milliseconds, to a microsecond.
fn ms(ns: f64) -> f64 {
    (ns / 1e3).round() / 1e3
}

fn all_ms(operators: &std::collections::BTreeMap<&'static str, f64>) -> Map<String, Value> {
    operators.iter().map(|(name, ns)| ((*name).to_owned(), ms(*ns).into())).collect()
}

impl Telemetry {
    /// Opens the files.
    ///
    /// # Errors
    /// A file cannot be opened or written.
    pub fn open(destinations: &Destinations) -> Result<Self, ModelError> {
        let start = Instant::now();
        let create = |path: &PathBuf| TraceFile::create(path, start, TRACE_LIMIT).map(Mutex::new);
        let state = State {
            sink: destinations.metrics.as_deref().map(JsonLines::append).transpose()?,
            since: Totals::default(),
            before: Totals::default(),
            figures: Figures::default(),
            layers: Vec::new(),
            energy: EnergyMeter::start().map(|meter| (meter, 0.0)),
            written: start,
            failure: None,
        };
        let trace = destinations.trace.as_ref().map(create).transpose()?;
        Ok(Self { shared: Arc::new(Shared { state: Mutex::new(state), trace }) })
    }

    /// What a subscriber needs to feed this.
    pub fn layer(&self) -> TelemetryLayer {
        TelemetryLayer { shared: self.shared.clone() }
    }

    /// A sink that writes to the file of metrics, if there is one, in turn with what is written here.
    pub fn sink(&self) -> Box<dyn MetricSink> {
        Box::new(Sink(self.shared.clone()))
    }

    /// Takes bits and sparsity of the layers from a model.
    pub fn describe(&self, decoder: &Decoder) {
        let facts = (0..decoder.n_blocks()).map_while(|index| {
            let layouts = decoder.store().layouts(index).ok()?;
            let (mut weights, mut bits, mut zeros) = (0.0, 0.0, 0.0);
            for layout in layouts {
                let count = layout.rows as f64 * layout.cols as f64;
                weights += count;
                bits += layout.bytes() as f64 * 8.0;
                zeros += count * LayerFormat::of(layout.format).sparsity;
            }
            Some(LayerFacts { bits: bits / weights, sparsity: zeros / weights })
        });
        let facts = facts.collect();
        self.shared.lock().layers = facts;
    }

    /// All sums since the start.
    pub fn totals(&self) -> Totals {
        let state = self.shared.lock();
        let mut totals = state.before.clone();
        totals.merge(&state.since);
        totals
    }

    /// Writes what is left, and ends the trace.
    ///
    /// # Errors
    /// The first failure to write a file, now or before.
    pub fn finish(&self) -> Result<(), ModelError> {
        self.shared.lock().write();
        if let Some(trace) = &self.shared.trace {
            let result = trace.lock().unwrap_or_else(PoisonError::into_inner).finish();
            self.shared.note(result);
        }
        self.shared.lock().failure.take().map_or(Ok(()), Err)
    }
}

/// The file of metrics, for others.
struct Sink(Arc<Shared>);

impl MetricSink for Sink {
    fn record(&mut self, event: &str, fields: Value) -> Result<(), ModelError> {
        self.0.lock().sink.as_mut().map_or(Ok(()), |sink| sink.record(event, fields))
    }
}

#[cfg(test)]
mod tests;
