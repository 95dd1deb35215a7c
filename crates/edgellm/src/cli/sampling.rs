//! How tokens are drawn: options of the commands that generate text.

use clap::Args;
use edgellm::model::sample::{Sampler, SamplingConfig};

use super::failure::usage;

/// How tokens are drawn.
#[derive(Args, Debug)]
pub(crate) struct SamplingArgs {
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0, value_name = "T")]
    temp: f64,
    /// Draw from the K likeliest tokens only; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0, value_name = "P")]
    top_p: f64,
    /// Draw from tokens at least this many times as likely as the likeliest
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0, value_name = "P")]
    min_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    pub(crate) fn sampler(&self) -> anyhow::Result<Sampler> {
        self.sampler_of(0)
    }

    /// The sampler of one of several texts, which does not depend on the others.
    pub(crate) fn sampler_of(&self, index: usize) -> anyhow::Result<Sampler> {
        let (temperature, top_k, top_p, min_p) = (self.temp, self.top_k, self.top_p, self.min_p);
        let seed = self.seed.wrapping_add(index as u64);
        Sampler::new(SamplingConfig { temperature, top_k, top_p, min_p, seed }).map_err(usage)
    }
}
