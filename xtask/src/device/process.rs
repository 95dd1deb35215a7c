//! Programs with a time limit, and what their failure says about a device.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Why a device's row ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It is not there, or not usable from here.
    NotRun(String),
    /// It was there, and cannot go on: gone, full, or silent for too long.
    Lost(String),
    /// A program on it failed.
    Failed(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRun(reason) | Self::Lost(reason) | Self::Failed(reason) => f.write_str(reason),
        }
    }
}

/// Phrases of ssh and adb when there is nothing at the other end.
const GONE: [&str; 10] = [
    "device offline",
    "device unauthorized",
    "no devices/emulators found",
    "device not found",
    "connection reset",
    "connection refused",
    "connection closed",
    "closed by remote host",
    "broken pipe",
    "timed out",
];

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// It cannot be started, fails, or runs longer than `limit`, after which it is ended. The sentence says when the device
/// is gone or full.
pub(super) fn run(mut command: Command, input: Option<&Path>, limit: Duration) -> Result<String, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |error: io::Error| Failure::Failed(format!("cannot run {program}: {error}"));
    match input {
        Some(path) => {
            let file = File::open(path).map_err(|e| Failure::Failed(format!("cannot read {}: {e}", path.display())))?;
            command.stdin(file);
        }
        None => {
            command.stdin(Stdio::null());
        }
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = wait(&mut child, limit).map_err(failed)?;
    let Some(status) = status else {
        return Err(Failure::Lost(format!("{program} gave no result within {:.0} s", limit.as_secs_f64())));
    };
    let text =
        |thread: thread::JoinHandle<Vec<u8>>| String::from_utf8_lossy(&thread.join().unwrap_or_default()).into_owned();
    let (out, err) = (text(out), text(err));
    if status.success() {
        return Ok(out);
    }
    Err(explain(&program, &status.to_string(), status.code(), &err, &out))
}

/// Reads a stream to its end beside the others.
fn drain(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What came before an error is still worth showing.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// The status, or none when the time is over; the program is ended then.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<std::process::ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn explain(program: &str, status: &str, code: Option<i32>, err: &str, out: &str) -> Failure {
    let lines = || err.lines().chain(out.lines()).map(str::trim).filter(|l| !l.is_empty());
    let has = |phrase: &str| lines().find(|l| l.to_lowercase().contains(phrase));
    let last = lines().find(|l| l.starts_with("error")).or_else(|| err.lines().rfind(|l| !l.trim().is_empty()));
    let last = last.or_else(|| lines().next_back()).unwrap_or("it said nothing");
    if let Some(line) = has("no space left").or_else(|| has("not enough space")) {
        return Failure::Lost(format!("no space left on the device ({line})"));
    }
    let unknown = lines().find(|l| l.contains("device '") && l.ends_with("not found"));
    if let Some(line) = unknown.or_else(|| GONE.iter().find_map(|phrase| has(phrase))) {
        return Failure::Lost(format!("the device is gone ({line})"));
    }
    // 255 is ssh's own; other codes are those of the program at the other end.
    if program == "ssh" && code == Some(255) {
        return Failure::Lost(format!("no connection ({last})"));
    }
    Failure::Failed(format!("{status}: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: f64) -> Result<String, Failure> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run(command, None, Duration::from_secs_f64(limit))
    }

    #[test]
    fn output_and_errors_come_back() {
        assert_eq!(sh("echo a; echo b >&2", 20.0).unwrap(), "a\n");
        // More than a pipe holds, on both streams.
        assert_eq!(sh("yes | head -c 300000; yes | head -c 300000 >&2", 20.0).unwrap().len(), 300_000);
        let said = |script: &str| sh(script, 20.0).unwrap_err().to_string();
        assert!(said("echo progress >&2; echo 'error: no model' >&2; exit 1").ends_with(": error: no model"));
        assert!(said("echo \"write: No space left on device\" >&2; exit 1").starts_with("no space left on the device"));
        assert!(said("echo \"error: device offline\" >&2; exit 1").starts_with("the device is gone"));
        assert!(said("echo \"error: device 'A1' not found\" >&2; exit 1").starts_with("the device is gone"));
        assert!(said("exit 3").contains("it said nothing"));
    }

    #[test]
    fn time_is_limited() {
        let start = Instant::now();
        let error = sh("exec sleep 60", 0.2).unwrap_err().to_string();
        assert!(error.contains("no result within"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_missing_program_is_said() {
        let error = run(Command::new("no-such-program"), None, Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.starts_with("cannot run no-such-program"), "{error}");
    }
}
