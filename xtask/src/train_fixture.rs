//! `cargo xtask train-fixture`: makes the fixture's model from nothing: texts, tokenizer, training. Each step is seeded,
//! so the same commit makes the same files.

use anyhow::Result;
use clap::Args;
use xshell::cmd;

use crate::{fixture, repo};

/// Size of the tokenizer's vocabulary: `vocab_size` of `fixtures/model/config.json`.
const VOCABULARY: usize = 2048;

/// Makes the texts, trains the tokenizer and the model of fixtures/.
#[derive(Args)]
pub(crate) struct TrainFixture {
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimizer steps.
    #[arg(long, default_value_t = 1500)]
    steps: usize,
    /// Size of the training text.
    #[arg(long, default_value_t = 16)]
    megabytes: usize,
}

impl TrainFixture {
    pub(crate) fn run(&self) -> Result<()> {
        let shell = repo::shell()?;
        let fixtures = repo::root()?.join("fixtures");
        let model = fixtures.join("model");
        let text = repo::scratch("fixture")?.join("train.txt");
        let shipped = fixture::write_shipped(&fixtures, self.seed)?;
        fixture::write_training(&text, self.megabytes << 20, self.seed, &shipped)?;
        let vocabulary = VOCABULARY.to_string();
        cmd!(shell, "cargo run --release -p edgellm-model --example train_tokenizer -- {text} {model} {vocabulary}")
            .run()?;
        let (seed, steps) = (self.seed.to_string(), self.steps.to_string());
        cmd!(
            shell,
            "cargo run --release -p edgellm --example train_fixture --
                --text {text} --tokenizer-dir {model} --out {model} --seed {seed} --steps {steps}"
        )
        .run()?;
        Ok(())
    }
}
