//! Loading a model whole: its files, its decoder on a device, its tokenizer, its chat template and its adapters.

use std::path::Path;
use std::sync::Arc;

use edgellm_eval::rss_bytes;
use edgellm_model::adapter::{Adapter, AdapterSet};
use edgellm_model::chat::ChatTemplate;
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Decoder, LoadOptions, Loader};
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::Generator;
use edgellm_model::tokenizer::Tokenizer;
use edgellm_model::traits::{DecoderShape, Voter};
use edgellm_model::values::Projection;
use edgellm_sched::buffer_bytes;
use edgellm_sched::stream::{BlockSource, Placement, StreamedStore, place};

use crate::EdgeError;

/// Bytes per second that decoding reads weights with, where nothing is known: what one or two cores of a phone do.
const COMPUTE_RATE: f64 = 8e9;

/// A model that is ready to run.
pub struct LoadedModel {
    /// Its files, memory-mapped.
    pub files: ModelFiles,
    /// The decoder on its device.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, where the model has one.
    pub chat_template: Option<ChatTemplate>,
    /// Adapters on this base, by name. None is chosen at first; a model with a merged adapter brings its exit norms.
    pub adapters: AdapterSet,
    /// How blocks that are not in memory come there.
    pub streaming: Option<Streaming>,
}

/// How a model runs whose weights do not fit into memory.
pub struct Streaming {
    /// Which blocks stay in memory.
    pub placement: Placement,
    /// What reads the others.
    pub store: Arc<StreamedStore>,
    /// Bytes per second that storage gave for one block.
    pub read_rate: f64,
    /// Whether blocks are used as they are stored; otherwise they are converted each time.
    pub ready: bool,
    /// Whether they are read past the system's cache of files.
    pub direct: bool,
}

/// Memory that a process may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes, the process with all that it has already included.
    pub limit: u64,
    /// Tokens whose keys and values are kept.
    pub cache_tokens: usize,
    /// Tokens that are computed at once.
    pub pass_tokens: usize,
    /// Bytes that are left free for something else, such as tuning steps.
    pub other: u64,
}

impl Memory {
    /// Bytes for a cache, for what a pass computes, and for something else.
    pub(crate) fn buffers(&self, shape: &DecoderShape) -> u64 {
        let widths = 4 * shape.hidden_size + 3 * shape.query_size + 3 * shape.kv_size + 4 * shape.intermediate_size;
        let pass = 4 * self.pass_tokens.max(1) as u64 * widths as u64;
        self.other + buffer_bytes(shape) + pass
    }

    /// Bytes that are kept free beside so large buffers: what the allocator and the threads may take.
    pub(crate) fn reserve(buffers: u64) -> u64 {
        buffers / 16 + ALLOCATOR
    }

    /// The sizes that time and memory beside the weights depend on.
    pub(crate) fn shape(&self, config: &ModelConfig) -> DecoderShape {
        DecoderShape {
            n_blocks: config.n_layers,
            hidden_size: config.hidden_size,
            query_size: config.n_heads * config.head_dim,
            kv_size: config.n_kv_heads * config.head_dim,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            context: self.cache_tokens,
        }
    }
}

/// What the allocator and the threads take beside what is asked for.
const ALLOCATOR: u64 = 24 << 20;

impl LoadedModel {
    /// Reads an adapter for this model under a name. It is in use once it is chosen (`self.adapters.choose`).
    ///
    /// # Errors
    /// The name is not one or is taken, the directory cannot be read, or the adapter does not fit the model.
    pub fn load_adapter(&mut self, name: &str, dir: &Path) -> Result<(), EdgeError> {
        Ok(self.adapters.load(name, dir, self.decoder.config(), self.decoder.device())?)
    }

    /// A generator with an empty cache and the adapter that is chosen now, for as long as it lives: to go on with another
    /// adapter, choose it, start another generator and run all tokens again.
    ///
    /// # Errors
    /// The exits are not ascending numbers of blocks that end with the whole model.
    pub fn generator<'a>(&'a self, voter: &'a dyn Voter, exits: &[usize]) -> Result<Generator<'a>, EdgeError> {
        Ok(Generator::new(&self.decoder, self.adapters.current(), voter, exits)?)
    }
}

/// Loads a Hugging Face directory, a compressed directory or a GGUF file.
///
/// # Errors
/// A file is missing or malformed, or the tensors do not fit the configuration.
pub fn load_model(path: &Path, options: &LoadOptions) -> Result<LoadedModel, EdgeError> {
    load(path, options, None)
}

/// As [`load_model`], within so much memory: blocks that do not fit are read from storage whenever they are needed.
///
/// # Errors
/// As [`load_model`], the memory is too small for the rest and one block, or blocks would have to be streamed to a device
/// other than the CPU.
pub fn load_model_within(path: &Path, options: &LoadOptions, memory: Memory) -> Result<LoadedModel, EdgeError> {
    load(path, options, Some(memory))
}

fn load(path: &Path, options: &LoadOptions, memory: Option<Memory>) -> Result<LoadedModel, EdgeError> {
    let _span = tracing::debug_span!("load").entered();
    let files = ModelFiles::open(path)?;
    let tokenizer = files.tokenizer()?;
    let chat_template = files.chat_template()?;
    let streaming = memory.map(|memory| stream(&files, options, memory)).transpose()?.flatten();
    let decoder = match &streaming {
        Some(streaming) => Decoder::load_around(&files, options, || Ok(streaming.store.clone()))?,
        None => Decoder::load(&files, options)?,
    };
    let exits = if path.is_dir() { Adapter::load_exits(path, decoder.config(), decoder.device())? } else { None };
    Ok(LoadedModel { files, decoder, tokenizer, chat_template, adapters: AdapterSet::new(exits), streaming })
}

/// The blocks, if they do not all fit.
fn stream(files: &ModelFiles, options: &LoadOptions, memory: Memory) -> Result<Option<Streaming>, EdgeError> {
    let needs = Needs::of(files, options, memory)?;
    if needs.all_fit() {
        return Ok(None);
    }
    let source = BlockSource::open(files, options)?;
    let sizes: Vec<u64> = (0..source.n_blocks()).map(|index| source.bytes(index) as u64).collect();
    let seconds: Vec<f64> = sizes.iter().map(|bytes| *bytes as f64 / COMPUTE_RATE).collect();
    let left = needs.left(&sizes)?;
    let read_rate = source.measure_rate()?;
    let placement = place(&sizes, &seconds, read_rate, left).map_err(|error| needs.too_small(error.least))?;
    let (ready, direct) = (source.is_ready(), source.is_direct());
    let store = Arc::new(StreamedStore::new(source, &placement)?);
    Ok(Some(Streaming { placement, store, read_rate, ready, direct }))
}

/// What a model needs in memory.
pub(crate) struct Needs {
    /// The process as it is, buffers, what is kept free beside them, embedding and head.
    pub(crate) fixed: u64,
    /// The part of it that is kept free.
    pub(crate) reserve: u64,
    /// All blocks, in the arrangement in which they run.
    pub(crate) blocks: u64,
    /// What there is.
    pub(crate) limit: u64,
}

impl Needs {
    pub(crate) fn of(files: &ModelFiles, options: &LoadOptions, memory: Memory) -> Result<Self, EdgeError> {
        let config = files.config();
        let bytes = |name: &str| -> Result<u64, EdgeError> {
            Ok(Loader::new(files, options).placed(files.layout(name)?).bytes())
        };
        let buffers = memory.buffers(&memory.shape(config));
        let reserve = Memory::reserve(buffers);
        let mut fixed = rss_bytes().unwrap_or(0) + buffers + reserve + bytes("model.embed_tokens.weight")?;
        if !config.tie_word_embeddings && files.has("lm_head.weight") {
            fixed += bytes("lm_head.weight")?;
        }
        let mut blocks = 0;
        for name in (0..config.n_layers).flat_map(|index| Projection::ALL.map(|p| p.weight_name(index))) {
            blocks += bytes(&name)?;
        }
        Ok(Self { fixed, reserve, blocks, limit: memory.limit })
    }

    pub(crate) fn all_fit(&self) -> bool {
        self.fixed + self.blocks <= self.limit
    }

    /// Bytes for blocks of these sizes.
    pub(crate) fn left(&self, sizes: &[u64]) -> Result<u64, EdgeError> {
        let largest = sizes.iter().copied().max().unwrap_or(0);
        self.limit.checked_sub(self.fixed).ok_or_else(|| self.too_small(largest))
    }

    pub(crate) fn too_small(&self, least: u64) -> EdgeError {
        EdgeError::Memory { least: self.fixed + least, limit: self.limit }
    }
}
