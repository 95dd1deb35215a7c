//! What a decoder does beside products, from decoders of random weights in two sizes.
//!
//! A token takes, in blocks, what its products take plus a part for each block and a part for each value of its
//! activations: two sizes give both. A longer cache gives the time of attention; two vocabularies give that of the
//! scores.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use edgellm_kernels::{Format, PackedHost, PackedLayout};
use edgellm_model::ModelError;
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Block, Decoder, Linear, ResidentStore, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::sample::log_softmax;
use edgellm_model::traits::DecoderShape;
use edgellm_model::values::{DecodeRates, FormatRate, Projection};
use serde_json::json;

use crate::decode::{PROBE_FORMAT, block_values, copy, median, values};
use crate::error::{Result, SchedError};

/// Dimensions of a head.
const HEAD_DIM: usize = 64;
/// Tokens of the short runs, of which the median counts.
const TOKENS: usize = 48;
/// Tokens in the cache of the long run.
const LONG: usize = 512;

/// A decoder's size.
#[derive(Clone, Copy)]
struct Size {
    heads: usize,
    kv_heads: usize,
    intermediate: usize,
    blocks: usize,
    vocab: usize,
}

/// Many small blocks, where calls count most, and few larger ones.
const SMALL: Size = Size { heads: 4, kv_heads: 2, intermediate: 512, blocks: 48, vocab: 2048 };
const LARGE: Size = Size { heads: 9, kv_heads: 3, intermediate: 1536, blocks: 24, vocab: 32768 };

impl Size {
    fn shape(&self) -> DecoderShape {
        DecoderShape {
            n_blocks: self.blocks,
            hidden_size: self.heads * HEAD_DIM,
            query_size: self.heads * HEAD_DIM,
            kv_size: self.kv_heads * HEAD_DIM,
            intermediate_size: self.intermediate,
            vocab_size: self.vocab,
            context: 0,
        }
    }

    fn block_weights(&self, config: &ModelConfig) -> f64 {
        Projection::ALL.iter().map(|&p| config.projection_shape(p).iter().product::<usize>() as f64).sum()
    }
}

/// What the probes took, with one number of threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    small: Token,
    large: Token,
}

/// The times of one token, in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Token {
    /// All blocks, with a short cache.
    blocks: f64,
    /// All blocks, with [`LONG`] tokens in the cache; as with a short one where that was not asked for.
    long: f64,
    /// Embedding, norm, scores and their logarithms.
    outside: f64,
}

impl Token {
    fn least(self, other: Self) -> Self {
        let (blocks, long) = (self.blocks.min(other.blocks), self.long.min(other.long));
        Self { blocks, long, outside: self.outside.min(other.outside) }
    }
}

/// Runs both probes.
pub(crate) fn times() -> Result<Times> {
    Ok(Times { small: Probe::new(SMALL)?.token(false)?, large: Probe::new(LARGE)?.token(true)? })
}

impl Times {
    /// The shorter of both, part by part.
    pub(crate) fn least(self, other: Self) -> Self {
        Self { small: self.small.least(other.small), large: self.large.least(other.large) }
    }

    /// Rates of `threads` threads; `ns_per_weight` is that of [`PROBE_FORMAT`].
    pub(crate) fn rates(&self, threads: usize, ns_per_weight: f64, formats: Vec<FormatRate>) -> Result<DecodeRates> {
        let rest = |size: Size, token: &Token| {
            let weights = size.block_weights(&probe_config(size)?);
            Ok::<f64, SchedError>((token.blocks / size.blocks as f64 - weights * ns_per_weight).max(0.0))
        };
        let (a, b) = (rest(SMALL, &self.small)?, rest(LARGE, &self.large)?);
        let (x, y) = (block_values(&SMALL.shape()), block_values(&LARGE.shape()));
        let (block, value) = line((x, a), (y, b));
        let per_position = (self.large.long - self.large.blocks) / LARGE.blocks as f64 / (LONG - TOKENS / 2) as f64;
        let outside = |size: Size, token: &Token| {
            (token.outside - (size.vocab * size.shape().hidden_size) as f64 * ns_per_weight).max(0.0)
        };
        let small = (SMALL.vocab as f64, outside(SMALL, &self.small));
        let (token, logit) = line(small, (LARGE.vocab as f64, outside(LARGE, &self.large)));
        Ok(DecodeRates {
            threads,
            block_us: round(block * 1e-3),
            block_value_ns: round(value),
            attention_ns: round((per_position / LARGE.shape().query_size as f64).max(0.0)),
            token_us: round(token * 1e-3),
            logit_ns: round(logit),
            formats,
        })
    }
}

/// Constant and slope, neither below 0, of the line through two points; where one would be, of the line that leaves it
/// out and meets the second point.
fn line((x, a): (f64, f64), (y, b): (f64, f64)) -> (f64, f64) {
    let slope = (b - a) / (y - x);
    let constant = a - slope * x;
    match (constant < 0.0, slope < 0.0) {
        (true, _) => (0.0, b / y),
        (_, true) => (b, 0.0),
        _ => (constant, slope),
    }
}

/// To six decimals.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

struct Probe {
    decoder: Decoder,
}

fn probe_config(size: Size) -> Result<ModelConfig> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.heads * HEAD_DIM,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2 * LONG,
        "tie_word_embeddings": true,
        "torch_dtype": "float32",
    });
    Ok(ModelConfig::from_json(std::path::Path::new("probe"), config)?)
}

impl Probe {
    fn new(size: Size) -> Result<Self> {
        let device = Device::flex();
        let config = probe_config(size)?;
        let format = Format::parse(PROBE_FORMAT).map_err(ModelError::from)?;
        let most = config.vocab_size.max(config.intermediate_size) * config.hidden_size;
        let values = values(most);
        let pack = |[rows, cols]: [usize; 2]| -> Result<PackedHost> {
            let layout = PackedLayout::new(rows, cols, format).map_err(ModelError::from)?;
            // Small enough that activations do not overflow, whatever the number of blocks.
            let scaled: Vec<f32> = values[..rows * cols].iter().map(|v| v / (cols as f32).sqrt()).collect();
            let host = PackedHost::quantize(&scaled, layout).map_err(ModelError::from)?;
            Ok(host.prepare().map_err(ModelError::from)?)
        };
        let originals =
            Projection::ALL.iter().map(|&p| pack(config.projection_shape(p))).collect::<Result<Vec<_>>>()?;
        let norm = || Tensor::<1>::ones([config.hidden_size], &device);
        let mut blocks = Vec::with_capacity(size.blocks);
        for _ in 0..size.blocks {
            let mut linears = Vec::with_capacity(originals.len());
            for original in &originals {
                linears.push(Linear::new(Weight::Packed(copy(original)?.to_device(&device))));
            }
            let linears = linears.try_into().map_err(|_| SchedError::Unknown { what: "the projections of a block" })?;
            blocks.push(Block { attn_norm: norm(), mlp_norm: norm(), q_norm: None, k_norm: None, linears });
        }
        let embedding = Weight::Packed(pack([config.vocab_size, config.hidden_size])?.to_device(&device));
        let store = Arc::new(ResidentStore::new(blocks));
        let decoder = Decoder::from_parts(config.clone(), embedding, store, norm(), None, device.clone())?;
        Ok(Self { decoder })
    }

    /// Medians over some tokens.
    fn token(&self, long: bool) -> Result<Token> {
        let mut cache = self.decoder.new_cache();
        let end = self.decoder.n_blocks();
        let mut run = |ids: &[u32]| -> Result<[f64; 2]> {
            let start = Instant::now();
            let x = self.decoder.embed(&[ids])?;
            let before = start.elapsed();
            let x = self.decoder.run_blocks(x, 0..end, None, Some(&mut cache))?;
            let middle = start.elapsed();
            let [_, tokens, width] = x.dims();
            let last = x.narrow(1, tokens - 1, 1).reshape([1, width]);
            let mut scores = to_vec(self.decoder.logits(self.decoder.exit_norm(last, end, None)))?;
            log_softmax(&mut scores);
            std::hint::black_box(scores);
            let all = start.elapsed();
            let blocks = (middle - before).as_secs_f64();
            Ok([blocks, all.as_secs_f64() - blocks])
        };
        let mut some = |first: u32| -> Result<[f64; 2]> {
            let (mut blocks, mut tokens) = (Vec::new(), Vec::new());
            for id in 0..TOKENS as u32 {
                let [block, token] = run(&[first + id])?;
                blocks.push(block);
                tokens.push(token);
            }
            Ok([median(&mut blocks) * 1e9, median(&mut tokens) * 1e9])
        };
        let [blocks, outside] = some(1)?;
        let mut at_length = blocks;
        if long {
            // Up to half of the tokens that are timed before `LONG`.
            let ids: Vec<u32> = (0..(LONG - TOKENS - TOKENS / 2) as u32).collect();
            self.decoder.run_blocks(self.decoder.embed(&[&ids])?, 0..end, None, Some(&mut cache))?;
            let mut times = Vec::new();
            for id in 0..TOKENS as u32 {
                let x = self.decoder.embed(&[&[id]])?;
                let start = Instant::now();
                self.decoder.run_blocks(x, 0..end, None, Some(&mut cache))?;
                times.push(start.elapsed().as_secs_f64());
            }
            at_length = median(&mut times) * 1e9;
        }
        Ok(Token { blocks, long: at_length, outside })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_no_negative_part() {
        assert_eq!(line((1.0, 3.0), (3.0, 7.0)), (1.0, 2.0));
        assert_eq!(line((1.0, 1.0), (3.0, 9.0)), (0.0, 3.0));
        assert_eq!(line((1.0, 5.0), (3.0, 4.0)), (4.0, 0.0));
    }
}
