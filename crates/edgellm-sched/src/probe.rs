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
use edgellm_model::values::{DecodeRates, Projection};
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

/// Fills in all but the formats of `rates`; `ns_per_weight` is that of [`PROBE_FORMAT`].
pub(crate) fn measure(ns_per_weight: f64, rates: &mut DecodeRates) -> Result<()> {
    let small = Probe::new(SMALL)?.times(false)?;
    let probe = Probe::new(LARGE)?;
    let large = probe.times(true)?;
    let rest = |size: Size, times: &Times| {
        let weights = size.block_weights(&probe_config(size)?);
        Ok::<f64, SchedError>((times.blocks_ns / size.blocks as f64 - weights * ns_per_weight).max(0.0))
    };
    let (a, b) = (rest(SMALL, &small)?, rest(LARGE, &large)?);
    let (x, y) = (block_values(&SMALL.shape()), block_values(&LARGE.shape()));
    let (constant, slope) = line((x, a), (y, b));
    (rates.block_us, rates.block_value_ns) = (round(constant * 1e-3), round(slope));
    let per_position = (large.long_ns - large.blocks_ns) / LARGE.blocks as f64;
    let positions = (LONG - TOKENS / 2) as f64;
    rates.attention_ns = round((per_position / positions / LARGE.shape().query_size as f64).max(0.0));
    let head = |size: Size, times: &Times| {
        (times.token_ns - (size.vocab * size.shape().hidden_size) as f64 * ns_per_weight).max(0.0)
    };
    let (constant, slope) =
        line((SMALL.vocab as f64, head(SMALL, &small)), (LARGE.vocab as f64, head(LARGE, &large)));
    (rates.token_us, rates.logit_ns) = (round(constant * 1e-3), round(slope));
    Ok(())
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

struct Times {
    /// All blocks, with a short cache.
    blocks_ns: f64,
    /// All blocks, with [`LONG`] tokens in the cache; that of a short one where it was not asked for.
    long_ns: f64,
    /// Embedding, norm, scores and their logarithms.
    token_ns: f64,
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
    fn times(&self, long: bool) -> Result<Times> {
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
        let [blocks_ns, token_ns] = some(1)?;
        let mut long_ns = blocks_ns;
        if long {
            // Up to half of the tokens that are timed before `LONG`.
            let ids: Vec<u32> = (0..(LONG - TOKENS - TOKENS / 2) as u32).collect();
            self.decoder.run_blocks(self.decoder.embed(&[&ids])?, 0..end, None, Some(&mut cache))?;
            let mut blocks = Vec::new();
            for id in 0..TOKENS as u32 {
                let x = self.decoder.embed(&[&[id]])?;
                let start = Instant::now();
                self.decoder.run_blocks(x, 0..end, None, Some(&mut cache))?;
                blocks.push(start.elapsed().as_secs_f64());
            }
            long_ns = median(&mut blocks) * 1e9;
        }
        Ok(Times { blocks_ns, long_ns, token_ns })
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
