//! Sweeps: a template crosses models, policies, budgets, adapters, devices, seeds and tasks, and becomes *stages*, each one
//! command line of `edgellm` whose result depends on nothing but its inputs.
//!
//! A stage's key is a SHA-256 over the command's version, its arguments, the contents of the files among them and the keys of
//! the stages whose output it reads. So a stage that several cases share is run once, and one that was run before is not run
//! again unless something changed that it depends on. Options are named as the command names them; what they may be is for
//! the command to say.

mod expand;
mod template;

pub use expand::{Argument, Case, Everywhere, Expanded, Stage, StageKind, expand};
pub use template::{Template, TemplateError};
