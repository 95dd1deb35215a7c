//! How a model runs within a memory limit on a device that was measured: which blocks stay, what is read when, and how long
//! a token takes.

use edgellm_kernels::Format;
use edgellm_model::ModelError;
use edgellm_model::decoder::LoadOptions;
use edgellm_model::files::ModelFiles;
use edgellm_model::traits::{CostModel, Workload};
use edgellm_model::values::{LayerFormat, MatrixShape, Projection};
use edgellm_sched::Roofline;
use edgellm_sched::stream::{BlockSource, Placement, Step, place, timeline};

use crate::EdgeError;
use crate::session::{Memory, Needs};

/// A block in a schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduledBlock {
    /// Bytes in memory.
    pub bytes: u64,
    /// Bits per weight.
    pub bits: f64,
    /// Predicted seconds to compute it for one token, with its share of what is beside the products.
    pub seconds: f64,
}

/// How tokens will be decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// All blocks in order.
    pub blocks: Vec<ScheduledBlock>,
    /// Which of them stay.
    pub placement: Placement,
    /// One token: reads and computing.
    pub steps: Vec<Step>,
    /// Predicted seconds for head and sampling.
    pub head_seconds: f64,
    /// Bytes beside the blocks: this process, buffers, embedding and head.
    pub fixed_bytes: u64,
    /// The part of it that is kept free for what the allocator and the threads take.
    pub reserve_bytes: u64,
    /// Bytes per second that storage gives; `None` if nothing is read.
    pub read_rate: Option<f64>,
}

impl Schedule {
    /// Predicted seconds a token.
    pub fn seconds(&self) -> f64 {
        self.placement.seconds
    }

    /// Memory that the process stays below.
    pub fn bytes(&self) -> u64 {
        self.fixed_bytes + self.placement.bytes
    }

    /// Predicted memory of the process.
    pub fn expected_bytes(&self) -> u64 {
        self.bytes() - self.reserve_bytes
    }
}

/// The schedule of decoding with a cost model and what its profile says of storage.
///
/// # Errors
/// The model cannot be read, the profile does not tell the speed of decoding or, if blocks have to be streamed, of storage,
/// or the memory is too small.
pub fn schedule(
    files: &ModelFiles,
    options: &LoadOptions,
    memory: Memory,
    cost: &Roofline,
) -> Result<Schedule, EdgeError> {
    let needs = Needs::of(files, options, memory)?;
    let source = BlockSource::open(files, options)?;
    let token = Workload::Forward { tokens: 1 };
    let seconds = |names: &[String]| -> Result<f64, EdgeError> {
        let mut sum = 0.0;
        for name in names {
            let layout = files.layout(name)?;
            let shape = MatrixShape { name: name.clone(), rows: layout.rows, cols: layout.cols };
            sum += cost.cost(&[shape], &LayerFormat::of(layout.format), token)?.milliseconds * 1e-3;
        }
        Ok(sum)
    };
    let config = files.config();
    let shape = memory.shape(config);
    let n = config.n_layers;
    // What is beside the products of a whole token, and of one without blocks: the rest belongs to the blocks.
    let all = cost.fixed(&shape)?.milliseconds * 1e-3;
    let outside = cost.fixed(&edgellm_model::traits::DecoderShape { n_blocks: 0, ..shape })?.milliseconds * 1e-3;
    let mut blocks = Vec::with_capacity(n);
    for index in 0..n {
        let names = Projection::ALL.map(|projection| projection.weight_name(index));
        let mut weights = 0.0;
        for name in &names {
            let layout = files.layout(name)?;
            weights += (layout.rows * layout.cols) as f64;
        }
        let bytes = source.bytes(index) as u64;
        let seconds = seconds(&names)? + (all - outside) / n as f64;
        blocks.push(ScheduledBlock { bytes, bits: 8.0 * bytes as f64 / weights, seconds });
    }
    let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let head_seconds = seconds(&[head.to_owned()])? + outside;
    Parts { blocks, head_seconds, needs }.arrange(cost)
}

/// What is known of a model before it has a schedule.
pub(crate) struct Parts {
    /// All blocks in order.
    pub(crate) blocks: Vec<ScheduledBlock>,
    /// Predicted seconds for head and sampling.
    pub(crate) head_seconds: f64,
    /// What it needs in memory, and what there is.
    pub(crate) needs: Needs,
}

impl Parts {
    /// Chooses what stays in memory, and plays a token.
    pub(crate) fn arrange(self, cost: &Roofline) -> Result<Schedule, EdgeError> {
        let Parts { blocks, head_seconds, needs } = self;
        let sizes: Vec<u64> = blocks.iter().map(|block| block.bytes).collect();
        let mut times: Vec<f64> = blocks.iter().map(|block| block.seconds).collect();
        // The head computes after the last block, while the first ones of the next token are read.
        *times.last_mut().expect("a block") += head_seconds;
        let rates = &cost.profile().storage;
        let rate = rates.iter().map(|rate| rate.gbps * 1e9).max_by(f64::total_cmp);
        let left = needs.left(&sizes)?;
        let read_rate = match (sizes.iter().sum::<u64>() <= left, rate) {
            (true, _) => None,
            (false, Some(rate)) => Some(rate),
            (false, None) => {
                return Err(ModelError::Value {
                    what: format!("device profile '{}'", cost.profile().name),
                    expected:
                        "a measured rate of storage, since blocks have to be streamed; measure it with `edgellm profile`"
                            .into(),
                    found: "none".into(),
                }
                .into());
            }
        };
        let rate = read_rate.unwrap_or(1.0);
        let placement = place(&sizes, &times, rate, left).map_err(|error| needs.too_small(error.least))?;
        let steps = timeline(&placement, &sizes, &times, rate);
        Ok(Schedule {
            blocks,
            placement,
            steps,
            head_seconds,
            fixed_bytes: needs.fixed,
            reserve_bytes: needs.reserve,
            read_rate,
        })
    }
}

/// The format of a block's matrices, if all have the same.
pub fn block_format(files: &ModelFiles, index: usize) -> Result<Option<Format>, EdgeError> {
    let mut formats = Vec::new();
    for projection in Projection::ALL {
        formats.push(files.layout(&projection.weight_name(index))?.format);
    }
    Ok(formats.iter().all(|format| *format == formats[0]).then(|| formats[0]))
}
