//! The adapters of `edgellm run`: loading several by name, and changing between them in a conversation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::model::adapter::{Adapter, AdapterSet};
use edgellm::model::traits::Voter;
use edgellm::session::LoadedModel;

use super::failure::Usage;
use super::run::exits;
use super::{Context, vote};

/// Adapters on the command line.
#[derive(Args)]
pub(crate) struct AdapterArgs {
    /// An adapter, as `edgellm adapt` or PEFT wrote it, perhaps with a name; several can be given
    #[arg(long = "adapter", value_name = "[NAME=]DIR")]
    adapters: Vec<String>,
    /// The adapter to use, by its name, or none (default: the last one given)
    #[arg(long = "use", value_name = "NAME", requires = "adapters")]
    chosen: Option<String>,
}

impl AdapterArgs {
    /// Names and folders, in the order given.
    fn named(&self) -> anyhow::Result<Vec<(String, PathBuf)>> {
        let mut named: Vec<(String, PathBuf)> = Vec::new();
        for text in &self.adapters {
            let (name, dir) = match text.split_once('=') {
                // A folder may have this sign in its name.
                Some((name, dir)) if !Path::new(text).exists() => (name.to_string(), PathBuf::from(dir)),
                _ => (folder_name(Path::new(text)), PathBuf::from(text)),
            };
            if let Some((_, first)) = named.iter().find(|(taken, _)| *taken == name) {
                let text = format!(
                    "--adapter: {} and {} are both called '{name}'; give names, such as --adapter one={}",
                    first.display(),
                    dir.display(),
                    first.display()
                );
                return Err(Usage(text).into());
            }
            named.push((name, dir));
        }
        Ok(named)
    }

    /// What can be checked before a model is loaded.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let named = self.named()?;
        match &self.chosen {
            Some(name) if name != "none" && !named.iter().any(|(known, _)| known == name) => {
                let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
                Err(Usage(format!("--use: expected one of {} or none, found {name}", names.join(", "))).into())
            }
            _ => Ok(()),
        }
    }

    /// Loads the adapters into the model's set and chooses one.
    pub(crate) fn load(&self, model: &mut LoadedModel) -> anyhow::Result<()> {
        let named = self.named()?;
        for (name, dir) in &named {
            model.load_adapter(name, dir)?;
        }
        let last = named.last().map(|(name, _)| name.as_str());
        let chosen = self.chosen.as_deref().or(last).filter(|name| *name != "none");
        Ok(model.adapters.choose(chosen)?)
    }
}

impl AdapterArgs {
    /// The folder of the adapter that is used first.
    pub(crate) fn chosen_dir(&self) -> anyhow::Result<Option<PathBuf>> {
        let mut named = self.named()?;
        Ok(match &self.chosen {
            Some(name) => named.into_iter().find(|(known, _)| known == name).map(|(_, dir)| dir),
            None => named.pop().map(|(_, dir)| dir),
        })
    }

    /// The vote called `name` for every adapter.
    pub(crate) fn votes(&self, name: &str, model: &LoadedModel) -> anyhow::Result<Votes> {
        let mut by_adapter = BTreeMap::new();
        for (adapter, dir) in self.named()? {
            let exits =
                exits(Some(model.adapters.get(Some(&adapter))?.expect("a named adapter")), model.decoder.n_blocks())?;
            by_adapter.insert(adapter, vote::named(name, Some(&dir), &exits)?);
        }
        // A fitted vote belongs to an adapter: without one the last exit speaks.
        let fitted = vote::check_name(name, None).is_err();
        Ok(Votes { by_adapter, without: vote::named(if fitted { "last" } else { name }, None, &[])? })
    }
}

/// How the exits of each adapter vote.
pub(crate) struct Votes {
    by_adapter: BTreeMap<String, Box<dyn Voter>>,
    without: Box<dyn Voter>,
}

impl Votes {
    /// The vote with this adapter.
    pub(crate) fn of(&self, adapter: Option<&str>) -> &dyn Voter {
        adapter.and_then(|name| self.by_adapter.get(name)).unwrap_or(&self.without).as_ref()
    }
}

fn folder_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    whole.file_name().map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// The adapter of a single `--adapter DIR`; without one, what comes with the model.
pub(crate) fn load_adapter(path: Option<&Path>, model: &LoadedModel) -> anyhow::Result<Option<Adapter>> {
    match path {
        Some(path) => Ok(Some(Adapter::load(path, model.decoder.config(), model.decoder.device())?)),
        None => Ok(model.adapters.current().cloned()),
    }
}

/// What a line of a conversation was.
pub(crate) enum Line<'a> {
    /// A message to the model.
    Message,
    /// A command that changed nothing.
    Done,
    /// From now on the model is run with this. What was computed before does not hold for it.
    Use(Option<&'a Adapter>),
}

/// Obeys `/adapter NAME`, `/adapter none` and `/adapters`; `chosen` is the name of the adapter in use.
pub(crate) fn command<'a>(ctx: &Context, line: &str, set: &'a AdapterSet, chosen: &mut Option<String>) -> Line<'a> {
    let mut words = line.split_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some("/adapters"), None, _) => list(ctx, set, chosen.as_deref()),
        (Some("/adapter"), Some(name), None) => {
            let name = Some(name).filter(|name| *name != "none");
            match set.get(name) {
                Ok(_) if name == chosen.as_deref() => ctx.say(&format!("adapter: {} already", name.unwrap_or("none"))),
                Ok(adapter) => {
                    *chosen = name.map(str::to_owned);
                    let name = name.unwrap_or("none");
                    ctx.say(&format!("adapter: {name}; the conversation so far is read again with it"));
                    return Line::Use(adapter);
                }
                Err(error) => ctx.say(&format!("error: {error}")),
            }
        }
        (Some("/adapter"), _, _) => ctx.say("usage: /adapter NAME, /adapter none, /adapters"),
        _ => return Line::Message,
    }
    Line::Done
}

fn list(ctx: &Context, set: &AdapterSet, chosen: Option<&str>) {
    let names = std::iter::once(None).chain(set.names().map(Some));
    for name in names {
        let mark = if name == chosen { "*" } else { " " };
        ctx.say(&format!("{mark} {}", name.unwrap_or("none")));
    }
}
