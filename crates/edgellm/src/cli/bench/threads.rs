//! The same benchmark in a process of its own.

use std::process::{Command, Stdio};

use anyhow::Context as _;

use super::super::failure::{Interrupted, Usage};
use super::super::interrupt::STOPPED;
use super::report::Row;

/// Runs this program with other arguments, which make it print rows as JSON; its messages go where ours go.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<Vec<Row>> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let output = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    match output.status.code() {
        Some(0) => {}
        Some(code) if code == i32::from(STOPPED) => return Err(Interrupted::nothing_written()),
        // It said why.
        Some(2) => return Err(Usage("one number of threads could not be measured".into()).into()),
        _ => anyhow::bail!("one number of threads could not be measured ({})", output.status),
    }
    serde_json::from_slice(&output.stdout).context("the rows of one number of threads cannot be read")
}
