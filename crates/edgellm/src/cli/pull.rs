//! `edgellm pull`: fetches a model by name into the local store, and prints its path.

use clap::Args;
use edgellm::pull::{PINNED, PullEvent, Pulled, pull_pinned};
use edgellm::store::is_hub_id;
use serde_json::json;

use super::failure::Usage;
use super::output::bytes;
use super::progress::{Counted, Progress};
use super::{Context, interrupt};

/// Fetch a model into the local store and print its path
#[derive(Args)]
pub(crate) struct Pull {
    /// A pinned small model (smollm2-135m-instruct), or a Hugging Face id such as owner/name
    name: String,
    /// Branch, tag or commit of a Hugging Face model
    #[arg(long, default_value = "main")]
    revision: String,
}

impl Pull {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let pulled = if let Some(model) = PINNED.iter().find(|model| model.name == self.name) {
            if self.revision != "main" {
                return Err(Usage("--revision goes with a Hugging Face id".into()).into());
            }
            let mut reporter = Reporter { ctx, progress: None };
            let pulled = pull_pinned(&ctx.store, model, &mut |event| reporter.event(event))?;
            reporter.end();
            pulled
        } else if is_hub_id(&self.name) {
            hub(ctx, &self.name, &self.revision)?
        } else {
            let names = PINNED.map(|model| model.name).join(", ");
            let found = self.name.escape_debug();
            return Err(Usage(format!(
                "model name: expected {names} or a Hugging Face id (owner/name), found '{found}'"
            ))
            .into());
        };
        if pulled.already_there {
            ctx.say(&format!("{} is there already ({})", self.name, bytes(pulled.bytes)));
        }
        let json = json!({
            "name": self.name, "path": pulled.path, "bytes": pulled.bytes, "already_there": pulled.already_there,
        });
        ctx.result(json, || format!("{}\n", pulled.path.display()))
    }
}

/// Turns a pull's events into messages and progress.
struct Reporter<'a> {
    ctx: &'a Context,
    progress: Option<Progress>,
}

impl Reporter<'_> {
    fn event(&mut self, event: PullEvent) -> bool {
        match event {
            PullEvent::Stage(text) => {
                self.end();
                self.ctx.say(&text);
            }
            PullEvent::Bytes { done, total } => {
                let new = || self.ctx.progress("  ", total, Counted::Bytes);
                self.progress.get_or_insert_with(new).set(done);
            }
        }
        !interrupt::requested()
    }

    fn end(&mut self) {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
    }
}

/// Fetches a model of the Hub into the Hub's cache.
#[cfg(feature = "hub")]
fn hub(ctx: &Context, id: &str, revision: &str) -> anyhow::Result<Pulled> {
    use edgellm::model::files::ModelFiles;
    use edgellm::model::hub::{HubOptions, HubProgress, download};

    use super::environment::{flag, hub_cache, text};

    let cache = hub_cache().ok_or_else(|| Usage("there is no home folder for the Hub's cache; set HF_HOME".into()))?;
    let mut options = HubOptions::new(cache);
    if let Some(endpoint) = text("HF_ENDPOINT") {
        options.endpoint = endpoint;
    }
    options.token = text("HF_TOKEN");
    options.offline = flag("HF_HUB_OFFLINE");
    options.revision = revision.into();
    let mut reporter = Reporter { ctx, progress: None };
    let mut file = String::new();
    let mut downloaded = false;
    let path = interrupt::stoppable(|| {
        let on_progress = &mut |p: HubProgress<'_>| {
            if file != p.file {
                file = p.file.to_string();
                reporter.event(PullEvent::Stage(format!("downloading {file}")));
            }
            downloaded = true;
            reporter.event(PullEvent::Bytes { done: p.done, total: p.total });
            interrupt::checkpoint();
        };
        Ok(download(id, &options, on_progress)?)
    })?;
    reporter.end();
    let bytes = ModelFiles::open(&path)?.file_bytes();
    Ok(Pulled { path, bytes, already_there: !downloaded })
}

#[cfg(not(feature = "hub"))]
fn hub(_: &Context, _: &str, _: &str) -> anyhow::Result<Pulled> {
    Err(Usage("this build cannot reach the Hugging Face Hub; build edgellm with `--features hub`".into()).into())
}
