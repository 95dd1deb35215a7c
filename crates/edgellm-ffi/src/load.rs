//! Loading: files, the policy that compresses in memory, and what a budget leaves for the context.

use std::path::Path;

use edgellm::device::DeviceChoice;
use edgellm::kernels::{Format, InputGram, Isa, PackedHost, active_isa, force_isa, set_threads, threads};
use edgellm::luc::{Rtn, compress_decoder, uniform_policy};
use edgellm::model::ModelError;
use edgellm::model::adapter::Adapter;
use edgellm::model::chat::ChatTemplate;
use edgellm::model::config::ModelConfig;
use edgellm::model::decoder::{Activations, Decoder};
use edgellm::model::tokenizer::Tokenizer;
use edgellm::model::traits::Compressor;
use edgellm::model::values::{CompressionPolicy, LayerFormat, read_value};
use edgellm::session::load_model;

use crate::generate::Seen;
use crate::{EngineError, LoadOptions, ModelInfo, Result};

/// The shortest context that an engine is worth loading for.
const LEAST_CONTEXT: u64 = 256;

/// What an engine's calls work on. Each field is replaced as a whole, so that a call that fails leaves no half of one.
pub(crate) struct Work {
    pub(crate) decoder: Decoder,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
    /// Exit norms that come with the base.
    pub(crate) plain: Option<Adapter>,
    /// The adapter in use.
    pub(crate) adapter: Option<Adapter>,
    /// What the last text left in the cache.
    pub(crate) seen: Option<Seen>,
    /// Tokens of a prompt and its answer, at most.
    pub(crate) context: usize,
    /// Bytes of the weights.
    pub(crate) weight_bytes: u64,
    /// The budget that it was loaded with.
    pub(crate) memory_budget: Option<u64>,
}

impl Work {
    /// What the base is run with.
    pub(crate) fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref().or(self.plain.as_ref())
    }

    /// Uses another adapter from now on, or none. Keys and values of the old one do not hold for it.
    pub(crate) fn set_adapter(&mut self, adapter: Option<Adapter>) {
        self.seen = None;
        self.adapter = adapter;
    }
}

/// Loads a model, and what can be told of it.
pub(crate) fn load(path: &str, options: &LoadOptions) -> Result<(Work, ModelInfo)> {
    process_settings(options)?;
    let path = Path::new(path);
    let budget = options.memory_budget_bytes;
    // Weights that are compressed now are read as they lie in the file, and arranged for the kernels afterwards.
    let activations = if options.policy.is_some() { Activations::F32 } else { Activations::Int8 };
    if let (None, Some(budget)) = (&options.policy, budget) {
        // Before anything of that size is read.
        check_weights(edgellm::model::files::ModelFiles::open(path)?.file_bytes(), budget)?;
    }
    let model = load_model(path, &DeviceChoice::Auto.load_options(activations)?)?;
    let plain = model.adapters.current().cloned();
    let decoder = match &options.policy {
        Some(policy) => compress(&model.decoder, policy)?,
        None => model.decoder,
    };
    let config = decoder.config().clone();
    let weight_bytes = weight_bytes(&decoder)?;
    let context = context(&config, weight_bytes, budget)?;
    let info = ModelInfo {
        name: name_of(path),
        architecture: config.architecture.name.to_string(),
        bytes: weight_bytes,
        layers: config.n_layers as u32,
        context: u32::try_from(context).unwrap_or(u32::MAX),
        can_chat: model.chat_template.is_some(),
        kernels: active_isa().name().to_owned(),
        threads: threads() as u32,
    };
    let work = Work {
        decoder,
        tokenizer: model.tokenizer,
        chat_template: model.chat_template,
        plain,
        adapter: None,
        seen: None,
        context,
        weight_bytes,
        memory_budget: budget,
    };
    Ok((work, info))
}

/// Threads and kernels, which the whole process shares.
fn process_settings(options: &LoadOptions) -> Result<()> {
    if let Some(name) = &options.kernels {
        let Some(isa) = Isa::ALL.into_iter().find(|isa| isa.name() == name) else {
            let all: Vec<&str> = Isa::ALL.into_iter().map(Isa::name).collect();
            return Err(EngineError::argument("kernels", format!("one of {}", all.join(", ")), format!("'{name}'")));
        };
        force_isa(isa).map_err(|error| EngineError::BadArgument(format!("kernels: {error}")))?;
    }
    if let Some(wanted) = options.threads {
        if !(1..=1024).contains(&wanted) {
            return Err(EngineError::argument("threads", "from 1 to 1024", wanted));
        }
        let wanted = wanted as usize;
        // The first engine decides for the longer work; a process has one pool for it.
        let fresh = rayon::ThreadPoolBuilder::new().num_threads(wanted).build_global().is_ok();
        if !fresh && rayon::current_num_threads() != wanted {
            let found = format!("{wanted}, after an engine has started with another number");
            return Err(EngineError::argument("threads", rayon::current_num_threads(), found));
        }
        set_threads(wanted);
    }
    Ok(())
}

/// Rounds to nearest, and arranges what comes out for the integer kernels at once.
struct Prepared;

impl Compressor for Prepared {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn compress(
        &self,
        values: &[f32],
        rows: usize,
        cols: usize,
        format: &LayerFormat,
        inputs: Option<&InputGram>,
    ) -> Result<PackedHost, ModelError> {
        Ok(Rtn.compress(values, rows, cols, format, inputs)?.prepare()?)
    }
}

/// The model in the formats of a policy file, or in one format.
fn compress(decoder: &Decoder, policy: &str) -> Result<Decoder> {
    let policy = match Format::parse(policy) {
        Ok(format) => uniform_policy(decoder.n_blocks(), layer_format(format)?)?,
        Err(_) if Path::new(policy).exists() => read_value::<CompressionPolicy>(Path::new(policy))?,
        Err(error) => {
            let found = format!("'{policy}', which is no file ({error})");
            return Err(EngineError::argument("policy", "a policy file or a format such as q4g32a", found));
        }
    };
    Ok(compress_decoder(decoder, &policy, &Prepared, &[]).map_err(edgellm::EdgeError::from)?)
}

/// The format as policies name it; others would become something else without a word.
fn layer_format(format: Format) -> Result<LayerFormat> {
    let layer = LayerFormat::of(format);
    let stored = layer.packed()?;
    if stored == format {
        return Ok(layer);
    }
    let expected = format!("a format that policies can name, such as {stored}");
    Err(EngineError::argument("policy", expected, format))
}

/// Bytes of all matrices and of the norms.
fn weight_bytes(decoder: &Decoder) -> Result<u64> {
    let mut bytes = decoder.embedding().layout().bytes();
    bytes += decoder.untied_head().map_or(0, |head| head.weight.layout().bytes());
    for index in 0..decoder.n_blocks() {
        bytes += decoder.store().layouts(index)?.iter().map(|layout| layout.bytes()).sum::<u64>();
    }
    Ok(bytes + 4 * (2 * decoder.n_blocks() as u64 + 1) * decoder.config().hidden_size as u64)
}

/// Bytes of the keys and values of one token, as `f16`.
pub(crate) fn cache_bytes_per_token(config: &ModelConfig) -> u64 {
    2 * 2 * (config.n_layers * config.n_kv_heads * config.head_dim) as u64
}

/// The context that a budget leaves room for.
fn context(config: &ModelConfig, weight_bytes: u64, budget: Option<u64>) -> Result<usize> {
    let most = config.max_position_embeddings;
    let Some(budget) = budget else { return Ok(most) };
    check_weights(weight_bytes, budget)?;
    let each = cache_bytes_per_token(config).max(1);
    let fits = (budget - weight_bytes) / each;
    let least = LEAST_CONTEXT.min(most as u64);
    if fits < least {
        let needed = weight_bytes + least * each;
        return Err(EngineError::Memory(format!(
            "memory budget: expected at least {needed} bytes, for the weights and a context of {least} tokens, found \
             {budget}; give a larger budget, or a policy with fewer bits"
        )));
    }
    Ok(most.min(usize::try_from(fits).unwrap_or(usize::MAX)))
}

fn check_weights(bytes: u64, budget: u64) -> Result<()> {
    if bytes <= budget {
        return Ok(());
    }
    Err(EngineError::Memory(format!(
        "memory budget: expected at least {bytes} bytes, for the weights alone, found {budget}; give a larger budget, or a \
         policy with fewer bits"
    )))
}

fn name_of(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    whole.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
