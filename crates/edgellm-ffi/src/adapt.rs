//! Tuning: examples to tokens, a plan for the budget, and the steps, with pauses.

use std::collections::BTreeSet;
use std::time::Instant;

use edgellm::model::adapter::{Adapter, LoraConfig, Targets};
use edgellm::model::config::ModelConfig;
use edgellm::model::data::{Example as Tokens, ExampleEncoder, PromptTemplate};
use edgellm::model::values::Projection;
use edgellm::tune::exits::{ExitScale, exit_schedule};
use edgellm::tune::memory::StepShape;
use edgellm::tune::optimizer::{AdamWConfig, LrSchedule};
use edgellm::tune::order::Order;
use edgellm::tune::{Keep, MICRO_TOKENS, Trainer, TuneConfig, TuneError};

use crate::control::Control;
use crate::load::Work;
use crate::{AdaptOptions, Adaptation, EngineError, Example, ProgressListener, Result, Step};

/// Blocks that are tuned if nothing else is asked for.
const DEFAULT_WINDOW: usize = 8;

/// Learns an adapter for the last exit: nothing else speaks through this interface.
pub(crate) fn adapt(
    work: &Work,
    control: &Control,
    examples: &[Example],
    options: &AdaptOptions,
    listener: Option<&dyn ProgressListener>,
) -> Result<(Adapter, Adaptation)> {
    let start = Instant::now();
    let data = encode(work, examples, options)?;
    let config = config(work, &data, options)?;
    let (window, total) = (config.window, options.steps);
    let schedule = exit_schedule("sequential", config.steps, config.seed)?;
    let mut trainer = Trainer::new(&work.decoder, config, schedule)?;
    let mut failure = None;
    let (mut losses, mut most) = (None, 0);
    trainer.run(&data, |trainer, report| {
        let bytes = trainer.buffer_bytes();
        most = bytes.max(most);
        losses = Some((losses.map_or(report.loss, |(first, _)| first), report.loss));
        // In the thread's own words: steps are counted from 1.
        let said =
            listener.map_or(Ok(Step::Continue), |l| l.on_step(report.step as u32 + 1, total, report.loss, bytes));
        match said {
            Ok(Step::Continue) => {}
            Ok(Step::Pause) => control.pause(true),
            Ok(Step::Stop) => return Ok(false),
            Err(error) => {
                failure = Some(error.into());
                return Ok(false);
            }
        }
        Ok(control.wait())
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let (first_loss, last_loss) = losses.unwrap_or((f64::NAN, f64::NAN));
    let steps = trainer.steps_done() as u32;
    let adapter = trainer.into_adapter();
    let report = Adaptation {
        steps,
        stopped: steps < total,
        examples: data.len() as u32,
        first_loss,
        last_loss,
        parameters: adapter.parameters() as u64,
        window: window as u32,
        buffer_bytes: most,
        seconds: start.elapsed().as_secs_f64(),
    };
    Ok((adapter, report))
}

/// The tokens of the examples; each has something to learn.
fn encode(work: &Work, examples: &[Example], options: &AdaptOptions) -> Result<Vec<Tokens>> {
    if options.max_tokens < 2 {
        return Err(EngineError::argument("max_tokens of an example", "at least 2", options.max_tokens));
    }
    if examples.is_empty() {
        return Err(EngineError::argument("examples", "at least one", "none"));
    }
    let config = work.decoder.config();
    let chat = work.chat_template.as_ref();
    let mut data = Vec::new();
    for (index, example) in examples.iter().enumerate() {
        let template = match example {
            Example::Text { .. } => PromptTemplate::Text,
            _ if chat.is_some() => PromptTemplate::Chat,
            Example::Chat { .. } => {
                let found = "a conversation, for a model without one";
                return Err(EngineError::argument(
                    &format!("example {}", index + 1),
                    "a pair or a text, or a model with a chat template",
                    found,
                ));
            }
            Example::Pair { .. } => PromptTemplate::Alpaca,
        };
        let encoder = ExampleEncoder {
            tokenizer: &work.tokenizer,
            chat,
            template,
            end_tokens: &config.eos_token_ids,
            max_len: (options.max_tokens as usize).min(config.max_position_embeddings),
        };
        let encoded = encoder
            .encode(&example.record())
            .map_err(|error| EngineError::BadArgument(format!("example {}: {error}", index + 1)))?;
        let useful: Vec<Tokens> = encoded.examples.into_iter().filter(|tokens| tokens.n_targets() > 0).collect();
        if useful.is_empty() {
            let expected = format!("something to learn within the first {} tokens", encoder.max_len);
            return Err(EngineError::argument(&format!("example {}", index + 1), expected, "nothing"));
        }
        data.extend(useful);
    }
    Ok(data)
}

/// The settings of the run, fitted into the budget.
fn config(work: &Work, data: &[Tokens], options: &AdaptOptions) -> Result<TuneConfig> {
    let n_blocks = work.decoder.n_blocks();
    for (what, value) in [("steps", options.steps), ("batch", options.batch)] {
        if value == 0 {
            return Err(EngineError::argument(what, "at least 1", 0));
        }
    }
    if let Some(window) = options.window.filter(|&w| w == 0 || w as usize > n_blocks) {
        return Err(EngineError::argument("window", format!("from 1 to {n_blocks}, the number of blocks"), window));
    }
    let rank = options.rank as usize;
    let mut config = TuneConfig {
        steps: options.steps.into(),
        batch_size: options.batch as usize,
        order: Order::Shuffled,
        micro_tokens: MICRO_TOKENS,
        keep: Keep::All,
        exits: vec![n_blocks],
        window: options.window.map_or(DEFAULT_WINDOW.min(n_blocks), |window| window as usize),
        lora: LoraConfig { rank, alpha: 2.0 * rank as f64, use_rslora: false, targets: Targets::all_linear() },
        lora_dropout: 0.0,
        train_exit_norms: false,
        learning_rate: options.learning_rate,
        exit_scale: ExitScale::Equal,
        lr_schedule: LrSchedule::Constant,
        warmup_steps: 0,
        adamw: AdamWConfig::default(),
        max_grad_norm: 1.0,
        seed: options.seed,
    };
    config.lora.validate()?;
    if let Some(budget) = options.memory_budget_bytes.or(work.memory_budget) {
        fit(work.decoder.config(), &mut config, data, budget, work.weight_bytes, options.window.is_some())?;
    }
    // What is never tuned needs no update.
    let tuned: BTreeSet<usize> = (n_blocks - config.window..n_blocks).collect();
    config.lora.targets = Targets::default();
    for projection in Projection::ALL {
        config.lora.targets.add(projection, Some(tuned.clone()));
    }
    Ok(config)
}

/// Chooses tokens at once, what is kept and, where it is not given, the window, so that weights and buffers fit.
fn fit(
    model: &ModelConfig,
    config: &mut TuneConfig,
    data: &[Tokens],
    budget: u64,
    weight_bytes: u64,
    window_is_given: bool,
) -> Result<()> {
    let shape = StepShape::new(model, config);
    let before = weight_bytes + shape.adapter_bytes();
    let longest = data.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    let windows = if window_is_given { config.window..config.window + 1 } else { 1..config.window + 1 };
    let plan = shape.plan(budget.saturating_sub(before), config.batch_size * longest, longest, windows);
    let plan = plan.map_err(|error| match error {
        TuneError::Memory { least, .. } => EngineError::Memory(format!(
            "memory budget for tuning: expected at least {} bytes, of which the weights take {weight_bytes}, found {budget}; \
             give a larger budget, shorter examples or a lower rank",
            before + least
        )),
        other => other.into(),
    })?;
    (config.window, config.micro_tokens, config.keep) = (plan.window, plan.micro_tokens, plan.keep);
    Ok(())
}
