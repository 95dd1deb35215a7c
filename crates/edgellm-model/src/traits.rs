//! Where the sibling crates meet: traits that one of them implements and others use.

use edgellm_kernels::{InputGram, PackedHost, PackedLayout};
use serde_json::Value;

use crate::ModelError;
use crate::data::Example;
use crate::decoder::Block;
use crate::values::{Budget, CompressionPolicy, LayerFormat, MatrixShape, Measurement};

/// What a device is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Run `tokens` tokens in one pass without gradients. One token is a decode step.
    Forward {
        /// Tokens in the pass.
        tokens: usize,
    },
    /// Forward and backward to the input for `tokens` tokens.
    Tune {
        /// Tokens in the pass.
        tokens: usize,
    },
}

/// What a unit costs on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UnitCost {
    /// Time in milliseconds.
    pub milliseconds: f64,
    /// Bytes of its packed weights, as a file holds them.
    pub bytes: u64,
    /// Bytes of memory that it takes while the model runs.
    pub resident_bytes: u64,
}

/// What a decoder is beside its packed matrices: all that the fixed cost of a token depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecoderShape {
    /// Decoder blocks.
    pub n_blocks: usize,
    /// Values of a hidden state.
    pub hidden_size: usize,
    /// Values of all query heads.
    pub query_size: usize,
    /// Values of all key heads, which are as many as those of the value heads.
    pub kv_size: usize,
    /// Values between the projections of the feed-forward part.
    pub intermediate_size: usize,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Tokens in the cache.
    pub context: usize,
}

/// Predicts the cost of a unit in a format on a device (implemented by the scheduler, used by compression and tuning).
pub trait CostModel {
    /// The cost of running matrices of these shapes in `format`.
    ///
    /// # Errors
    /// The format does not exist, or the device's profile does not tell its speed.
    fn cost(&self, matrices: &[MatrixShape], format: &LayerFormat, workload: Workload) -> Result<UnitCost, ModelError>;

    /// The cost of decoding a token apart from products with packed matrices: norms, attention, cache, buffers,
    /// sampling. `bytes` is 0; `resident_bytes` is the memory for a full cache and all buffers.
    ///
    /// # Errors
    /// The device's profile does not tell it.
    fn fixed(&self, shape: &DecoderShape) -> Result<UnitCost, ModelError>;
}

/// Turns a float matrix into a packed one.
pub trait Compressor {
    /// Its name on the command line, such as `rtn`.
    fn name(&self) -> &'static str;

    /// Whether it looks at the inputs; then they must be given.
    fn needs_inputs(&self) -> bool;

    /// Packs `values`, row-major `[rows, cols]`; `inputs` are the second moments of what the matrix is multiplied with.
    ///
    /// # Errors
    /// Non-finite values, a wrong length, inputs that are needed and missing or are of another number of columns, or a
    /// format that does not exist.
    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError>;
}

/// Chooses a format for every unit under a budget.
pub trait PolicySolver {
    /// Its name on the command line, such as `solve`.
    fn name(&self) -> &'static str;

    /// The policy for `budget`.
    ///
    /// # Errors
    /// The budget cannot be met with the measured options; the message says what the least is.
    fn solve(&self, measurement: &Measurement, budget: &Budget) -> Result<CompressionPolicy, ModelError>;
}

/// Chooses the exit that the next tuning step trains.
pub trait ExitSchedule {
    /// Its name on the command line, such as `sequential`.
    fn name(&self) -> &'static str;

    /// Index into the exits for step `step`. A pure function of the step, the seed and what was observed, so that a
    /// resumed run agrees.
    fn choose(&self, step: u64, n_exits: usize) -> usize;

    /// Takes note of a step at exit `exit` (as [`choose`](Self::choose) gave it): its loss before the update, and its
    /// modelled cost in any fixed unit, such as multiply-adds. Not measured time: that differs from run to run, and a
    /// resumed run would then choose other exits than one that was never interrupted.
    fn observe(&mut self, _exit: usize, _loss: f64, _cost: f64) {}

    /// All that was learned from observations, for a checkpoint; null where nothing is learned.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Takes over what [`state`](Self::state) gave; on an error, what was known before stays.
    ///
    /// # Errors
    /// It is not a state of this schedule.
    fn restore(&mut self, state: &Value) -> Result<(), ModelError> {
        if state.is_null() {
            return Ok(());
        }
        let what = format!("state of the exit schedule '{}'", self.name());
        Err(ModelError::Value { what, expected: "none, since it learns nothing".into(), found: "one".into() })
    }
}

/// Combines the exits' next-token distributions.
pub trait Voter: Sync {
    /// Its name on the command line, such as `max`.
    fn name(&self) -> &'static str;

    /// Writes the voted log-probabilities of one token, given each exit's (early to late), all `[vocab]`.
    ///
    /// # Panics
    /// If there is no exit or the lengths differ.
    fn vote(&self, exits: &[&[f32]], out: &mut [f32]);

    /// Whether it looks at any exit but the last.
    fn needs_all_exits(&self) -> bool {
        true
    }

    /// The factors on the logits of `n_exits` exits, if the vote is a log-linear pool: one head product then does for
    /// all exits ([`Decoder::pooled_logits`](crate::decoder::Decoder::pooled_logits)). `vote` must say the same.
    ///
    /// # Panics
    /// If it was made for another number of exits.
    fn pool(&self, _n_exits: usize) -> Option<Vec<f32>> {
        None
    }
}

/// Where a block's weights come from.
pub trait WeightStore: Send + Sync {
    /// Number of blocks.
    fn n_blocks(&self) -> usize;

    /// The weights of block `index`; clones of what is resident are cheap.
    ///
    /// # Errors
    /// The weights cannot be read.
    fn block(&self, index: usize) -> Result<Block, ModelError>;

    /// The layouts of block `index`'s matrices, without reading them.
    ///
    /// # Errors
    /// There is no such block.
    fn layouts(&self, index: usize) -> Result<Vec<PackedLayout>, ModelError>;
}

/// Tokenized examples in a fixed order.
pub trait DataSource {
    /// Number of examples.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Example `index`, counted from 0.
    ///
    /// # Errors
    /// There is no such example, or it cannot be read.
    fn example(&self, index: usize) -> Result<Example, ModelError>;
}

impl DataSource for Vec<Example> {
    fn len(&self) -> usize {
        Vec::len(self)
    }

    fn example(&self, index: usize) -> Result<Example, ModelError> {
        self.get(index).cloned().ok_or_else(|| ModelError::Value {
            what: "example index".into(),
            expected: format!("below {}", Vec::len(self)),
            found: index.to_string(),
        })
    }
}

/// Receives metrics as they arise: one event a call.
pub trait MetricSink: Send {
    /// Records one event; `fields` is a JSON object.
    ///
    /// # Errors
    /// The sink cannot take it (a full disk, say).
    fn record(&mut self, event: &str, fields: serde_json::Value) -> Result<(), ModelError>;
}

/// A sink that drops everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMetrics;

impl MetricSink for NoMetrics {
    fn record(&mut self, _event: &str, _fields: serde_json::Value) -> Result<(), ModelError> {
        Ok(())
    }
}
