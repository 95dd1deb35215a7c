//! `edgellm profile`: measures this device and writes its profile.

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::model::values::{DeviceProfile, read_value, write_value};
use edgellm::sched::{ProfileRequest, device_name, measure_profile};
use serde_json::json;

use super::output::{bytes, parse_size};
use super::progress::Counted;
use super::{Context, check_output_file, interrupt};

/// Measure this device and write its profile
#[derive(Args)]
pub(crate) struct Profile {
    /// The profile to write: TOML, or JSON if the name ends in .json
    #[arg(short, long, value_name = "FILE.toml")]
    output: PathBuf,
    /// Name of the device (default: what the system calls it)
    #[arg(long)]
    name: Option<String>,
    /// Memory that a process may use, such as 4GB (default: what the system allows)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    usable_memory: Option<u64>,
    /// A folder on the storage that holds models: a file of 256 MB is written there, read and removed (default: the store's
    /// folder)
    #[arg(long, value_name = "DIR")]
    storage: Option<PathBuf>,
}

impl Profile {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        check_output_file(&self.output)?;
        ctx.say("measuring for about half a minute; other work would disturb it");
        let threads = ctx.threads.and_then(|n| std::num::NonZeroUsize::new(usize::from(n)));
        let storage = self.storage.clone().unwrap_or_else(|| ctx.store.root().to_owned());
        let storage = (self.storage.is_some() || storage.is_dir()).then_some(storage);
        let request = ProfileRequest { name: self.name.clone(), usable_bytes: self.usable_memory, threads, storage };
        let mut progress = ctx.progress("profile", 0, Counted::Items("formats"));
        let profile = interrupt::stoppable(|| {
            let on_step = &mut |done: usize, total: usize| {
                progress.set_total(total as u64);
                progress.set(done as u64);
                interrupt::checkpoint();
            };
            Ok(measure_profile(&request, on_step)?)
        })?;
        progress.finish();
        write_value(&self.output, &profile)?;
        let json = json!({ "path": self.output, "profile": profile });
        ctx.result(json, || format!("{}wrote {}\n", describe(&profile), self.output.display()))
    }
}

/// Reads a profile; says so if it is of another device, or was not measured.
pub(crate) fn read(ctx: &Context, path: &Path) -> anyhow::Result<DeviceProfile> {
    let profile: DeviceProfile = read_value(path)?;
    if let Some(doubt) = profile.doubt(&device_name()) {
        ctx.say(&format!("{}: {doubt}", path.display()));
    }
    Ok(profile)
}

/// A profile in words.
pub(crate) fn describe(profile: &DeviceProfile) -> String {
    let mut text = format!("device      {}\nsource      {}\n", profile.name, profile.source);
    for kind in &profile.cores {
        text.push_str(&format!(
            "cores       {} x {}, {:.1} G multiply-adds/s each (f32)\n",
            kind.count, kind.name, kind.gmacs_f32
        ));
    }
    let rates: Vec<String> = profile.read_gbps.iter().map(|rate| format!("{rate:.1}")).collect();
    text.push_str(&format!("memory      {} GB/s with 1, 2, ... threads\n", rates.join(", ")));
    text.push_str(&format!("hand-over   {:.1} us\n", profile.handover_us));
    for rates in &profile.decode {
        let shown = ["q2g32a", "q3g32a", "q4g32a", "q8g32a", "f16"];
        let shown = rates.formats.iter().filter(|f| shown.contains(&f.format.as_str()));
        let list: Vec<String> = shown.map(|f| format!("{} {:.4}", f.format, f.ns_per_weight)).collect();
        let (threads, formats) = (rates.threads, rates.formats.len());
        text.push_str(&format!("decode      {threads} threads, ns/weight: {} ({formats} formats)\n", list.join(", ")));
    }
    let storage: Vec<String> = profile.storage.iter().map(|r| format!("{:.2} ({})", r.gbps, r.requests)).collect();
    if !storage.is_empty() {
        text.push_str(&format!("storage     GB/s (requests at once): {}\n", storage.join(", ")));
    }
    text.push_str(&format!("usable      {}\n", bytes(profile.usable_bytes)));
    text
}
