//! Examples from files for tuning and evaluation.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::model::data::{
    DataFormat, DataReport, Dataset, Example, ExampleEncoder, PromptTemplate, ReadOptions, ValSplit, read_examples,
};
use edgellm::session::LoadedModel;
use serde_json::{Value, json};

use super::failure::{Usage, usage};

/// How examples are read.
#[derive(Args, Debug)]
pub(crate) struct DataArgs {
    /// How records become prompts: chat, alpaca or text (default: text for texts, chat if the model has a template, else
    /// alpaca)
    #[arg(long, value_name = "TEMPLATE")]
    template: Option<PromptTemplate>,
    /// Tokens of an example at most
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(crate) max_len: usize,
    /// What data files hold: jsonl, csv or text (default: by name, .jsonl, .csv, or .txt and .md)
    #[arg(long, value_name = "FORMAT")]
    data_format: Option<DataFormat>,
    /// Pass over lines that cannot be used, and count them (default: the first one is an error)
    #[arg(long)]
    skip_bad_lines: bool,
}

impl DataArgs {
    /// Checks what can be checked before a model is loaded.
    pub(crate) fn check<'a>(&self, files: impl IntoIterator<Item = &'a PathBuf>) -> anyhow::Result<()> {
        if self.max_len < 2 {
            return Err(Usage(format!("--max-len: expected at least 2, found {}", self.max_len)).into());
        }
        files.into_iter().try_for_each(|path| self.format(path).map(drop))
    }

    fn format(&self, path: &Path) -> anyhow::Result<DataFormat> {
        self.data_format.map_or_else(|| DataFormat::of(path).map_err(usage), Ok)
    }

    /// The examples of a file, for a model.
    pub(crate) fn read(&self, model: &LoadedModel, path: &Path) -> anyhow::Result<Dataset> {
        let config = model.decoder.config();
        let chat = model.chat_template.as_ref();
        let format = self.format(path)?;
        let template = self.template.unwrap_or(match (format, chat) {
            (DataFormat::Text, _) => PromptTemplate::Text,
            (_, Some(_)) => PromptTemplate::Chat,
            (_, None) => PromptTemplate::Alpaca,
        });
        if config.eos_token_ids.is_empty() {
            anyhow::bail!("the model names no token that ends a text (eos_token_id), which examples need");
        }
        let encoder = ExampleEncoder {
            tokenizer: &model.tokenizer,
            chat,
            template,
            end_tokens: &config.eos_token_ids,
            max_len: self.max_len.min(config.max_position_embeddings),
        };
        let options = ReadOptions { format: Some(format), skip_bad_lines: self.skip_bad_lines };
        Ok(read_examples(path, &encoder, &options)?)
    }

    /// The examples to learn from and those to measure the loss on, from a file of their own or split off.
    pub(crate) fn read_training(
        &self,
        model: &LoadedModel,
        data: &Path,
        eval_data: Option<&Path>,
        val_split: Option<ValSplit>,
        seed: u64,
    ) -> anyhow::Result<TrainingData> {
        let Dataset { examples, report } = self.read(model, data)?;
        let eval = eval_data.map(|path| self.read(model, path)).transpose()?;
        let (train, split_off) = match val_split {
            Some(split) => {
                let split = split.split(examples, seed);
                let (train, val) = split.map_err(|error| usage(format!("--val-split: {error}")))?;
                (train, Some(val))
            }
            None => (examples, None),
        };
        let (heldout, eval_report) = match eval {
            Some(eval) => (Some(eval.examples), Some(eval.report)),
            None => (split_off, None),
        };
        Ok(TrainingData { train, heldout, report, eval_report })
    }
}

/// What a tuning run works with.
pub(crate) struct TrainingData {
    /// Examples to learn from.
    pub(crate) train: Vec<Example>,
    /// Examples to measure the loss on.
    pub(crate) heldout: Option<Vec<Example>>,
    /// What became of the file to learn from, before the split.
    report: DataReport,
    /// What became of the file of held-out examples, if there is one.
    eval_report: Option<DataReport>,
}

impl TrainingData {
    /// For `--json` and metrics.
    pub(crate) fn json(&self) -> Value {
        json!({
            "train_examples": self.train.len(), "heldout_examples": self.heldout.as_ref().map(Vec::len),
            "data": self.report, "eval_data": self.eval_report,
        })
    }
}

/// `300 examples (2 skipped: 2 not JSON (lines 4, 9)), 15 of them held out`.
impl fmt::Display for TrainingData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.report)?;
        match (&self.eval_report, &self.heldout) {
            (Some(report), _) => write!(f, "; held out: {report}"),
            (None, Some(heldout)) => write!(f, ", {} of them held out", heldout.len()),
            (None, None) => Ok(()),
        }
    }
}
