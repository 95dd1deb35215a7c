//! Evaluation and analytics: [`perplexity`](perplexity()) of a text, [`kl_divergence`] from a base model, loss on held-out
//! examples ([`heldout_loss`]), [`multiple_choice`](multiple_choice()) questions, and metrics as JSON lines ([`JsonLines`]).
//!
//! ```
//! use burn::tensor::Device;
//! use edgellm_eval::{kl_divergence, perplexity};
//! use edgellm_model::testing::tiny_decoder;
//!
//! let (base, other) = (tiny_decoder(0, &Device::flex()), tiny_decoder(1, &Device::flex()));
//! let text: Vec<u32> = (0..100).map(|i| i * 37 % 256).collect();
//! let result = perplexity(&base, None, &text, 32, None, &mut |_| {})?;
//! assert_eq!((result.windows, result.tokens), (3, 93));
//! assert!(kl_divergence(&base, &other, None, &text, 32, None, &mut |_| {})?.kl > 0.0);
//! # Ok::<(), edgellm_eval::EvalError>(())
//! ```

#![forbid(unsafe_code)]

mod answers;
mod bootstrap;
mod calibration;
pub mod chart;
mod compare;
mod divergence;
mod energy;
mod error;
mod figures;
mod heldout;
mod items;
mod metrics;
mod multiple_choice;
mod names;
mod perplexity;
mod questions;
mod recommendations;
pub mod report;
#[cfg(feature = "store")]
pub mod store;
pub mod sweep;
mod votes;
mod windows;

pub use answers::{AnswerTask, Asked, read_answer_tasks};
pub use bootstrap::{Difference, Item, interval, paired_difference, ratio};
pub use calibration::{BINS, Bin, Reliability, reliability, reliability_in_steps};
pub use compare::{Baseline, Bound, Compared, Verdict, case_name, compare};
pub use divergence::{Adapted, Divergence, adapted_kl_divergence, divergence_in_steps, kl_divergence};
pub use energy::EnergyMeter;
pub use error::{EvalError, Result};
pub use figures::{Better, Figure, Figures, Layer, Measured, RECORD_VERSION, Record};
pub use heldout::{ExitLoss, HeldOut, heldout_loss, heldout_loss_in_steps};
pub use items::{Entry, ItemLog, Steps};
pub use metrics::{JsonLines, peak_rss_bytes, process_memory, rss_bytes};
pub use multiple_choice::{
    Accuracy, ChoiceOption, MultipleChoice, Question, multiple_choice, multiple_choice_in_steps,
};
pub use perplexity::{
    Perplexity, Strided, perplexity, perplexity_in_steps, strided_perplexity, strided_perplexity_in_steps,
};
pub use questions::{QuestionFile, Scoring, read_questions};
pub use recommendations::{recommendations, run_recommendations};
pub use windows::Progress;
