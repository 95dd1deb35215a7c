//! A report: one HTML file that needs nothing else, of metrics files, records of sweeps, and models' layers.
//!
//! It holds no reference to anything outside and a script of a few lines for the choice of colours; a content security policy
//! allows no other. Long series are thinned, keeping the least and the largest value of each stretch.

mod page;
mod read;
mod sections;
mod series;

use crate::figures::{Layer, Record};

pub use page::page;
pub use read::{Lines, Metrics, read_lines, read_metrics, read_records};
pub(crate) use sections::{STAGES, passes, stage_seconds};

/// What a report is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inputs {
    /// Above everything.
    pub title: String,
    /// Metrics of runs that tune, by the name of their file.
    pub metrics: Vec<Metrics>,
    /// What sweeps measured.
    pub records: Vec<Record>,
    /// Layers of models, by name.
    pub models: Vec<(String, Vec<Layer>)>,
    /// What could not be read, in sentences.
    pub problems: Vec<String>,
    /// Seconds after which the page loads itself again: of a run that goes on.
    pub refresh: Option<u32>,
}
