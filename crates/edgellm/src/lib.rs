//! EdgeLLM: compress, adapt and run language models on the device where they are used.
//!
//! This crate is the facade over the libraries of the project, and the `edgellm` command. The libraries are modules here:
//! [`kernels`] (packed formats and operators), [`model`] (files and the decoder), [`luc`] (sensitivities, policies,
//! compression), [`tune`] (adaptive layer tuning, voting), [`sched`] (device profiles, costs) and [`eval`] (perplexity,
//! KL, held-out loss). What is added: [`device`] chooses a device by name, [`session`] loads a model whole, [`store`]
//! finds models by name, [`pull`] fetches them, and [`telemetry`] tells what layers and operators take.
//!
//! ```
//! use edgellm::device::DeviceChoice;
//! use edgellm::luc::{Gptq, Solve, Trials, measure, option_grid};
//! use edgellm::model::generate::{Flow, Generator};
//! use edgellm::model::sample::{Sampler, SamplingConfig};
//! use edgellm::model::traits::PolicySolver;
//! use edgellm::model::values::{Budget, Granularity};
//! use edgellm::session::load_model;
//! use edgellm::tune::voters::voter;
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("model");
//! # edgellm::model::testing::tiny_model_dir(&path, 0)?;
//! // A Hugging Face directory, a compressed directory or a GGUF file.
//! let model = load_model(&path, &DeviceChoice::Auto.load_options(Default::default())?)?;
//!
//! // Which parts of it suffer from fewer bits, and the best formats for 5 bits per weight.
//! let text = model.tokenizer.encode("Some text to calibrate on.", false)?;
//! let options = option_grid(&[2, 4, 8], &[32], &[])?;
//! let trials = Trials {
//!     options: &options,
//!     granularity: Granularity::Block,
//!     compressor: &Gptq::default(),
//!     calibration: &[text],
//!     compared_windows: 1,
//!     compared_length: 64,
//! };
//! let measurement = measure(&model.decoder, &trials, &[], &mut |_| Ok(()), &mut |_| {})?;
//! let budget = Budget { bits_per_weight: Some(5.0), ..Budget::default() };
//! let policy = Solve::default().solve(&measurement, &budget)?;
//! assert_eq!(policy.units.len(), 5);
//!
//! // Generate, token by token.
//! let prompt = model.tokenizer.encode("Once upon a time", true)?;
//! let mut generator = Generator::new(&model.decoder, None, voter("last")?, &[4])?;
//! let mut sampler = Sampler::new(SamplingConfig::default())?;
//! let ids = generator.generate(&prompt, 8, &[], &mut sampler, |_token| Ok(Flow::Continue))?;
//! assert_eq!(ids.len(), 8);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub mod device;
mod error;
pub mod pull;
pub mod recommend;
pub mod schedule;
pub mod session;
pub mod store;
pub mod telemetry;

pub use edgellm_eval as eval;
pub use edgellm_kernels as kernels;
pub use edgellm_luc as luc;
pub use edgellm_model as model;
pub use edgellm_sched as sched;
pub use edgellm_tune as tune;
pub use error::EdgeError;

/// The project's crates, as their log targets name them.
pub const CRATES: [&str; 7] =
    ["edgellm", "edgellm_kernels", "edgellm_model", "edgellm_luc", "edgellm_tune", "edgellm_sched", "edgellm_eval"];
