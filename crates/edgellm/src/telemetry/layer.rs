//! The `tracing` layer: times spans, sums them by layer and operator, and hands them to the trace.
//!
//! A span's place is a stack of its thread; only a block or a stage that ends takes the lock of the sums. Operators of a
//! decoded token are dozens of microseconds long, so that timing all of them would cost more than it may: they are
//! enabled for one token of [`EVERY`], and for every token of a trace.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use edgellm_model::spans;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::Shared;
use super::figures::Figure;
use super::totals::{Named, Pass};
use super::trace_file::Ended;

/// Operators are timed in one of so many decoded tokens, and activations read in one of so many passes.
const EVERY: u64 = 32;
const ACTIVATIONS_EVERY: u64 = 64;
/// Passes of many tokens between two readings of activations.
const WIDE_EVERY: u64 = 16;

/// Spans that a thread may have open; what is deeper was left open elsewhere.
const DEPTH: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stage(Option<Pass>),
    Block,
    Operator,
}

impl Kind {
    fn of(metadata: &Metadata<'_>) -> Self {
        match metadata.name() {
            "block" | "block_backward" => Kind::Block,
            _ if *metadata.level() == Level::TRACE => Kind::Operator,
            name => Kind::Stage(Pass::of(name)),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Stage(_) => "stage",
            Kind::Block => "block",
            Kind::Operator => "operator",
        }
    }
}

/// A span that is open.
struct Open {
    id: u64,
    name: &'static str,
    kind: Kind,
    fields: Fields,
    start: Option<Instant>,
    ns: u64,
}

#[derive(Default)]
struct Fields {
    index: Option<u64>,
    tokens: u64,
    bytes: u64,
    exit: Option<u64>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "index" => self.index = Some(value),
            "tokens" => self.tokens = value,
            "bytes" => self.bytes = value,
            "exit" => self.exit = Some(value),
            _ => {}
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.record_u64(field, u64::try_from(value).unwrap_or(0));
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn std::fmt::Debug) {}
}

/// What a thread has open.
struct Thread {
    number: u64,
    stack: Vec<Open>,
    /// Of the block that is open.
    operators: Named,
    /// The pass that is open, or else the one before.
    pass: Pass,
    in_pass: bool,
    operators_on: bool,
    activations_on: bool,
    decoded: u64,
    wide: u64,
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::new(Thread::new());
}

impl Thread {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            stack: Vec::with_capacity(DEPTH),
            operators: Named::default(),
            pass: Pass::Prefill,
            in_pass: false,
            operators_on: true,
            activations_on: false,
            decoded: 0,
            wide: 0,
        }
    }

    /// Chooses what of a pass is looked at.
    fn begin(&mut self, pass: Pass, every: u64) {
        (self.pass, self.in_pass) = (pass, true);
        if pass == Pass::Decode {
            (self.operators_on, self.activations_on) =
                (self.decoded.is_multiple_of(every), self.decoded.is_multiple_of(ACTIVATIONS_EVERY));
            self.decoded += 1;
        } else {
            (self.operators_on, self.activations_on) = (true, self.wide.is_multiple_of(WIDE_EVERY));
            self.wide += 1;
        }
    }

    fn end(&mut self) {
        (self.in_pass, self.operators_on, self.activations_on) = (false, true, false);
    }

    fn find(&mut self, id: &Id) -> Option<&mut Open> {
        let id = id.into_u64();
        self.stack.iter_mut().rev().find(|open| open.id == id)
    }
}

/// Aggregates spans; see the module.
pub struct TelemetryLayer {
    pub(super) shared: Arc<Shared>,
}

impl TelemetryLayer {
    fn close(&self, thread: &mut Thread, open: Open) {
        let Open { name, kind, fields, start, ns, .. } = open;
        let Some(start) = start else { return };
        let mut due = false;
        match kind {
            Kind::Operator => match thread.stack.last().map(|parent| parent.kind) {
                // Its time is its parent's.
                Some(Kind::Operator) => {}
                Some(Kind::Block) => thread.operators.add(name, ns),
                _ => self.shared.lock().since.add_operator(thread.pass, name, ns, thread.in_pass),
            },
            Kind::Block => {
                let index = fields.index.and_then(|index| usize::try_from(index).ok()).unwrap_or(usize::MAX);
                let mut state = self.shared.lock();
                let sampled = thread.operators_on;
                state.since.add_block(thread.pass, index, ns, fields.bytes, sampled, &thread.operators);
                drop(state);
                thread.operators.clear();
            }
            Kind::Stage(Some(pass)) => {
                let mut state = self.shared.lock();
                state.since.add_pass(pass, fields.tokens, ns, thread.operators_on);
                if let Some(exit) = fields.exit {
                    *state.figures.chosen.entry(exit).or_default() += 1;
                }
                due = true;
                thread.end();
            }
            Kind::Stage(None) => {
                self.shared.lock().since.stages.add(name, ns);
                due = !thread.in_pass;
            }
        }
        if let Some(trace) = &self.shared.trace {
            let Fields { index, tokens, bytes, .. } = fields;
            let category = kind.name();
            let span = Ended { name, category, start, ns, thread: thread.number, index, tokens, bytes };
            let result = trace.lock().unwrap_or_else(std::sync::PoisonError::into_inner).complete(span);
            self.shared.note(result);
        }
        if due {
            self.shared.tick();
        }
    }
}

impl<S: Subscriber> Layer<S> for TelemetryLayer {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // What is at TRACE is asked for each time.
        if *metadata.level() == Level::TRACE { Interest::sometimes() } else { Interest::always() }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        if *metadata.level() != Level::TRACE {
            return true;
        }
        if metadata.is_span() {
            return THREAD.with_borrow(|thread| thread.operators_on);
        }
        match metadata.target() {
            spans::ACTIVATIONS => THREAD.with_borrow(|thread| thread.activations_on),
            _ => true,
        }
    }

    fn max_level_hint(&self) -> Option<tracing_subscriber::filter::LevelFilter> {
        Some(tracing_subscriber::filter::LevelFilter::TRACE)
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        let metadata = attributes.metadata();
        if !metadata.target().starts_with("edgellm") {
            return;
        }
        let kind = Kind::of(metadata);
        let mut fields = Fields::default();
        if kind != Kind::Operator {
            attributes.record(&mut fields);
        }
        THREAD.with_borrow_mut(|thread| {
            if thread.stack.len() == DEPTH {
                thread.stack.remove(0);
            }
            match kind {
                Kind::Stage(Some(pass)) => thread.begin(pass, if self.shared.trace.is_some() { 1 } else { EVERY }),
                Kind::Block => thread.operators.clear(),
                _ => {}
            }
            thread.stack.push(Open { id: id.into_u64(), name: metadata.name(), kind, fields, start: None, ns: 0 });
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        THREAD.with_borrow_mut(|thread| {
            if let Some(open) = thread.find(id) {
                values.record(&mut open.fields);
            }
        });
    }

    fn on_enter(&self, id: &Id, _: Context<'_, S>) {
        THREAD.with_borrow_mut(|thread| {
            if let Some(open) = thread.find(id) {
                open.start.get_or_insert_with(Instant::now);
            }
        });
    }

    fn on_exit(&self, id: &Id, _: Context<'_, S>) {
        THREAD.with_borrow_mut(|thread| {
            if let Some(open) = thread.find(id)
                && let Some(start) = open.start
            {
                open.ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            }
        });
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        THREAD.with_borrow_mut(|thread| {
            let id = id.into_u64();
            let Some(at) = thread.stack.iter().rposition(|open| open.id == id) else { return };
            let open = thread.stack.remove(at);
            self.close(thread, open);
        });
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if *metadata.level() == Level::TRACE && metadata.target().starts_with(spans::FIGURES) {
            let mut figure = Figure::default();
            event.record(&mut figure);
            self.shared.lock().figures.add(metadata.target(), &figure);
        }
    }
}
