//! Running this command in a process of its own, as a user would: what it takes in memory is then its own, and what it
//! prints is one JSON value.

use std::ffi::OsStr;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::environment;

/// Runs `edgellm ARGUMENTS --json --quiet`; what it printed.
///
/// # Errors
/// It cannot be started, ended with another code than 0 (with its own sentence), or printed no JSON.
pub(crate) fn json<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> anyhow::Result<Value> {
    spawn(command(arguments)?)?.wait()
}

/// Starts `edgellm ARGUMENTS --json --quiet` in a group of its own: a terminal's signals do not reach it, [`stop`] does.
///
/// # Errors
/// It cannot be started.
#[cfg(feature = "results")]
pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> anyhow::Result<Running> {
    #[cfg_attr(not(any(target_os = "linux", target_os = "android")), allow(unused_mut))]
    let mut command = command(arguments)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    spawn(command)
}

fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> anyhow::Result<Command> {
    let mut command = Command::new(environment::this_command()?);
    command.args(arguments).args(["--json", "--quiet", "--parent", &std::process::id().to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

fn spawn(mut command: Command) -> anyhow::Result<Running> {
    let name = command.get_args().next().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let child = command.spawn().map_err(|e| anyhow::anyhow!("edgellm {name} could not be started: {e}"))?;
    Ok(Running { name, child })
}

/// A command that runs in a process of its own.
pub(crate) struct Running {
    name: String,
    child: Child,
}

impl Running {
    /// The process.
    #[cfg(feature = "results")]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end; what it printed.
    ///
    /// # Errors
    /// It ended with another code than 0 (with its own sentence), or printed no JSON.
    pub(crate) fn wait(self) -> anyhow::Result<Value> {
        let name = self.name;
        let output = self.child.wait_with_output().map_err(|e| anyhow::anyhow!("edgellm {name} was lost: {e}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
            anyhow::bail!("edgellm {name} failed ({}): {}", output.status, last.trim_start_matches("error: "));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| anyhow::anyhow!("edgellm {name} printed no JSON: {e}"))
    }
}

/// Asks a started command to stop at its next step.
#[cfg(all(feature = "results", any(target_os = "linux", target_os = "android")))]
pub(crate) fn stop(process: u32) {
    use nix::sys::signal::{Signal, kill};
    if let Ok(process) = i32::try_from(process) {
        // It may have ended meanwhile.
        let _ = kill(nix::unistd::Pid::from_raw(process), Signal::SIGTERM);
    }
}

/// As above: nothing. There a terminal's signals reach it as well.
#[cfg(all(feature = "results", not(any(target_os = "linux", target_os = "android"))))]
pub(crate) fn stop(_process: u32) {}

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
