//! `edgellm report`: one HTML file of runs, sweeps and models; with `--live`, a page that follows a run.

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::eval::Layer;
use edgellm::eval::report::{Inputs, page, read_metrics, read_records};
use edgellm::luc::bits_per_weight;
use edgellm::model::files::ModelFiles;
use edgellm::model::io::atomic_write;
use edgellm::model::values::{Measurement, read_value};
use serde_json::json;

use super::failure::Usage;
use super::output::bytes;
use super::{Context, check_output_file};

/// Write a report of runs, sweeps and models as one HTML file
#[derive(Args)]
pub(crate) struct Report {
    /// Metrics of `edgellm adapt --metrics`, records or the folder of results of a sweep, measurements, compressed models
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Of a folder of results, only this sweep, or this run
    #[cfg(feature = "results")]
    #[arg(long, value_name = "NAME")]
    of: Option<String>,
    /// Above everything (default: the names of the runs)
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// The file to write
    #[arg(short, long, value_name = "FILE.html")]
    #[cfg_attr(feature = "results", arg(required_unless_present = "live"))]
    #[cfg_attr(not(feature = "results"), arg(required = true))]
    output: Option<PathBuf>,
    /// Show the page on this port of this machine, and nowhere else, until Ctrl-C; it follows what is written (0: a free
    /// port)
    #[cfg(feature = "results")]
    #[arg(long, value_name = "PORT", conflicts_with = "output", num_args = 0..=1, default_missing_value = "0")]
    live: Option<u16>,
}

impl Report {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        if let Some(path) = &self.output {
            check_output_file(path)?;
        }
        #[cfg(feature = "results")]
        if let Some(port) = self.live {
            return super::live::serve(ctx, port, &|| {
                let inputs = self.inputs()?;
                Ok(page(&Inputs { refresh: Some(2), ..inputs }))
            });
        }
        let Some(path) = &self.output else { return Err(Usage("expected --output".into()).into()) };
        let inputs = self.inputs()?;
        let html = page(&inputs);
        atomic_write(path, html.as_bytes())?;
        for problem in &inputs.problems {
            ctx.say(&format!("note: {problem}"));
        }
        let json = json!({
            "path": path, "bytes": html.len(), "records": inputs.records.len(), "metrics": inputs.metrics.len(),
            "models": inputs.models.len(), "problems": inputs.problems,
        });
        ctx.result(json, || format!("wrote {}, {}\n", path.display(), bytes(html.len() as u64)))
    }

    /// Everything that the runs hold. What cannot be read is a problem on the page, unless nothing can.
    fn inputs(&self) -> anyhow::Result<Inputs> {
        let mut inputs = Inputs::default();
        let mut first = None;
        for path in &self.runs {
            if let Err(error) = self.read(path, &mut inputs) {
                inputs.problems.push(super::failure::message(&error, false));
                first.get_or_insert(error);
            }
        }
        let nothing = inputs.metrics.is_empty() && inputs.records.is_empty() && inputs.models.is_empty();
        if let Some(error) = first.filter(|_| nothing) {
            return Err(error);
        }
        let names: Vec<String> = self.runs.iter().map(|path| name_of(path)).collect();
        inputs.title = self.title.clone().unwrap_or_else(|| names.join(", "));
        Ok(inputs)
    }

    fn read(&self, path: &Path, inputs: &mut Inputs) -> anyhow::Result<()> {
        if path.is_dir() {
            if path.join("config.json").is_file() {
                inputs.models.push((name_of(path), model_layers(path)?));
                return Ok(());
            }
            return self.read_results(path, inputs);
        }
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            match read_metrics(path) {
                Ok((metrics, problems)) => {
                    inputs.metrics.push(metrics);
                    inputs.problems.extend(problems);
                }
                Err(no_metrics) => {
                    let Ok((records, problems)) = read_records(path) else { return Err(no_metrics.into()) };
                    inputs.records.extend(records);
                    inputs.problems.extend(problems);
                }
            }
            return Ok(());
        }
        inputs.models.push((name_of(path), measured_layers(&read_value(path)?)));
        Ok(())
    }

    #[cfg(feature = "results")]
    fn read_results(&self, path: &Path, inputs: &mut Inputs) -> anyhow::Result<()> {
        inputs.records.extend(super::eval::sweep::records(path, self.of.as_deref())?);
        Ok(())
    }

    #[cfg(not(feature = "results"))]
    fn read_results(&self, path: &Path, _inputs: &mut Inputs) -> anyhow::Result<()> {
        anyhow::bail!("{}: this build reads no folders of results (feature 'results')", path.display())
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Bits of every block of a model, and of what is beside them.
fn model_layers(path: &Path) -> anyhow::Result<Vec<Layer>> {
    let files = ModelFiles::open(path)?;
    let mut parts: Vec<(String, u64, u64)> = Vec::new();
    for name in files.names() {
        let [rows, cols] = files.shape(name)?[..] else { continue };
        let weights = (rows as u64).saturating_mul(cols as u64);
        let bytes = files.layout(name)?.bytes();
        let unit = match name.split('.').collect::<Vec<_>>()[..] {
            ["model", "layers", index, ..] => format!("block.{index}"),
            ["model", "embed_tokens", ..] => "embedding".to_owned(),
            _ => name.to_owned(),
        };
        match parts.iter_mut().find(|part| part.0 == unit) {
            Some(part) => {
                part.1 += weights;
                part.2 += bytes;
            }
            None => parts.push((unit, weights, bytes)),
        }
    }
    let number = |name: &str| name.strip_prefix("block.").and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    parts.sort_by_key(|part| number(&part.0));
    let layer = |(name, weights, bytes): (String, u64, u64)| Layer {
        name,
        bits: Some(bits_per_weight(bytes, weights)),
        bytes: Some(bytes),
        ..Layer::default()
    };
    Ok(parts.into_iter().map(layer).collect())
}

/// What each unit of a measurement costs in the option nearest to 3 bits per weight: a width at which layers differ.
fn measured_layers(measurement: &Measurement) -> Vec<Layer> {
    let width = |option: usize| (f64::from(measurement.options[option].bit_width) - 3.0).abs();
    let narrow = (0..measurement.options.len()).min_by(|&a, &b| width(a).total_cmp(&width(b)));
    let units = measurement.units.iter().map(|unit| Layer {
        name: unit.unit.to_string(),
        sensitivity: narrow.and_then(|option| unit.kl.get(option)).copied(),
        ..Layer::default()
    });
    units.collect()
}
