//! `cargo xtask synth-model`: a model with random weights and the shape of a real family, packed as `edgellm compress`
//! would write it, to measure speed and memory without a download. The same seed gives the same bytes.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use xshell::cmd;

use crate::repo;

/// Writes a random model of a real family's shape.
#[derive(Args)]
pub(crate) struct SynthModel {
    /// Its shape: 135m, 0.5b, 1b, 3b or 7b.
    #[arg(long)]
    preset: String,
    /// The format of its matrices, such as q4g32s.
    #[arg(long)]
    format: String,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Pack them as the CPU's integer kernels use them: then they can be streamed from storage as they are.
    #[arg(long)]
    prepare: bool,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace the folder if it is there.
    #[arg(long)]
    force: bool,
}

impl SynthModel {
    pub(crate) fn run(&self) -> Result<()> {
        let shell = repo::shell()?;
        let tokenizer = repo::root()?.join("fixtures/model");
        // The shell runs in the repository's root, the person perhaps elsewhere.
        let out = std::path::absolute(&self.out)?;
        let (Self { preset, format, .. }, seed) = (self, self.seed.to_string());
        let flags = [(self.prepare, "--prepare"), (self.force, "--force")];
        let flags = flags.into_iter().filter_map(|(given, flag)| given.then_some(flag));
        cmd!(
            shell,
            "cargo run --quiet --release -p edgellm --example synth_model --
                --preset {preset} --format {format} --tokenizer-dir {tokenizer} --out {out} --seed {seed} {flags...}"
        )
        .quiet()
        .run()?;
        Ok(())
    }
}
