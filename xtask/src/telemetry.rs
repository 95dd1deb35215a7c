//! What analytics cost while a model decodes.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use xshell::cmd;

use crate::edgellm::{Edgellm, SMOLLM2};
use crate::repo;

/// Measures what metrics and traces cost, in pairs within one process, and what spans cost that nobody listens to.
#[derive(Args)]
pub(crate) struct CheckTelemetry {
    /// A model's folder or file; SmolLM2 is pulled if there is none.
    #[arg(short, long)]
    model: Option<PathBuf>,
    /// Pairs of pieces of work with and without.
    #[arg(short, long, default_value_t = 100)]
    repetitions: usize,
    /// Tokens of a piece.
    #[arg(short = 'n', long, default_value_t = 32)]
    tokens: usize,
}

impl CheckTelemetry {
    pub(crate) fn run(&self) -> Result<()> {
        let model = match &self.model {
            Some(path) => std::path::absolute(path)?,
            None => Edgellm::build(&[])?.quietly().pull(SMOLLM2)?,
        };
        let (shell, pairs, tokens) = (repo::shell()?, self.repetitions.to_string(), self.tokens.to_string());
        let example = cmd!(shell, "cargo run --quiet --release -p edgellm --example telemetry_cost");
        Ok(example.args(["--".into(), model.into_os_string(), pairs.into(), tokens.into()]).run()?)
    }
}
