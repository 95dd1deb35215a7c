//! Generation: prefill, then one token at a time, with the exits' vote for each.

use burn::tensor::Tensor;
use edgellm_kernels::CacheType;

use crate::ModelError;
use crate::adapter::Adapter;
use crate::decoder::{Decoder, KvCache};
use crate::sample::{Sampler, log_softmax};
use crate::traits::Voter;

/// Whether to go on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop before the token limit.
    Stop,
}

/// A model, an adapter, and how the exits vote: what a session of generation shares.
pub struct Generator<'a> {
    decoder: &'a Decoder,
    adapter: Option<&'a Adapter>,
    voter: &'a dyn Voter,
    exits: Vec<usize>,
    cache: KvCache,
}

impl<'a> Generator<'a> {
    /// A generator with an empty cache.
    ///
    /// `exits` are numbers of blocks, ascending, and end with the whole model. A voter that looks only at the last exit
    /// costs nothing for the others.
    ///
    /// # Errors
    /// The exits are not as described.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&'a Adapter>,
        voter: &'a dyn Voter,
        exits: &[usize],
    ) -> Result<Self, ModelError> {
        let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || exits.first() == Some(&0) || exits.last() != Some(&decoder.n_blocks()) {
            return Err(ModelError::Value {
                what: "exits".into(),
                expected: format!("ascending numbers of blocks that end with {}", decoder.n_blocks()),
                found: format!("{exits:?}"),
            });
        }
        let exits = if voter.needs_all_exits() { exits.to_vec() } else { vec![decoder.n_blocks()] };
        Ok(Self { decoder, adapter, voter, exits, cache: decoder.new_cache() })
    }

    /// The same generator with an empty cache that stores keys and values as `kind` on the CPU (default: `f16`).
    #[must_use]
    pub fn with_cache_type(mut self, kind: CacheType) -> Self {
        self.cache = self.decoder.new_cache_of(kind);
        self
    }

    /// Runs `ids` and returns the voted log-probabilities of the token that follows, `[vocab]`.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, or weights that cannot be read.
    pub fn advance(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let mut hidden = self.decoder.embed(&[ids])?;
        let mut start = 0;
        let mut states = Vec::with_capacity(self.exits.len());
        for &exit in &self.exits {
            hidden = self.decoder.run_blocks(hidden, start..exit, self.adapter, Some(&mut self.cache))?;
            start = exit;
            let last = hidden.clone().narrow(1, ids.len() - 1, 1);
            let last: Tensor<2> = last.reshape([1, self.decoder.config().hidden_size]);
            states.push(self.decoder.exit_norm(last, exit, self.adapter));
        }
        if let Some(weights) = self.voter.pool(states.len()) {
            return log_probs(self.decoder.pooled_logits(&states, &weights));
        }
        let distributions: Result<Vec<_>, _> =
            states.into_iter().map(|state| log_probs(self.decoder.logits(state))).collect();
        let distributions = distributions?;
        let views: Vec<&[f32]> = distributions.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; self.decoder.config().vocab_size];
        self.voter.vote(&views, &mut out);
        Ok(out)
    }

    /// Generates up to `max_tokens` tokens after `prompt`; `on_token` sees each and may stop.
    ///
    /// A token of `stop` ends the text and is not part of it.
    ///
    /// # Errors
    /// See [`Generator::advance`]; or the first error of `on_token`.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        stop: &[u32],
        sampler: &mut Sampler,
        mut on_token: impl FnMut(u32) -> Result<Flow, ModelError>,
    ) -> Result<Vec<u32>, ModelError> {
        let mut out = Vec::new();
        if max_tokens == 0 {
            return Ok(out);
        }
        let mut log_probs = self.advance(prompt)?;
        loop {
            let token = sampler.sample(&log_probs);
            if stop.contains(&token) {
                return Ok(out);
            }
            out.push(token);
            if on_token(token)? == Flow::Stop || out.len() == max_tokens {
                return Ok(out);
            }
            log_probs = self.advance(&[token])?;
        }
    }
}

/// Log-probabilities from one token's logits, `[1, vocab]`.
fn log_probs(logits: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    let mut row = to_vec(logits)?;
    log_softmax(&mut row);
    Ok(row)
}

/// The f32 values of a tensor.
///
/// # Errors
/// The device fails to hand them over.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    tensor.into_data().convert::<f32>().try_into_vec::<f32>().map_err(|e| ModelError::Value {
        what: "tensor data".into(),
        expected: "f32 values".into(),
        found: format!("{e:?}"),
    })
}
