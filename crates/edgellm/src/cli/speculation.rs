//! The options that make generation faster with early exits, and what they load.

use std::path::PathBuf;

use clap::Args;
use edgellm::model::adapter::Adapter;
use edgellm::model::decoder::Decoder;
use edgellm::model::generate::{
    ConfidentExit, DraftHead, Drafter, DrafterParts, Generator, MAX_BATCH, NgramStore, Shortlist, SourceCount,
    Speculation,
};
use serde_json::{Value, json};

use super::failure::{Usage, usage};

/// Tokens that an exit without a drafter can name: the first of the vocabulary, which the tokenizer merged first.
const SHORTLIST: usize = 8192;

/// Faster generation.
#[derive(Args)]
pub(crate) struct Faster {
    /// Draft tokens and verify them together, which leaves the text as it is: from the text so far, from --drafter, and at
    /// the adapter's exit after EXIT blocks
    #[arg(long, value_name = "EXIT", num_args = 0..=1)]
    speculate: Option<Option<usize>>,
    /// A drafter that `edgellm draft` fitted to the model and the adapter
    #[arg(long, value_name = "FILE")]
    drafter: Option<PathBuf>,
    /// Tokens to draft at most before they are verified
    #[arg(long, value_name = "N", default_value_t = MAX_BATCH - 1)]
    draft: usize,
    /// Take a token from the first exit whose probability for it reaches this; the text changes
    #[arg(long, value_name = "P", conflicts_with_all = ["speculate", "vote"])]
    confident_exit: Option<f32>,
}

/// What the options load.
#[derive(Default)]
pub(crate) struct Drafters {
    /// Exits with their heads, from early to late.
    pub(crate) heads: Vec<DraftHead>,
    pub(crate) store: Option<NgramStore>,
}

impl Drafters {
    /// The drafter of a file.
    pub(crate) fn of_file(decoder: &Decoder, path: &std::path::Path) -> anyhow::Result<Self> {
        let drafter = Drafter::new(decoder, &DrafterParts::load(path)?)?;
        Ok(Self { heads: vec![drafter.head], store: Some(drafter.store) })
    }

    /// Exits behind the adapter's norms.
    pub(crate) fn of_adapter(decoder: &Decoder, adapter: Option<&Adapter>, exits: &[usize]) -> anyhow::Result<Self> {
        let vocab = decoder.config().vocab_size;
        let ids: Vec<u32> = (0..vocab.min(SHORTLIST) as u32).collect();
        let shortlist = Shortlist::new(decoder, &ids)?;
        let head = |&exit: &usize| DraftHead::with_norm(decoder, adapter, exit, shortlist.clone()).map_err(usage);
        Ok(Self { heads: exits.iter().map(head).collect::<Result<_, _>>()?, store: None })
    }
}

impl Faster {
    /// Loads what the options name.
    pub(crate) fn load(&self, decoder: &Decoder, adapter: Option<&Adapter>) -> anyhow::Result<Drafters> {
        if self.drafter.is_some() && self.speculate.is_none() && self.confident_exit.is_none() {
            return Err(Usage("--drafter goes with --speculate or --confident-exit".into()).into());
        }
        match (&self.drafter, self.speculate.flatten()) {
            (Some(_), Some(_)) => Err(Usage("--speculate EXIT and --drafter name two exits; give one".into()).into()),
            (Some(path), None) => Drafters::of_file(decoder, path),
            (None, Some(exit)) => Drafters::of_adapter(decoder, adapter, &[exit]),
            (None, None) if self.confident_exit.is_some() => {
                let n_blocks = decoder.n_blocks();
                let exits = adapter.map(Adapter::exits).unwrap_or_default();
                let exits: Vec<usize> = exits.into_iter().filter(|&exit| exit < n_blocks).collect();
                if exits.is_empty() {
                    let text = "--confident-exit needs a --drafter, or an --adapter with early exits";
                    return Err(Usage(text.into()).into());
                }
                Drafters::of_adapter(decoder, adapter, &exits)
            }
            (None, None) => Ok(Drafters::default()),
        }
    }

    /// The generator with what the options ask for.
    pub(crate) fn apply<'a>(&self, generator: Generator<'a>, drafters: &'a Drafters) -> anyhow::Result<Generator<'a>> {
        if let Some(threshold) = self.confident_exit {
            let heads = drafters.heads.iter().collect();
            return generator.with_confident_exit(ConfidentExit { heads, threshold }).map_err(usage);
        }
        if self.speculate.is_none() {
            return Ok(generator);
        }
        let (head, store) = (drafters.heads.first(), drafters.store.as_ref());
        let speculation = Speculation { head, store, max_draft: self.draft, ..Speculation::default() };
        generator.with_speculation(speculation).map_err(usage)
    }

    /// What the exits did, in words.
    pub(crate) fn summary(generator: &Generator<'_>) -> Option<String> {
        if let Some(report) = generator.speculation_report() {
            let kept = |count: SourceCount| format!("{} of {}", count.right, count.tried);
            return Some(format!(
                "speculation: {:.2} tokens a pass; drafts kept: {} from the text, {} from the drafter's texts, {} from \
                 the exit",
                report.tokens_per_pass(),
                kept(report.text),
                kept(report.store),
                kept(report.exit)
            ));
        }
        let report = generator.confident_report()?;
        Some(format!("tokens by exit, the whole model last: {:?}", report.tokens))
    }

    /// The same for programs.
    pub(crate) fn json(generator: &Generator<'_>) -> Value {
        if let Some(report) = generator.speculation_report() {
            let count = |count: SourceCount| json!({"tried": count.tried, "right": count.right});
            return json!({
                "tokens": report.tokens, "passes": report.passes, "plain_passes": report.plain_passes,
                "tokens_per_pass": report.tokens_per_pass(), "text": count(report.text),
                "store": count(report.store), "exit": count(report.exit),
            });
        }
        generator.confident_report().map_or(Value::Null, |report| json!({"tokens_by_exit": report.tokens}))
    }
}
