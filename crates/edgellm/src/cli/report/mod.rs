//! `edgellm report`: one HTML file of runs, sweeps and models; with `--live`, a page that follows a run.

mod layers;
#[cfg(feature = "results")]
mod live;

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::eval::report::{Inputs, Lines, page, read_lines};
use edgellm::model::files::ModelFiles;
use edgellm::model::io::atomic_write;
use edgellm::model::values::read_value;
use serde_json::json;

use self::layers::Found;
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
            if let Some(path) = self.runs.iter().find(|path| !path.exists()) {
                return Err(Usage(format!("{}: expected a file or a folder, found nothing", path.display())).into());
            }
            return live::serve(ctx, port, &|| {
                let inputs = self.inputs(true)?;
                Ok(page(&Inputs { refresh: Some(2), ..inputs }))
            });
        }
        let Some(path) = &self.output else { return Err(Usage("expected --output".into()).into()) };
        let inputs = self.inputs(false)?;
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

    /// Everything that the runs hold. What cannot be read is a problem on the page, unless nothing can; where the page follows
    /// a run, there may be nothing yet.
    fn inputs(&self, follows: bool) -> anyhow::Result<Inputs> {
        let (mut inputs, mut found) = (Inputs::default(), Found::default());
        let (mut first, mut problems) = (None, Vec::new());
        let mut failed = |error: anyhow::Error| {
            problems.push(super::failure::message(&error, false));
            first.get_or_insert(error);
        };
        for path in &self.runs {
            if let Err(error) = self.read(path, &mut inputs, &mut found) {
                failed(error);
            }
        }
        inputs.models = found.layers(&mut failed);
        inputs.problems.extend(problems);
        let nothing = inputs.metrics.is_empty() && inputs.records.is_empty() && inputs.models.is_empty();
        if let Some(error) = first.filter(|_| nothing && !follows) {
            return Err(error);
        }
        let names: Vec<String> = self.runs.iter().map(|path| name_of(path)).collect();
        inputs.title = self.title.clone().unwrap_or_else(|| names.join(", "));
        Ok(inputs)
    }

    fn read(&self, path: &Path, inputs: &mut Inputs, found: &mut Found) -> anyhow::Result<()> {
        if path.is_dir() {
            if path.join("config.json").is_file() {
                found.models.push((name_of(path), ModelFiles::open(path)?));
                return Ok(());
            }
            return self.read_results(path, inputs);
        }
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let (lines, problems) = read_lines(path)?;
            match lines {
                Lines::Metrics(runs) => inputs.metrics.extend(runs),
                Lines::Records(records) => inputs.records.extend(records),
            }
            inputs.problems.extend(problems);
            return Ok(());
        }
        found.measurements.push((name_of(path), read_value(path)?));
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
