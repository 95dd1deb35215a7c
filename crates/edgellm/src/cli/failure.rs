//! How a command fails: exit codes and messages.
//!
//! Exit codes: 2 for a command line that cannot be meant (also settings out of range), 130 when stopped by a signal,
//! 1 for everything else. The message is one sentence; `-v` adds the errors below it.

use std::fmt::Write as _;
use std::io;

use edgellm::EdgeError;
use edgellm::eval::EvalError;
use edgellm::model::ModelError;
use edgellm::tune::TuneError;

/// The command line cannot be meant: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Stopped by Ctrl-C: exit code 130. The text says what was left behind.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Interrupted(pub(crate) String);

impl Interrupted {
    /// Stopped, and nothing was written.
    pub(crate) fn nothing_written() -> anyhow::Error {
        Self("stopped by a signal; nothing was written".into()).into()
    }
}

/// The reader of standard output went away: not an error of ours.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed")]
pub(crate) struct ClosedOutput;

/// A settings error of a library is a usage error of the command.
pub(crate) fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    Usage(error.to_string()).into()
}

/// The exit code of an error.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<ClosedOutput>() {
        return 0;
    }
    if error.is::<Usage>() {
        return 2;
    }
    if error.is::<Interrupted>() {
        return 130;
    }
    let edge = error.downcast_ref::<EdgeError>();
    if matches!(edge, Some(EdgeError::Cancelled)) {
        return 130;
    }
    let setting = matches!(error.downcast_ref::<TuneError>(), Some(TuneError::Setting { .. }))
        || matches!(error.downcast_ref::<EvalError>(), Some(EvalError::Setting { .. }));
    let is_usage = setting
        || matches!(
            edge,
            Some(
                EdgeError::ModelName { .. }
                    | EdgeError::DeviceNotBuilt { .. }
                    | EdgeError::Tune(TuneError::Setting { .. })
                    | EdgeError::Eval(EvalError::Setting { .. })
            )
        );
    if is_usage { 2 } else { 1 }
}

/// The message of an error: its sentence, and with `chain` the errors below that it does not already contain.
pub(crate) fn message(error: &anyhow::Error, chain: bool) -> String {
    let mut text = one_line(&error.to_string());
    if chain {
        let mut shown = text.clone();
        for cause in error.chain().skip(1).map(|e| one_line(&e.to_string())) {
            if !shown.contains(&cause) {
                let _ = write!(text, "\n  caused by: {cause}");
                shown.push_str(&cause);
            }
        }
    }
    if let Some(hint) = hint(error) {
        let _ = write!(text, "\n  hint: {hint}");
    }
    text
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What to do about errors whose sentence does not say it.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    let io = error.chain().find_map(|e| match e.downcast_ref::<ModelError>() {
        Some(ModelError::Io { source, .. }) => Some(source),
        _ => e.downcast_ref::<io::Error>(),
    })?;
    match io.kind() {
        io::ErrorKind::StorageFull => Some("make room on the disk; the old file is whole"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some("check the permissions of the file and its folder")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_tell_usage_failure_and_interruption_apart() {
        assert_eq!(exit_code(&usage("x")), 2);
        assert_eq!(exit_code(&Interrupted::nothing_written()), 130);
        assert_eq!(exit_code(&ClosedOutput.into()), 0);
        assert_eq!(exit_code(&EdgeError::Cancelled.into()), 130);
        assert_eq!(exit_code(&EdgeError::DeviceNotBuilt { device: "wgpu" }.into()), 2);
        assert_eq!(exit_code(&EdgeError::NoDevice { device: "wgpu" }.into()), 1);
        let setting = || TuneError::Setting { what: "window", expected: "1".into(), found: "0".into() };
        assert_eq!(exit_code(&setting().into()), 2);
        assert_eq!(exit_code(&EdgeError::from(setting()).into()), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), 1);
    }

    #[test]
    fn messages_are_one_line_until_asked() {
        let error = anyhow::Error::new(io::Error::other("deep")).context("a\n  b");
        assert_eq!(message(&error, false), "a b");
        assert_eq!(message(&error, true), "a b\n  caused by: deep");
        let full = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull));
        assert!(message(&full, false).contains("hint: make room"));
    }
}
