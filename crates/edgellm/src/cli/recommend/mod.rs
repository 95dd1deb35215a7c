//! `edgellm recommend`: what to do with a model on a device, and, with `--apply`, doing it and measuring whether it is true.

mod apply;

use std::path::PathBuf;

use clap::Args;
use edgellm::eval::rss_bytes;
use edgellm::luc::Solution;
use edgellm::model::files::ModelFiles;
use edgellm::model::tokenizer::Tokenizer;
use edgellm::model::values::{DeviceProfile, Measurement, read_value, write_value};
use edgellm::recommend::{Recommendation, Wish, recommend};
use edgellm::session::Memory;
use serde_json::{Value, json};

use super::failure::Usage;
use super::output::{bytes, table};
use super::{Context, check_output_dir, check_output_file, profile};

/// How often a recommendation is tried with `--apply` until it keeps the quality on the text.
const ROUNDS: usize = 4;

/// Recommend formats, threads and a schedule for a device, a memory and a quality
#[derive(Args)]
pub(crate) struct Recommend {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// Its measurement, as `edgellm measure` wrote it
    #[arg(long, value_name = "FILE")]
    measurement: PathBuf,
    /// The device's profile, as `edgellm profile` wrote it
    #[arg(long, visible_alias = "profile", value_name = "FILE")]
    device_profile: PathBuf,
    /// The least share of the base model's probability that is to be kept, such as 0.9: exp(-KL) on the text of the
    /// measurement. The fastest such model is recommended; without it, the best within --max-memory and --max-ms
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    min_quality: Option<f64>,
    /// The most milliseconds for a decoded token
    #[arg(long, value_name = "MS", allow_negative_numbers = true)]
    max_ms: Option<f64>,
    /// Tokens in the cache
    #[arg(long, value_name = "N", default_value_t = 256)]
    context: usize,
    /// The policy to write: TOML, or JSON if the name ends in .json
    #[arg(short, long, value_name = "POLICY.toml")]
    output: Option<PathBuf>,
    #[command(flatten)]
    apply: apply::ApplyArgs,
}

impl Recommend {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.check(ctx)?;
        let profile = profile::read(ctx, &self.device_profile)?;
        let files = ModelFiles::open(&ctx.store.resolve(&self.model)?)?;
        // What a process that runs the compressed model has before it loads it: the program, and a tokenizer that was read
        // from JSON.
        let tokenizer = Tokenizer::from_json(&self.device_profile, &files.tokenizer()?.to_json()?)?;
        let process = rss_bytes().unwrap_or(0);
        drop(tokenizer);
        let measurement: Measurement = read_value(&self.measurement)?;
        let digest = edgellm::luc::model_digest(&files)?;
        if digest != measurement.model_digest {
            anyhow::bail!(
                "{}: expected a measurement of {}, whose weights have the digest {digest:.16}..., found {:.16}...; measure \
                 that model",
                self.measurement.display(),
                self.model,
                measurement.model_digest
            );
        }
        let limit = ctx.max_memory.unwrap_or(profile.usable_bytes);
        let memory = Memory { limit, cache_tokens: self.context, pass_tokens: 1, other: 0 };
        let mut wish = Wish { min_quality: self.min_quality, max_milliseconds: self.max_ms };
        let mut found = self.choices(ctx, recommend(&measurement, &profile, memory, process, wish)?)?;
        let mut checked = self.apply.run(ctx, self, &measurement, &found[0])?;
        for _ in 1..ROUNDS {
            let Some(quality) = checked.as_ref().and_then(apply::Checked::stricter) else { break };
            ctx.say(&format!("on the text less quality is kept than expected; trying for {quality:.4}"));
            wish.min_quality = Some(quality);
            let Ok(choices) = recommend(&measurement, &profile, memory, process, wish) else { break };
            found = self.choices(ctx, choices)?;
            checked = self.apply.run(ctx, self, &measurement, &found[0])?;
        }
        let best = &found[0];
        if let Some(path) = &self.output {
            write_value(path, &best.solution.policy)?;
        }
        let mut json = choice_json(best);
        json["limit_bytes"] = json!(limit);
        json["policy"] = json!(self.output);
        json["others"] = found[1..].iter().map(choice_json).collect();
        json["checked"] = checked.as_ref().map_or(Value::Null, apply::Checked::json);
        ctx.result(json, || self.text(&profile, limit, &measurement, &found, checked.as_ref()))
    }

    /// Those with `--threads`.
    fn choices(&self, ctx: &Context, mut found: Vec<Recommendation>) -> anyhow::Result<Vec<Recommendation>> {
        let Some(threads) = ctx.threads else { return Ok(found) };
        found.retain(|choice| choice.threads == usize::from(threads));
        if found.is_empty() {
            anyhow::bail!("{}: no recommendation with {threads} threads", self.device_profile.display());
        }
        Ok(found)
    }

    fn check(&self, ctx: &Context) -> anyhow::Result<()> {
        if self.min_quality.is_none() && self.max_ms.is_none() && ctx.max_memory.is_none() {
            return Err(Usage("expected --min-quality, --max-ms or --max-memory, found none of them".into()).into());
        }
        if let Some(quality) = self.min_quality.filter(|q| !(*q > 0.0 && *q < 1.0)) {
            let text = format!("--min-quality: expected a share above 0 and below 1, found {quality}");
            return Err(Usage(text).into());
        }
        if let Some(ms) = self.max_ms.filter(|ms| !ms.is_finite() || *ms <= 0.0) {
            return Err(Usage(format!("--max-ms: expected a number above 0, found {ms}")).into());
        }
        if let Some(path) = &self.output {
            check_output_file(path)?;
        }
        match self.apply.folder() {
            Some(folder) => check_output_dir(folder, false),
            None => Ok(()),
        }
    }

    fn text(
        &self,
        profile: &DeviceProfile,
        limit: u64,
        measurement: &Measurement,
        found: &[Recommendation],
        checked: Option<&apply::Checked>,
    ) -> String {
        let best = &found[0];
        let schedule = &best.schedule;
        let mut text = format!("on {} with {}:\n", profile.name, bytes(limit));
        let mut line = |name: &str, value: String| text.push_str(&format!("{name:<9} {value}\n"));
        line("formats", formats(measurement, &best.solution));
        line(
            "quality",
            format!(
                "{:.1}% of the base's probability is kept (KL {:.4} nats)",
                100.0 * best.quality(),
                best.solution.sensitivity
            ),
        );
        let placement = &schedule.placement;
        let streamed = placement.resident.iter().filter(|stays| !**stays).count();
        line(
            "memory",
            match streamed {
                0 => format!("{}, all weights included", bytes(schedule.expected_bytes())),
                _ => format!(
                    "{}; {streamed} of {} blocks are streamed through {} buffers",
                    bytes(schedule.expected_bytes()),
                    placement.resident.len(),
                    placement.slots
                ),
            },
        );
        let rate = 1.0 / schedule.seconds();
        line("speed", format!("{:.2} ms a token, {rate:.1} tokens/s", 1e3 * schedule.seconds()));
        line("threads", format!("{}{}", best.threads, others(found)));
        if let Some(path) = &self.output {
            text.push_str(&format!("wrote {}\n", path.display()));
        }
        match checked {
            Some(checked) => text.push_str(&checked.text()),
            None => text.push_str(&self.next(best.threads)),
        }
        text
    }

    /// What to type next.
    fn next(&self, threads: usize) -> String {
        let policy = match &self.output {
            Some(path) => path.display().to_string(),
            None => "POLICY.toml (write it with -o)".to_owned(),
        };
        format!(
            "next      edgellm compress -m {} --policy {policy} --prepare -o DIR\n          edgellm run -m DIR --threads {threads}\n",
            self.model
        )
    }
}

/// The other numbers of threads, in words.
fn others(found: &[Recommendation]) -> String {
    let best = found[0].schedule.seconds();
    let words: Vec<String> = found[1..]
        .iter()
        .map(|other| match other.schedule.seconds() / best {
            ratio if ratio >= 1.0 => format!("with {} {ratio:.2} times as long", other.threads),
            ratio => format!("with {} {:.1}% faster, which is not worth it", other.threads, 100.0 * (1.0 - ratio)),
        })
        .collect();
    if words.is_empty() { String::new() } else { format!(" ({})", words.join(", ")) }
}

/// How many units have which format, and the bytes of all.
fn formats(measurement: &Measurement, solution: &Solution) -> String {
    let mut rows: Vec<(String, usize)> = Vec::new();
    for &option in &solution.options {
        let name = measurement.options[option].to_string();
        match rows.iter_mut().find(|row| row.0 == name) {
            Some(row) => row.1 += 1,
            None => rows.push((name, 1)),
        }
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.1));
    let names: Vec<String> = rows.iter().map(|(name, count)| format!("{count} x {name}")).collect();
    format!("{} packed: {}", bytes(solution.bytes), names.join(", "))
}

fn choice_json(choice: &Recommendation) -> Value {
    let schedule = &choice.schedule;
    json!({
        "threads": choice.threads, "quality": choice.quality(), "kl": choice.solution.sensitivity,
        "bytes": choice.solution.bytes, "gap": choice.solution.gap, "peak_bytes": schedule.bytes(), "expected_bytes": schedule.expected_bytes(),
        "seconds_per_token": schedule.seconds(), "tokens_per_second": 1.0 / schedule.seconds(),
        "resident": schedule.placement.resident, "buffers": schedule.placement.slots,
        "units": choice.solution.policy.units.iter().map(|unit| {
            json!({"unit": unit.unit, "format": unit.format.to_string()})
        }).collect::<Vec<_>>(),
    })
}

/// Expected and measured figures, side by side.
fn compared(rows: &[(&str, f64, f64, String, String)]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, expected, measured, a, b)| {
            let apart = 100.0 * (measured / expected - 1.0);
            vec![(*name).to_owned(), a.clone(), b.clone(), format!("{apart:+.1}%")]
        })
        .collect();
    table(&["", "expected", "measured", "apart"], &rows)
}
