//! Running this command in a process of its own, as a user would: what it takes in memory is then its own, and what it
//! prints is one JSON value.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::environment;

/// Runs `edgellm ARGUMENTS --json --quiet`; what it printed.
///
/// # Errors
/// It cannot be started, ended with another code than 0 (with its own sentence), or printed no JSON.
pub(crate) fn json<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> anyhow::Result<Value> {
    let mut command = Command::new(environment::this_command()?);
    command.args(arguments).args(["--json", "--quiet", "--parent", &std::process::id().to_string()]);
    command.stdin(Stdio::null());
    let name = command.get_args().next().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let output = command.output().map_err(|e| anyhow::anyhow!("edgellm {name} could not be started: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        anyhow::bail!("edgellm {name} failed ({}): {}", output.status, last.trim_start_matches("error: "));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| anyhow::anyhow!("edgellm {name} printed no JSON: {e}"))
}

/// Ends this process when the one that started it ends, however that does: nobody else writes to what a stopped sweep left.
/// Systems other than Linux and Android have no such thing; there a process that lost its parent ends by itself, and what it
/// wrote is not used.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn end_with(parent: u32) {
    use nix::sys::prctl::set_pdeathsig;
    use nix::sys::signal::Signal;
    let set = set_pdeathsig(Signal::SIGKILL);
    // The parent may have ended before.
    let orphaned = u32::try_from(nix::unistd::getppid().as_raw()).ok() != Some(parent);
    if orphaned || set.is_err() {
        std::process::exit(1);
    }
}

/// As above: nothing.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn end_with(_parent: u32) {}
