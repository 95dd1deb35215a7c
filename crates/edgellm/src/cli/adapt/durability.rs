//! Checkpoints, and pauses for heat, battery or a person.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use edgellm::model::data::Example;
use edgellm::tune::checkpoint::{CheckpointStore, Identity, Skipped, TrainState};
use edgellm::tune::control::{All, Command, Control, PauseFile, PowerAndHeat, PowerLimits, Throttled};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::super::failure::Usage;
use super::super::{Context, interrupt};

/// What a run survives, and when it waits.
#[derive(Args)]
pub(super) struct DurabilityArgs {
    /// Steps between checkpoints; 0 for none
    #[arg(long, default_value_t = 25, value_name = "N")]
    checkpoint_every: u64,
    /// Where checkpoints are kept while the run lasts (default: OUTPUT.checkpoints)
    #[arg(long, value_name = "DIR")]
    checkpoints: Option<PathBuf>,
    /// Checkpoints to keep
    #[arg(long, default_value_t = CheckpointStore::KEEP, value_name = "N")]
    keep_checkpoints: usize,
    /// Go on from the last checkpoint, if there is one
    #[arg(long)]
    pub(super) resume: bool,
    /// Wait while this file exists
    #[arg(long, value_name = "FILE")]
    pause_file: Option<PathBuf>,
    /// Wait while a sensor of this device is hotter, in degrees Celsius
    #[arg(long, value_name = "DEGREES")]
    max_celsius: Option<f64>,
    /// Wait while a battery is discharging and has less, in percent
    #[arg(long, value_name = "PERCENT")]
    min_battery: Option<u8>,
}

impl DurabilityArgs {
    /// Whether there are checkpoints.
    pub(super) fn is_on(&self) -> bool {
        self.checkpoint_every > 0
    }

    fn folder(&self, output: &Path) -> PathBuf {
        self.checkpoints.clone().unwrap_or_else(|| {
            let mut name = output.file_name().unwrap_or_default().to_os_string();
            name.push(".checkpoints");
            output.with_file_name(name)
        })
    }

    fn store(&self, output: &Path) -> anyhow::Result<CheckpointStore> {
        Ok(CheckpointStore::new(self.folder(output), self.keep_checkpoints)?)
    }

    /// What can be checked before a model is loaded. `force` drops the checkpoints of an earlier run.
    pub(super) fn check(&self, output: &Path, force: bool) -> anyhow::Result<()> {
        if self.resume && !self.is_on() {
            return Err(Usage("--resume: expected checkpoints, found --checkpoint-every 0".into()).into());
        }
        self.store(output)?;
        self.limits().map(PowerAndHeat::new).transpose()?;
        let folder = self.folder(output);
        if self.is_on() && !self.resume && folder.exists() {
            if !force {
                let text = "holds the checkpoints of an earlier run; --resume goes on with it, --force starts anew";
                return Err(Usage(format!("{} {text}", folder.display())).into());
            }
            self.clean(output)?;
        }
        Ok(())
    }

    /// Removes the checkpoints of a run that is complete, or is dropped.
    pub(super) fn clean(&self, output: &Path) -> anyhow::Result<()> {
        if self.is_on() { Ok(self.store(output)?.remove_all()?) } else { Ok(()) }
    }

    fn limits(&self) -> Option<PowerLimits> {
        (self.max_celsius.is_some() || self.min_battery.is_some()).then(|| PowerLimits {
            max_celsius: self.max_celsius.unwrap_or(f64::INFINITY),
            min_battery_percent: self.min_battery.unwrap_or(0),
            ..PowerLimits::default()
        })
    }

    /// What may stop the run or make it wait.
    pub(super) fn control(&self, ctx: &Context) -> anyhow::Result<Box<dyn Control>> {
        let mut controls: Vec<Box<dyn Control>> = Vec::new();
        if let Some(path) = &self.pause_file {
            controls.push(Box::new(PauseFile::new(path)));
        }
        if let Some(limits) = self.limits() {
            let sensors = PowerAndHeat::new(limits)?;
            ctx.say(&sensors.describe());
            controls.push(Box::new(sensors));
        }
        let start = Instant::now();
        let slow = Throttled::new(All(controls), move || start.elapsed());
        let signal = |_| if interrupt::requested() { Command::Stop } else { Command::Continue };
        Ok(Box::new(All(vec![Box::new(signal), Box::new(slow)])))
    }

    /// The state to go on from, if `--resume` finds one.
    pub(super) fn latest(
        &self,
        ctx: &Context,
        output: &Path,
        identity: &Identity,
    ) -> anyhow::Result<Option<TrainState>> {
        if !self.resume {
            return Ok(None);
        }
        let found = self.store(output)?.latest(identity)?;
        let Some((state, skipped)) = found else {
            ctx.say(&format!("no checkpoint in {}: starting at step 0", self.folder(output).display()));
            return Ok(None);
        };
        for Skipped { path, reason } in skipped {
            ctx.say(&format!("note: passed over {}: {reason}", path.display()));
        }
        ctx.say(&format!("going on after step {}", state.step));
        Ok(Some(state))
    }

    /// Where checkpoints go, if there are any.
    pub(super) fn saver(&self, output: &Path, identity: Identity) -> anyhow::Result<Option<Saver>> {
        let every = self.checkpoint_every;
        Ok(if self.is_on() { Some(Saver { store: self.store(output)?, identity, every }) } else { None })
    }
}

/// Writes checkpoints.
pub(super) struct Saver {
    store: CheckpointStore,
    identity: Identity,
    every: u64,
}

impl Saver {
    /// Whether a checkpoint is due after `step` steps.
    pub(super) fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }

    pub(super) fn save(&self, state: &TrainState) -> Result<(), edgellm::tune::TuneError> {
        self.store.save(state, &self.identity).map(drop)
    }
}

/// What must be the same for a run to go on.
pub(super) fn identity(settings: Value, model: Value, examples: &[Example]) -> Identity {
    let mut digest = Sha256::new();
    for example in examples {
        digest.update((example.ids.len() as u64).to_le_bytes());
        for (position, id) in example.ids.iter().enumerate() {
            digest.update(id.to_le_bytes());
            digest.update([u8::from(example.is_target(position))]);
        }
    }
    let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Identity {
        settings: settings.to_string(),
        data: json!({"examples": examples.len(), "sha256": hex}).to_string(),
        model: model.to_string(),
    }
}
